"""Rows as Spark gives them, and the batches a model gets. Runs in: Spark's Python workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from horovodrunner.inference.inputs import InputError

__all__ = ["Arrays", "Batch", "Piece", "expanded", "rebatched"]

Arrays = tuple[np.ndarray, ...]


@dataclass
class Piece:
    """Rows that came together from Spark, and go back together.

    Parameters
    ----------
    batch
        The rows.
    before
        Rows of the partition that came before them.
    first
        Number of its first good row among all good rows: those that reach the model.
    good
        Which of its rows are; None: all.
    reasons
        What is wrong with the others, by row; rows that are left out as null have no reason.
    """

    batch: pa.RecordBatch
    before: int
    first: int
    good: np.ndarray | None = None
    reasons: dict[int, str] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Number of the good row after its last one."""
        return self.first + (self.batch.num_rows if self.good is None else len(self.good))

    def row_of(self, number: int) -> int:
        """Find a good row.

        Parameters
        ----------
        number
            Its number among all good rows.

        Returns
        -------
        int
            Its place in the batch.
        """
        place = number - self.first
        return place if self.good is None else int(self.good[place])


@dataclass
class Batch:
    """What the model gets at once.

    Parameters
    ----------
    inputs
        The model's inputs, each of all kept rows.
    rows
        Rows of the batch.
    kept
        Which of them are in the inputs; None: all.
    reasons
        What is wrong with the others, by row.
    """

    inputs: Arrays
    rows: int
    kept: np.ndarray | None = None
    reasons: dict[int, str] = field(default_factory=dict)


def rebatched(
    stretches: Iterable[Arrays], size: int, *, may_differ: bool = False
) -> Iterator[Arrays]:
    """Cut rows into batches, whatever the borders they came with.

    Parameters
    ----------
    stretches
        Arrays of rows, as many rows in each array of one stretch.
    size
        Rows in a batch.
    may_differ
        Whether a batch ends early where the shape of an input changes.

    Yields
    ------
    tuple of numpy.ndarray
        Batches of exactly that size, but for the last one. Views where they lie in one stretch.

    Raises
    ------
    InputError
        If rows of different stretches have different shapes, and may not.

    Examples
    --------
    >>> [len(each) for (each,) in rebatched([(np.zeros(5),), (np.zeros(2),)], 3)]
    [3, 3, 1]
    """
    held: list[Arrays] = []
    missing = size
    for arrays in stretches:
        rows = len(arrays[0])
        start = 0
        if held and may_differ and _shapes(held[0]) != _shapes(arrays):
            yield _joined(held)
            held, missing = [], size
        if held:
            start = min(missing, rows)
            held.append(tuple(each[:start] for each in arrays))
            missing -= start
            if missing:
                continue
            yield _joined(held)
            held, missing = [], size
        while rows - start >= size:
            yield tuple(each[start : start + size] for each in arrays)
            start += size
        if start < rows:
            held, missing = [tuple(each[start:] for each in arrays)], size - (rows - start)
    if held:
        yield _joined(held)


def _shapes(arrays: Arrays) -> list[tuple[int, ...]]:
    return [each.shape[1:] for each in arrays]


def _joined(parts: Sequence[Arrays]) -> Arrays:
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
    """Put values of some rows in their places among all rows.

    Parameters
    ----------
    values
        One value for each of the places.
    places
        Their rows, ascending.
    rows
        How many rows there are.

    Returns
    -------
    pyarrow.Array
        With null in all other rows.

    Examples
    --------
    >>> expanded(pa.array([5, 6]), np.array([0, 2]), 3).to_pylist()
    [5, None, 6]
    """
    taken = np.zeros(rows, np.int64)
    taken[places] = np.arange(len(places))
    absent = np.ones(rows, bool)
    absent[places] = False
    return values.take(pa.array(taken, mask=absent))
