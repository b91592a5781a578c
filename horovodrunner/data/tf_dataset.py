"""Batches as a tf.data.Dataset. Runs in: the worker."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import tensorflow as tf

from horovodrunner.data.batches import Batches
from horovodrunner.data.columns import Column
from horovodrunner.data.formats import nested
from horovodrunner.data.ragged import Ragged
from horovodrunner.processes.worker.endless import refuse_without_end

__all__ = ["refuse_a_digest", "tf_dataset"]

STEPS_AT_ONCE = 16
"""So many batches go to TensorFlow in one call, where they have the same shape."""


def tf_dataset(batches: Batches[Any], prefetch: int) -> tf.data.Dataset:
    """Make a dataset of batches of NumPy arrays; each iteration is the next epoch."""
    columns = batches.columns
    rows = batches.rows_of_every_batch
    if columns is None:  # what a transform has made
        signature = tf.nest.map_structure(lambda array: _spec_of(array, rows), batches.first())
    else:
        signature = nested({each.name: _spec(each, rows) for each in columns}, columns)
    specs = tf.nest.flatten(signature)
    if rows is not None and all(isinstance(each, tf.TensorSpec) for each in specs):
        stacked = tf.nest.map_structure(
            lambda spec: tf.TensorSpec([None, *spec.shape], spec.dtype), signature
        )
        dataset = tf.data.Dataset.from_generator(
            lambda: _stacked(_epoch(batches)), output_signature=stacked
        ).unbatch()
    else:
        dataset = tf.data.Dataset.from_generator(
            lambda: map(_tensors, _epoch(batches)), output_signature=signature
        )
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(batches)))
    return dataset.prefetch(prefetch) if prefetch else dataset


def _epoch(batches: Batches[Any]) -> Iterator[Any]:
    refuse_a_digest()
    yield from batches


def refuse_a_digest() -> None:
    """Fail if MLflow is just computing a digest of a dataset without end, for which it never ends.

    Its autologging does so before training, and goes on with a warning where that fails. A dataset
    that was made of ours, with ``map`` say, has nothing of ours. But the rows come from here, in a
    thread of TensorFlow's, while MLflow waits for them in another one.
    """
    if "mlflow.data" not in sys.modules:
        return
    for frame in _frames_of_a_digest():
        refuse_without_end(*frame.f_locals.values())


def _frames_of_a_digest() -> Iterator[FrameType]:
    for top in sys._current_frames().values():
        frame: FrameType | None = top
        while frame is not None:
            if str(frame.f_globals.get("__name__")).startswith("mlflow.data."):
                yield frame
            frame = frame.f_back


def _spec_of(value: Any, rows: int | None) -> Any:
    """Describe what a transform has made of a column."""
    if isinstance(value, Ragged):
        return tf.type_spec_from_value(_tensors(value))
    array = _plain(np.asarray(value))
    return tf.TensorSpec(
        [rows, *array.shape[1:]], tf.string if array.dtype.kind in "OUS" else array.dtype
    )


def _dtype(column: Column) -> Any:
    if column.kind != "number":
        return tf.string
    return tf.int64 if column.dtype.startswith(("datetime", "timedelta")) else column.dtype


def _spec(column: Column, batch_size: int | None) -> Any:
    levels = len(column.dims)
    ragged = max((at + 1 for at in range(levels) if column.dims[at] is None), default=0)
    if ragged:
        shape = [batch_size, *([None] * ragged), *column.dims[ragged:]]
        return tf.RaggedTensorSpec(shape, _dtype(column), ragged, tf.int64)
    return tf.TensorSpec([batch_size, *column.dims], _dtype(column))


def _tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tensors(each) for name, each in value.items()}
    if isinstance(value, Ragged):
        return tf.RaggedTensor.from_row_splits(_tensors(value.values), value.offsets)
    return _plain(value)


def _plain(array: Any) -> Any:
    """Return what TensorFlow takes for an array: dates become days, timestamps microseconds."""
    return array.view(np.int64) if array.dtype.kind in "mM" else array


def _stacked(batches: Iterator[Any]) -> Iterator[Any]:
    while group := list(itertools.islice(batches, STEPS_AT_ONCE)):
        yield tf.nest.map_structure(lambda *each: np.stack([_plain(a) for a in each]), *group)
