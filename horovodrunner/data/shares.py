"""Rows dealt out to the ranks beforehand: who gets how many, and equal steps.

Runs in: every process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from horovodrunner.data.order import EpochSteps
from horovodrunner.errors import DataError

__all__ = ["OwnRowsSteps", "dealt", "first_target"]


def first_target(part: int, targets: int) -> int:
    """Say who gets the first row of a part, so that few rows in many parts go to all in turn.

    Parameters
    ----------
    part
        The part's number.
    targets
        How many there are to deal to.

    Returns
    -------
    int
        The target.

    Examples
    --------
    >>> [first_target(part, 3) for part in range(9)]
    [0, 1, 2, 1, 2, 0, 2, 0, 1]
    """
    # Without the second term, a DataFrame with rows in every `targets`-th part would go to one.
    return (part + part // targets) % targets


def dealt(first: int, count: int, targets: int) -> list[int]:
    """Count what everybody gets when rows are dealt out like cards.

    Parameters
    ----------
    first
        Who gets the first row.
    count
        How many rows.
    targets
        How many there are to deal to.

    Returns
    -------
    list of int
        Rows by target.

    Examples
    --------
    >>> dealt(first=2, count=5, targets=3)
    [2, 1, 2]
    """
    each, extra = divmod(count, targets)
    return [each + ((target - first) % targets < extra) for target in range(targets)]


@dataclass(frozen=True)
class OwnRowsSteps(EpochSteps):
    """How a rank's own rows become its batches, as many as every other rank has.

    Of this rank's rows it is rank 0 of 1.

    Parameters
    ----------
    shares
        How many rows each rank has.

    Raises
    ------
    DataError
        If a rank has no rows, or not one whole batch when the rest is dropped.

    Examples
    --------
    >>> [
    ...     len(OwnRowsSteps(rows, 2, 0, 1, "drop", shares=(7, 5))) for rows in (7, 5)
    ... ]
    [2, 2]
    """

    shares: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        least, ranks = min(self.shares), len(self.shares)
        if least == 0:
            raise DataError(
                f"rank {self.shares.index(0)} has no rows: the {sum(self.shares)} rows of the data "
                f"set are shared out as {_listed(self.shares)}, and every one of the {ranks} ranks "
                "needs at least one. Use fewer ranks or more data"
            )
        if self.remainder == "drop" and least < self.batch_size:
            raise DataError(
                f"rank {self.shares.index(least)} has {least} rows of its own, fewer than "
                f"batch_size={self.batch_size}, so that remainder='drop' leaves nothing: use a "
                "smaller batch_size, or remainder='pad'"
            )

    @property
    def whole(self) -> int:
        """Steps in which this rank has a whole batch of rows that were not seen yet."""
        rows = min(self.shares) if self.remainder == "drop" else self.rows
        return max(0, rows - self.start) // self.batch_size

    def __len__(self) -> int:
        if self.remainder == "drop":
            return self.whole
        rows = max(self.shares) if self.remainder in ("pad", "share") else self.rows
        return math.ceil(max(0, rows - self.start) / self.batch_size)

    def positions(self, step: int) -> tuple[int, int]:
        """Give the positions of one batch of this rank.

        Parameters
        ----------
        step
            The batch's number, from 0.

        Returns
        -------
        tuple of int and int
            First position and end. Those from ``rows`` on, which ``"pad"`` and ``"share"`` give,
            mean the epoch's beginning again.
        """
        first = self.start + step * self.batch_size
        end = first + self.batch_size
        if self.remainder == "pad":
            return first, end
        return first, max(first + 1, min(end, self.rows))

    def position_after(self, batches: int) -> int:
        """Give the position, the same on every rank, at which it goes on after so many batches.

        Parameters
        ----------
        batches
            How many batches of this epoch there were, from `start`.

        Returns
        -------
        int
            At most the rows of the rank that has most.
        """
        return min(max(self.shares), self.start + batches * self.batch_size)

    def in_words(self) -> str:
        """Describe the epoch, for the log.

        Returns
        -------
        str
            A sentence.
        """
        least, most = min(self.shares), max(self.shares)
        each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        ranks = "1 rank" if len(self.shares) == 1 else f"each of {len(self.shares):,} ranks"
        text = (
            f"{sum(self.shares):,} rows, {each} of them on {ranks}, in batches of "
            f"{self.batch_size:,}"
        )
        fewest, largest = least // self.batch_size, -(-most // self.batch_size)
        if self.remainder == "drop":
            left = sum(self.shares) - fewest * self.batch_size * len(self.shares)
            rest = f"; {left:,} rows are left out of each epoch" if left else ""
            return f"{text}: {fewest:,} batches a rank and epoch{rest}"
        if self.remainder == "share":
            return f"{text}: {largest:,} batches a rank and epoch; the last one may be shorter"
        if self.remainder == "pad":
            twice = largest * self.batch_size * len(self.shares) - sum(self.shares)
            rest = f"; {twice:,} rows come twice" if twice else ""
            return f"{text}: {largest:,} batches a rank and epoch{rest}"
        fewest = -(-least // self.batch_size)
        counts = f"{largest:,}" if fewest == largest else f"{fewest:,} to {largest:,}"
        return f"{text}: {counts} batches a rank and epoch; a rank's last one may be shorter"


def _listed(shares: tuple[int, ...]) -> str:
    shown = ", ".join(f"{each:,}" for each in shares[:16])
    return shown + (", ..." if len(shares) > 16 else "")
