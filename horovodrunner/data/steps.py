"""How many batches each rank gets, and of which rows. Runs in: the worker.

A global batch is the next ``size * batch_size`` positions of an epoch, and each rank takes its
contiguous part. Rows that were distributed beforehand have positions on each rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from horovodrunner.errors import DataError

__all__ = ["EpochSteps", "OwnRowsSteps", "Remainder"]

Remainder = Literal["drop", "pad", "split", "uneven"]


@dataclass(frozen=True)
class EpochSteps:
    """How the positions of one epoch, or of what is left of it, become one rank's batches.

    :class:`~horovodrunner.data.DataSet` says what becomes of the `remainder`.

    Examples
    --------
    >>> steps = EpochSteps(rows=10, batch_size=2, rank=1, size=2, remainder="uneven")
    >>> [steps.positions(step) for step in range(len(steps))]
    [(2, 4), (6, 8), (9, 10)]
    """

    rows: int
    """Of the whole data set."""
    batch_size: int
    """Rows of one rank's batch."""
    rank: int
    size: int
    remainder: Remainder
    start: int = 0
    """Position at which this epoch goes on."""

    def __post_init__(self) -> None:
        if self.rows < self.size:
            raise DataError(
                f"the data set has {self.rows} rows, fewer than the {self.size} ranks: every rank "
                "needs at least one. Use fewer ranks or more data"
            )
        if self.remainder == "drop" and self.rows < self.global_batch:
            raise DataError(
                f"the data set has {self.rows} rows, and {self.size} ranks with "
                f"batch_size={self.batch_size} take {self.global_batch} at once, so that "
                "remainder='drop' leaves nothing: use a smaller batch_size, or remainder='pad'"
            )

    @property
    def global_batch(self) -> int:
        """Rows that all ranks together take in one step."""
        return self.batch_size * self.size

    @property
    def left_over(self) -> int:
        """Rows that fill no global batch."""
        return max(0, self.rows - self.start) % self.global_batch

    @property
    def whole(self) -> int:
        """Steps in which every rank has a whole batch of rows that were not seen yet."""
        return max(0, self.rows - self.start) // self.global_batch

    def __len__(self) -> int:
        if self.remainder == "drop" or not self.left_over:
            return self.whole
        if self.remainder == "uneven":
            return self.whole + (self.left_over > self.rank)
        return self.whole + 1

    def positions(self, step: int) -> tuple[int, int]:
        """Return the first position and the end of one batch of this rank.

        Positions from ``rows`` on, in a padded batch, mean the epoch's beginning again.
        """
        base = self.start + step * self.global_batch
        if step < self.whole or self.remainder == "pad":
            first = base + self.rank * self.batch_size
            return first, first + self.batch_size
        each, extra = divmod(self.left_over, self.size)
        if not each and self.remainder == "split":
            first = base + self.rank % extra
            return first, first + 1
        first = base + self.rank * each + min(self.rank, extra)
        return first, first + each + (self.rank < extra)

    def position_after(self, batches: int) -> int:
        """Return the position at which all ranks go on after so many batches from `start`."""
        return min(self.rows, self.start + batches * self.global_batch)

    def summary(self) -> str:
        """Describe the whole epoch, for the log."""
        ranks = "1 rank" if self.size == 1 else f"{self.size:,} ranks"
        whole = EpochSteps(self.rows, self.batch_size, 0, self.size, self.remainder)
        batches = f"{len(whole):,} batch{'es' if len(whole) > 1 else ''}"
        text = (
            f"{self.rows:,} rows for {ranks} in batches of {self.batch_size:,}: {batches} a rank "
            "and epoch"
        )
        if not whole.left_over:
            return text
        if self.remainder == "drop":
            rest = f"{whole.left_over:,} row{'s are' if whole.left_over > 1 else ' is'}"
            return f"{text}; {rest} left out of each epoch"
        if self.remainder == "pad":
            return f"{text}; {whole.global_batch - whole.left_over:,} rows come twice"
        text += "; the last one is shorter"
        without_row = max(0, self.size - whole.left_over)
        if not without_row:
            return text
        if self.remainder == "split":
            return f"{text}, and some ranks repeat a row in it"
        return f"{text}, and {without_row:,} ranks have none"


@dataclass(frozen=True)
class OwnRowsSteps(EpochSteps):
    """How a rank's own rows become its batches, as many as every other rank has.

    Of its own rows, each rank is rank 0 of 1.

    Examples
    --------
    >>> [
    ...     len(OwnRowsSteps(rows, 2, 0, 1, "drop", rows_per_rank=(7, 5))) for rows in (7, 5)
    ... ]
    [2, 2]
    """

    rows_per_rank: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        fewest, ranks = min(self.rows_per_rank), len(self.rows_per_rank)
        if fewest == 0:
            shown = [f"{each:,}" for each in self.rows_per_rank[:16]]
            shown += ["..."] if ranks > 16 else []
            raise DataError(
                f"rank {self.rows_per_rank.index(0)} has no rows: the {sum(self.rows_per_rank)} "
                f"rows of the data set are shared out as {', '.join(shown)}, and every one of the "
                f"{ranks} ranks needs at least one. Use fewer ranks or more data"
            )
        if self.remainder == "drop" and fewest < self.batch_size:
            raise DataError(
                f"rank {self.rows_per_rank.index(fewest)} has {fewest} rows of its own, fewer than "
                f"batch_size={self.batch_size}, so that remainder='drop' leaves nothing: use a "
                "smaller batch_size, or remainder='pad'"
            )

    @property
    def whole(self) -> int:
        """Steps in which this rank has a whole batch of rows that were not seen yet."""
        rows = min(self.rows_per_rank) if self.remainder == "drop" else self.rows
        return max(0, rows - self.start) // self.batch_size

    def __len__(self) -> int:
        if self.remainder == "drop":
            return self.whole
        rows = self.rows if self.remainder == "uneven" else max(self.rows_per_rank)
        return math.ceil(max(0, rows - self.start) / self.batch_size)

    def positions(self, step: int) -> tuple[int, int]:
        """Return the first position and the end of one batch of this rank.

        Positions from ``rows`` on mean the epoch's beginning again.
        """
        first = self.start + step * self.batch_size
        end = first + self.batch_size
        if self.remainder == "pad":
            return first, end
        return first, max(first + 1, min(end, self.rows))

    def position_after(self, batches: int) -> int:
        """Return the position, the same on every rank, at which it goes on."""
        return min(max(self.rows_per_rank), self.start + batches * self.batch_size)

    def summary(self) -> str:
        """Describe the whole epoch, for the log."""
        rows, size = sum(self.rows_per_rank), len(self.rows_per_rank)
        fewest, most = min(self.rows_per_rank), max(self.rows_per_rank)
        each = _range(fewest, most)
        ranks = "1 rank" if size == 1 else f"each of {size:,} ranks"
        text = f"{rows:,} rows, {each} of them on {ranks}, in batches of {self.batch_size:,}"
        batches = math.ceil(most / self.batch_size)
        counts, rest = f"{batches:,}", ""
        if self.remainder == "drop":
            counts = f"{fewest // self.batch_size:,}"
            left_out = rows - fewest // self.batch_size * self.batch_size * size
            rest = f"; {left_out:,} rows are left out of each epoch" if left_out else ""
        elif self.remainder == "pad":
            twice = batches * self.batch_size * size - rows
            rest = f"; {twice:,} rows come twice" if twice else ""
        elif self.remainder == "split":
            rest = "; the last one may be shorter"
        else:
            counts = _range(math.ceil(fewest / self.batch_size), batches)
            rest = "; a rank's last one may be shorter"
        return f"{text}: {counts} batches a rank and epoch{rest}"


def _range(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
