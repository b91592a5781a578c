"""Keras 3 on torch: gradients and weights over the ranks. Runs in: the worker."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import horovod.torch as hvd
import torch

from horovodrunner.errors import ArgumentValueError
from horovodrunner.keras.options import Options, key, native


def refuse_compiled_graph() -> None:
    """Refuse nothing: torch.compile leaves to Python what it cannot compile."""


def _require_no_device(name: str, device: str) -> None:
    if device:
        raise ArgumentValueError(
            f"{name}={device!r}: Keras uses torch, where a tensor is reduced on its own device"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def reduce(
    options: Options, grads: Sequence[Any], variables: Sequence[Any], local: Collection[Hashable]
) -> list[Any]:
    """Reduce gradients over the ranks, but those of the variables whose keys are in `local`."""
    _require_no_device("device_dense", options.device_dense)
    _require_no_device("device_sparse", options.device_sparse)
    reduced = list(grads)
    if options.has_no_peers():
        return reduced
    shared = options.without_local(reduced, variables, local, operator.truediv)
    settings = options.settings()
    under_way = []
    for group in options.grouped(shared, variables):
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
    """Return whether the gradients of all ranks are finite, as a boolean tensor."""
    if options.has_no_peers():
        return finite
    not_finite = hvd.allreduce(
        1.0 - torch.as_tensor(finite).float(),
        op=hvd.Sum,
        name=f"{options.name}.not_finite",
        process_set=options.process_set,
    )
    return not_finite == 0.0


def average(values: list[float], name: str, device: str) -> list[float]:
    _require_no_device("device", device)
    tensor = torch.tensor(values, dtype=torch.float64)
    averages: list[float] = hvd.allreduce(tensor, op=hvd.Average, name=name).tolist()
    return averages


def broadcast(variables: Sequence[Any], root_rank: int, device: str) -> None:
    _require_no_device("device", device)
    named = [
        (f"variable.{number}", native(variable).data) for number, variable in enumerate(variables)
    ]
    hvd.broadcast_parameters(named, root_rank=root_rank)


def do_if(condition: bool, action: Callable[[], None]) -> None:
    if condition:
        action()


class Passes:
    """Sums of gradients over several batches."""

    def __init__(self) -> None:
        self._number = 0
        self._totals: dict[Hashable, Any] = {}

    def add(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Add one batch's gradients and return the sums, None where there was none so far."""
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
        """Return whether the batch that was added last completes a step."""
        return self._number % passes_per_step == 0

    def clear(self) -> None:
        self._totals.clear()
