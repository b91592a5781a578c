"""Rows as Spark sends them, and the batches a model gets. Runs in: Spark's Python workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from horovodrunner.inference.inputs import InputError

__all__ = ["Arrays", "Batch", "Piece", "expanded", "joined", "rebatched", "row_shapes"]

Arrays = tuple[np.ndarray, ...]
"""As many rows in each of them."""


@dataclass
class Piece:
    """Rows that came together from Spark, and go back together."""

    batch: pa.RecordBatch
    start: int
    """Number of the first row in the partition."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Why rows cannot be scored, by their number in the partition."""

    @property
    def stop(self) -> int:
        return self.start + len(self.batch)


@dataclass
class Batch:
    """What the model gets at once."""

    numbers: np.ndarray
    """The rows' numbers in the partition, ascending."""
    inputs: Arrays
    reasons: dict[int, str] = field(default_factory=dict)
    """Why further rows cannot be scored, by their number."""

    @property
    def stop(self) -> int:
        last = int(self.numbers[-1]) if len(self.numbers) else -1
        return 1 + max([last, *self.reasons])


def rebatched(
    stretches: Iterable[Arrays], size: int, *, may_differ: bool = False
) -> Iterator[Arrays]:
    """Cut rows into batches of one size, whatever the borders they came with.

    The last batch may be shorter and, with `may_differ`, one before the shape of a row changes.

    >>> [len(each) for (each,) in rebatched([(np.zeros(5),), (np.zeros(2),)], 3)]
    [3, 3, 1]
    """
    held: list[Arrays] = []
    count = 0
    for arrays in stretches:
        rows = len(arrays[0])
        if held and may_differ and row_shapes(held[0]) != row_shapes(arrays):
            yield joined(held)
            held, count = [], 0
        start = 0
        while count + rows - start >= size:
            stop = start + size - count
            held.append(cut(arrays, slice(start, stop)))
            yield joined(held)
            held, count, start = [], 0, stop
        if start < rows:
            held.append(cut(arrays, slice(start, None)))
            count += rows - start
    if held:
        yield joined(held)


def cut(arrays: Arrays, part: slice) -> Arrays:
    return tuple(each[part] for each in arrays)


def row_shapes(arrays: Arrays) -> tuple[tuple[int, ...], ...]:
    return tuple(each.shape[1:] for each in arrays)


def joined(parts: Sequence[Arrays]) -> Arrays:
    if len(parts) == 1:
        return parts[0]
    for each in zip(*parts, strict=True):
        shapes = {array.shape[1:] for array in each}
        if len(shapes) > 1:
            raise InputError(
                f"rows of an input have different shapes, {' and '.join(map(str, sorted(shapes)))}"
                ": give input_tensor_shapes, so that those with another shape are found"
            )
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))


def expanded(values: pa.Array, places: np.ndarray, rows: int) -> pa.Array:
    """Put values into their places among all rows, and null into the others.

    >>> expanded(pa.array([5, 6]), np.array([0, 2]), 3).to_pylist()
    [5, None, 6]
    """
    taken = np.zeros(rows, np.int64)
    taken[places] = np.arange(len(places))
    absent = np.ones(rows, bool)
    absent[places] = False
    return values.take(pa.array(taken, mask=absent))
