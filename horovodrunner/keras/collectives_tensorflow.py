"""Keras 3 on TensorFlow: gradients and weights over the ranks. Runs in: the worker.

Horovod names a collective after its operation in the graph, which can differ from rank to rank.
Every collective here has a name of its own and ``ignore_name_scope``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from horovodrunner.errors import ConfigurationError
from horovodrunner.keras.options import Options, key, native


def refuse_compiled_graph() -> None:
    """Refuse to be part of a function that XLA compiles."""
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
    """Reduce gradients over the ranks, but those of the variables whose keys are in `local`."""
    reduced = list(grads)
    if options.has_no_peers():
        return reduced
    dense: list[int] = []
    for index in options.without_local(reduced, variables, local, _divided):
        grad = reduced[index]
        if isinstance(grad, tf.IndexedSlices) and not options.sparse_as_dense:
            reduced[index] = _reduce_sparse(options, grad, f"{options.name}.gradient.{index}")
        else:
            reduced[index] = tf.convert_to_tensor(grad)
            dense.append(index)
    settings = {
        **options.settings(),
        "device_dense": options.device_dense,
        "compression": options.compression,
        "ignore_name_scope": True,
    }
    for group in options.grouped(dense, variables):
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
    """Return whether the gradients of all ranks are finite, as a boolean tensor."""
    if options.has_no_peers():
        return finite
    not_finite = hvd.allreduce(
        1.0 - tf.cast(finite, tf.float32),
        op=hvd.Sum,
        name=f"{options.name}.not_finite",
        process_set=options.process_set,
        ignore_name_scope=True,
    )
    return tf.equal(not_finite, 0.0)


def average(values: list[float], name: str, device: str) -> list[float]:
    with tf.device(device):
        tensor = tf.constant(values, dtype=tf.float64)
        averages: list[float] = hvd.allreduce(tensor, op=hvd.Average, name=name).numpy().tolist()
    return averages


def broadcast(variables: Sequence[Any], root_rank: int, device: str) -> None:
    with tf.device(device):
        hvd.broadcast_variables([native(variable) for variable in variables], root_rank=root_rank)


def do_if(condition: Any, action: Callable[[], None]) -> None:
    """Run an action if a boolean tensor is true when the graph runs."""
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
        """Add one batch's gradients and return the sums, None where there was none so far."""
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
        """Return whether the batch that was added last completes a step, as a boolean tensor."""
        return tf.equal(self._number % passes_per_step, 0)

    def clear(self) -> None:
        for total in self._totals.values():
            total.assign(tf.zeros_like(total))

    def _total_for(self, variable: Any, grad: Any) -> Any:
        found = key(variable)
        if found not in self._totals:
            with tf.init_scope():
                zeros = tf.zeros(variable.shape, grad.dtype)
                self._totals[found] = tf.Variable(zeros, trainable=False)
        return self._totals[found]
