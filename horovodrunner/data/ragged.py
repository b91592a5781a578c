"""Arrays of different lengths, one after the other. Runs in: every process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentValueError

__all__ = ["Ragged"]


@dataclass(frozen=True)
class Ragged:
    """What a batch has of an array column whose arrays differ in length.

    Parameters
    ----------
    values
        The arrays' elements, one array after the other: shape ``(total, ...)``, or a Ragged for
        arrays of arrays.
    offsets
        Where each array begins in `values`, and the last one's end: shape ``(batch + 1,)``.

    Examples
    --------
    >>> tokens = Ragged(np.array([5, 6, 7]), np.array([0, 2, 2, 3]))
    >>> len(tokens), tokens[0].tolist()
    (3, [5, 6])
    >>> tokens[1:].lengths.tolist()
    [0, 1]
    >>> tokens.padded().tolist()
    [[5, 6], [0, 0], [7, 0]]
    """

    values: Any
    offsets: Any

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            start, end, step = index.indices(len(self))
            if step != 1:
                raise ArgumentValueError(f"a Ragged has no slices with a step, got {step}")
            offsets = self.offsets[start : max(start, end) + 1]
            return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> Any:
        """The arrays' lengths, shape ``(batch,)``."""
        return self.offsets[1:] - self.offsets[:-1]

    def padded(self, length: int | None = None, fill: Any = 0) -> Any:
        """Make one array of NumPy values, cutting and filling up each of the arrays.

        Parameters
        ----------
        length
            How many elements each gets; None: as many as the longest has.
        fill
            What fills up shorter ones.

        Returns
        -------
        ndarray
            Shape ``(batch, length, ...)``.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If these are arrays of arrays, or tensors, or the length is no whole number.
        """
        values = self.values
        if not isinstance(values, np.ndarray):
            raise ArgumentValueError(
                f"padded() takes NumPy values and arrays of one level, not "
                f"{type(values).__name__}: use it in batch_transform, which sees NumPy arrays"
            )
        lengths = self.lengths
        if length is None:
            width = int(lengths.max(initial=0))
        else:
            width = checked.integer("length", length, at_least=0)
        result = np.full((len(self), width, *values.shape[1:]), fill, values.dtype)
        place = np.arange(width)
        is_there = place < lengths[:, None]
        result[is_there] = values[(self.offsets[:-1, None] + place)[is_there]]
        return result
