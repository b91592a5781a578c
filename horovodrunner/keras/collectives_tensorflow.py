"""Keras 3 on TensorFlow: gradients and weights over the ranks. Runs in: the worker.

Horovod names a collective after its operation in the graph, which can differ from rank to rank.
Every collective here has a name of its own and ``ignore_name_scope``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovodrunner.errors import ConfigurationError
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
        A Keras or a TensorFlow variable.

    Returns
    -------
    hashable
        The same for a Keras variable and the TensorFlow variable in it.
    """
    found: Hashable = _native(variable).ref()
    return found


def _native(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def refuse_compiled_graph() -> None:
    """Refuse to be part of a function that XLA compiles.

    Raises
    ------
    ConfigurationError
        If the caller is being traced for XLA.
    """
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise ConfigurationError(
            "a distributed optimizer is used inside a function compiled with XLA, which cannot "
            "contain Horovod's collectives: compile the model after DistributedOptimizer() was "
            "called, with jit_compile=False, or leave jit_compile out of the tf.function"
        )


def reduce(
    options: Options, grads: Sequence[Any], variables: Sequence[Any], local: Collection[Hashable]
) -> list[Any]:
    """Reduce gradients over the ranks.

    Parameters
    ----------
    options
        How.
    grads
        Tensors, IndexedSlices or None.
    variables
        What they are the gradients of.
    local
        Keys of the variables whose gradients stay the rank's own.

    Returns
    -------
    list
        The gradients to apply.
    """
    process_set = options.process_set
    if not process_set.included() or process_set.size() == 1:
        return list(grads)
    keys = [key(variable) for variable in variables]
    reduced = list(grads)
    dense: list[int] = []
    for index, grad in enumerate(grads):
        if grad is None:
            continue
        if keys[index] in local:
            if options.scales_local_gradients:
                reduced[index] = _divided(grad, process_set.size())
        elif isinstance(grad, tf.IndexedSlices) and not options.sparse_as_dense:
            reduced[index] = _reduce_sparse(options, grad, f"{options.name}.gradient.{index}")
        else:
            reduced[index] = tf.convert_to_tensor(grad)
            dense.append(index)
    settings = {
        "device_dense": options.device_dense,
        "compression": options.compression,
        "op": options.op,
        "process_set": process_set,
        "prescale_factor": 1.0 / options.gradient_predivide_factor,
        "postscale_factor": options.gradient_predivide_factor,
        "ignore_name_scope": True,
    }
    asked = options.groups
    if isinstance(asked, Sequence):
        asked = [[key(variable) for variable in group] for group in asked]
    for group in groups_of(asked, dense, keys):
        name = f"{options.name}.gradient.{group[0]}"
        if len(group) == 1:
            reduced[group[0]] = hvd.allreduce(reduced[group[0]], name=name, **settings)
            continue
        results = hvd.grouped_allreduce([reduced[i] for i in group], name=name, **settings)
        for index, result in zip(group, results, strict=True):
            reduced[index] = result
    return reduced


def _divided(grad: Any, number: int) -> Any:
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(grad.values / number, grad.indices, grad.dense_shape)
    return grad / number


def _reduce_sparse(options: Options, grad: Any, name: str) -> Any:
    """Gather the ranks' slices and add up those of one row.

    Adam and others square what they get, which is right for a row's sum only.
    """
    gather = {"process_set": options.process_set, "ignore_name_scope": True}
    values, context = options.compression.compress(grad.values)
    with tf.device(options.device_sparse):
        values = hvd.allgather(values, name=f"{name}.values", **gather)
        indices = hvd.allgather(grad.indices, name=f"{name}.indices", **gather)
        values = options.compression.decompress(values, context)
        rows, positions = tf.unique(indices)
        values = tf.math.unsorted_segment_sum(values, positions, tf.size(rows))
        if options.op == hvd.Average:
            values = values / tf.cast(options.process_set.size(), values.dtype)
    return tf.IndexedSlices(values, rows, dense_shape=grad.dense_shape)


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
    tf.Tensor
        A boolean.
    """
    process_set = options.process_set
    if not process_set.included() or process_set.size() == 1:
        return finite
    not_finite = hvd.allreduce(
        1.0 - tf.cast(finite, tf.float32),
        op=hvd.Sum,
        name=f"{options.name}.not_finite",
        process_set=process_set,
        ignore_name_scope=True,
    )
    return tf.equal(not_finite, 0.0)


def average(values: list[float], name: str, device: str) -> list[float]:
    """Average numbers over the ranks.

    Parameters
    ----------
    values
        This rank's.
    name
        The collective's.
    device
        Where, as in ``tf.device``.

    Returns
    -------
    list of float
        The averages.
    """
    with tf.device(device):
        tensor = tf.constant(values, dtype=tf.float64)
        averages: list[float] = hvd.allreduce(tensor, op=hvd.Average, name=name).numpy().tolist()
    return averages


def broadcast(variables: Sequence[Any], root_rank: int, device: str) -> None:
    """Give every rank the root's values.

    Parameters
    ----------
    variables
        Keras or TensorFlow variables.
    root_rank
        The rank that sends.
    device
        Where, as in ``tf.device``.
    """
    with tf.device(device):
        hvd.broadcast_variables([_native(variable) for variable in variables], root_rank=root_rank)


def do_if(condition: Any, action: Callable[[], None]) -> None:
    """Do something if a condition holds when the graph runs.

    Parameters
    ----------
    condition
        A boolean tensor.
    action
        What to do.
    """
    tf.cond(condition, action, lambda: None)


class Passes:
    """Sums of gradients over several batches.

    Keras knows nothing of these variables: a model is saved, and its optimizer's state counted,
    as if they were not there.
    """

    def __init__(self) -> None:
        with tf.init_scope():
            self._number = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._totals: dict[Hashable, Any] = {}

    def add(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Add one batch's gradients and give the sums.

        Parameters
        ----------
        grads, variables
            As for :func:`reduce`.

        Returns
        -------
        list of tf.Variable or None
            The sums.
        """
        totals: list[Any] = []
        self._number.assign_add(1)
        for grad, variable in zip(grads, variables, strict=True):
            if grad is None:
                totals.append(self._totals.get(key(variable)))
                continue
            total = self._total_for(variable, grad)
            total.assign_add(tf.convert_to_tensor(grad))
            totals.append(total)
        return totals

    def is_last_of(self, passes_per_step: int) -> Any:
        """Tell whether the batch that was added last completes a step.

        Parameters
        ----------
        passes_per_step
            Number of batches in a step.

        Returns
        -------
        tf.Tensor
            A boolean.
        """
        return tf.equal(self._number % passes_per_step, 0)

    def clear(self) -> None:
        """Start the next sum."""
        for total in self._totals.values():
            total.assign(tf.zeros_like(total))

    def _total_for(self, variable: Any, grad: Any) -> Any:
        found = key(variable)
        if found not in self._totals:
            with tf.init_scope():
                zeros = tf.zeros(variable.shape, grad.dtype)
                self._totals[found] = tf.Variable(zeros, trainable=False)
        return self._totals[found]
