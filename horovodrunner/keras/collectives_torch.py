"""Keras 3 on torch: gradients and weights over the ranks. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import horovod.torch as hvd
import keras
import torch

from horovodrunner.errors import ArgumentValueError
from horovodrunner.keras.options import Options, groups_of

__all__ = [
    "Passes",
    "average",
    "broadcast",
    "do_if",
    "is_finite_everywhere",
    "key",
    "reduce",
    "refuse_compiled_graph",
]


def key(variable: Any) -> Hashable:
    """Give what tells a variable from others.

    Parameters
    ----------
    variable
        A Keras variable or a torch parameter.

    Returns
    -------
    hashable
        The same for a Keras variable and the parameter in it.
    """
    return id(_native(variable))


def _native(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def refuse_compiled_graph() -> None:
    """Do nothing: torch.compile leaves to Python what it cannot compile."""


def _require_no_device(name: str, device: str) -> None:
    if device:
        raise ArgumentValueError(
            f"{name}={device!r}: Keras uses torch, where a tensor is reduced on its own device"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def reduce(
    options: Options, grads: Sequence[Any], variables: Sequence[Any], local: Collection[Hashable]
) -> list[Any]:
    """Reduce gradients over the ranks.

    Parameters
    ----------
    options
        How.
    grads
        Tensors or None.
    variables
        What they are the gradients of.
    local
        Keys of the variables whose gradients stay the rank's own.

    Returns
    -------
    list
        The gradients to apply.

    Raises
    ------
    ArgumentValueError
        If a device was asked for.
    """
    _require_no_device("device_dense", options.device_dense)
    _require_no_device("device_sparse", options.device_sparse)
    process_set = options.process_set
    if not process_set.included() or process_set.size() == 1:
        return list(grads)
    keys = [key(variable) for variable in variables]
    reduced = list(grads)
    shared: list[int] = []
    for index, grad in enumerate(grads):
        if grad is None:
            continue
        if keys[index] in local:
            if options.scales_local_gradients:
                reduced[index] = grad / process_set.size()
        else:
            shared.append(index)
    settings = {
        "op": options.op,
        "process_set": process_set,
        "prescale_factor": 1.0 / options.gradient_predivide_factor,
        "postscale_factor": options.gradient_predivide_factor,
    }
    asked = options.groups
    if isinstance(asked, Sequence):
        asked = [[key(variable) for variable in group] for group in asked]
    under_way = []
    for group in groups_of(asked, shared, keys):
        name = f"{options.name}.gradient.{group[0]}"
        dense = [grads[i].to_dense() if grads[i].is_sparse else grads[i] for i in group]
        sent = [options.compression.compress(tensor) for tensor in dense]
        tensors = [tensor for tensor, _ in sent]
        if len(group) == 1:
            handle = hvd.allreduce_async(tensors[0], name=name, **settings)
        else:
            handle = hvd.grouped_allreduce_async(tensors, name=name, **settings)
        under_way.append((group, handle, [context for _, context in sent]))
    for group, handle, contexts in under_way:
        results = hvd.synchronize(handle)
        results = [results] if len(group) == 1 else results
        for index, result, context in zip(group, results, contexts, strict=True):
            reduced[index] = options.compression.decompress(result, context)
    return reduced


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def is_finite_everywhere(options: Options, finite: Any) -> Any:
    """Tell whether all ranks have finite gradients.

    Parameters
    ----------
    options
        Of the optimizer.
    finite
        Whether this rank has.

    Returns
    -------
    torch.Tensor
        A boolean.
    """
    process_set = options.process_set
    if not process_set.included() or process_set.size() == 1:
        return finite
    not_finite = hvd.allreduce(
        1.0 - torch.as_tensor(finite).float(),
        op=hvd.Sum,
        name=f"{options.name}.not_finite",
        process_set=process_set,
    )
    return not_finite == 0.0


def average(values: list[float], name: str, device: str) -> list[float]:
    """Average numbers over the ranks.

    Parameters
    ----------
    values
        This rank's.
    name
        The collective's.
    device
        Nothing: torch's tensors have one of their own.

    Returns
    -------
    list of float
        The averages.

    Raises
    ------
    ArgumentValueError
        If a device was asked for.
    """
    _require_no_device("device", device)
    tensor = torch.tensor(values, dtype=torch.float64)
    averages: list[float] = hvd.allreduce(tensor, op=hvd.Average, name=name).tolist()
    return averages


def broadcast(variables: Sequence[Any], root_rank: int, device: str) -> None:
    """Give every rank the root's values.

    Parameters
    ----------
    variables
        Keras variables or torch parameters.
    root_rank
        The rank that sends.
    device
        Nothing: torch's tensors have one of their own.

    Raises
    ------
    ArgumentValueError
        If a device was asked for.
    """
    _require_no_device("device", device)
    named = [
        (f"variable.{number}", _native(variable).data) for number, variable in enumerate(variables)
    ]
    hvd.broadcast_parameters(named, root_rank=root_rank)


def do_if(condition: bool, action: Callable[[], None]) -> None:
    """Do something if a condition holds.

    Parameters
    ----------
    condition
        Whether it does.
    action
        What to do.
    """
    if condition:
        action()


class Passes:
    """Sums of gradients over several batches."""

    def __init__(self) -> None:
        self._number = 0
        self._totals: dict[Hashable, Any] = {}

    def add(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Add one batch's gradients and give the sums.

        Parameters
        ----------
        grads, variables
            As for :func:`reduce`.

        Returns
        -------
        list of torch.Tensor or None
            The sums.
        """
        self._number += 1
        totals: list[Any] = []
        for grad, variable in zip(grads, variables, strict=True):
            total = self._totals.get(key(variable))
            if grad is not None:
                # The next batch's gradients are written where this one's are.
                total = grad.clone() if total is None else total + grad
                self._totals[key(variable)] = total
            totals.append(total)
        return totals

    def is_last_of(self, passes_per_step: int) -> bool:
        """Tell whether the batch that was added last completes a step.

        Parameters
        ----------
        passes_per_step
            Number of batches in a step.

        Returns
        -------
        bool
            Whether it does.
        """
        return self._number % passes_per_step == 0

    def clear(self) -> None:
        """Start the next sum."""
        self._totals.clear()
