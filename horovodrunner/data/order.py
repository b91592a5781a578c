"""Which row comes when, and how many batches each rank gets. Runs in: the worker.

Pure functions. An epoch is a sequence of positions 0, 1, 2, ...; a global batch is the next
``size * batch_size`` of them, and each rank takes its contiguous part. Which row stands at a
position depends on (seed, epoch, position) alone, so the ranks agree without a word, whatever
their number, and a position is all there is to remember for going on.

Shuffling takes two steps. The blocks (what was written as one piece) come in random order, and
within a window of consecutive blocks the rows do. Both are permutations computed from the index
with a keyed Feistel network, so nothing is stored however many rows there are; a network over a
domain that is no power of two is described by Black and Rogaway, "Ciphers with Arbitrary Finite
Domains" (CT-RSA 2002).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from horovodrunner.errors import DataError

__all__ = ["EpochOrder", "EpochSteps", "Remainder", "permuted"]

Remainder = Literal["drop", "pad", "share", "join"]

_Integers = NDArray[np.int64]
_HALF_ROUNDS = 6
_MASK = 2**64 - 1
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)  # the finalizer of splitmix64 (Steele et al., 2014)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_GAMMA = 0x9E3779B97F4A7C15
_SHIFT_1, _SHIFT_2, _HALF_WORD = np.uint64(30), np.uint64(27), np.uint64(32)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of each word, as splitmix64's finalizer does but for its last step."""
    words = (words ^ (words >> _SHIFT_1)) * _MULTIPLIER_1
    return np.asarray((words ^ (words >> _SHIFT_2)) * _MULTIPLIER_2)


@functools.lru_cache(maxsize=8)
def _network(count: int, *key: int) -> tuple[int, int, tuple[_Integers, ...]]:
    """Give the grid that holds `count` elements, and what each half round adds."""
    width = max(2, round(count**0.5))
    height = -(-count // width)
    state = np.zeros(1, np.uint64)
    for number in (count, *key):
        state = _mixed(state ^ np.uint64((number + 1) * _GAMMA & _MASK))
    tables = []
    for half_round in range(_HALF_ROUNDS):
        moves, stays = (height, width) if half_round % 2 == 0 else (width, height)
        state = _mixed(state + np.uint64(_GAMMA))
        words = _mixed(_mixed(np.arange(stays, dtype=np.uint64) + state))
        steps = ((words >> _HALF_WORD) * np.uint64(moves)) >> _HALF_WORD  # below `moves`
        tables.append(steps.astype(np.int64))
    return width, height, tuple(tables)


def permuted(indices: _Integers, count: int, *key: int) -> _Integers:
    """Give where a pseudo-random permutation of ``range(count)`` sends some of its elements.

    Parameters
    ----------
    indices
        Elements of ``range(count)``, in any number.
    count
        How many elements the permutation has.
    *key
        What chooses the permutation.

    Returns
    -------
    ndarray
        As many elements of ``range(count)``; different ones for different indices.

    Examples
    --------
    >>> sorted(permuted(np.arange(5), 5, 42).tolist())
    [0, 1, 2, 3, 4]
    """
    if count < 2:
        return indices
    found = _through_network(indices, count, *key)
    while (outside := np.flatnonzero(found >= count)).size:  # the grid has less than a row more
        found[outside] = _through_network(found[outside], count, *key)
    return found


def _through_network(elements: _Integers, count: int, *key: int) -> _Integers:
    width, height, tables = _network(count, *key)
    moving, still = np.divmod(elements, width)
    for half_round, table in enumerate(tables):
        side = np.uint64(height if half_round % 2 == 0 else width)
        moved = (moving + table.take(still)).view(np.uint64)
        # modulo `side`: what is below it already wraps around to a huge number
        moving = np.minimum(moved, moved - side).view(np.int64)
        moving, still = still, moving
    return np.asarray(moving * width + still)


class EpochOrder:
    """Which row stands at which position of one epoch.

    Parameters
    ----------
    block_rows
        How many rows each block has, in stored order.
    shuffle
        False gives the stored order.
    seed
        Together with the epoch it chooses the order.
    epoch
        The epoch's number.
    window_rows
        About so many consecutive rows, in whole blocks, are mixed with each other.

    Examples
    --------
    >>> order = EpochOrder([3, 2], shuffle=True, seed=1, epoch=0)
    >>> blocks, rows = order.locate(np.arange(5))
    >>> sorted(zip(blocks.tolist(), rows.tolist()))
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    """

    def __init__(
        self,
        block_rows: Sequence[int] | _Integers,
        *,
        shuffle: bool,
        seed: int = 0,
        epoch: int = 0,
        window_rows: int = 2**20,
    ) -> None:
        rows = np.asarray(block_rows, np.int64)
        self.rows = int(rows.sum())
        self._shuffle = shuffle
        self._key = (seed, epoch)
        self._blocks = np.arange(len(rows))
        if shuffle:
            self._blocks = permuted(self._blocks, len(rows), *self._key, -1)
        self._starts = np.concatenate([[0], np.cumsum(rows[self._blocks])])
        windows = max(1, round(self.rows / window_rows)) if shuffle else 1
        share = max(1, -(-self.rows // windows))
        window_of_block = self._starts[:-1] // share
        first_blocks = np.flatnonzero(np.diff(window_of_block, prepend=-1))
        self._window_starts = np.append(self._starts[first_blocks], self.rows)
        self.most_blocks_in_a_window = int(
            np.diff(np.append(first_blocks, len(rows))).max(initial=1)
        )

    def locate(self, positions: _Integers) -> tuple[_Integers, _Integers]:
        """Say where the rows of some positions are stored.

        Parameters
        ----------
        positions
            At least one, as :meth:`by_block` takes them.

        Returns
        -------
        tuple of ndarray and ndarray
            The block of each row, and its place in it.
        """
        found, chosen = self.by_block(positions)
        blocks = np.repeat([block for block, _ in found], [len(rows) for _, rows in found])
        return blocks[chosen], np.concatenate([rows for _, rows in found])[chosen]

    def by_block(self, positions: _Integers) -> tuple[list[tuple[int, _Integers]], _Integers]:
        """Say where the rows of some positions are stored, those of a block together.

        Parameters
        ----------
        positions
            Positions of this epoch, ascending; those from ``rows`` on mean its beginning again.

        Returns
        -------
        tuple of list and ndarray
            Blocks, each with the places of its rows, ascending; and for each position which one of
            all these rows it has.
        """
        turns = np.searchsorted(positions, np.arange(0, positions[-1] + 1, self.rows)).tolist()
        parts = enumerate(np.split(positions, turns[1:]))
        places = np.concatenate(
            [self._mixed_in_windows(each - turn * self.rows) for turn, each in parts]
        )
        # sorting numbers that carry their index is several times faster than argsort
        count = len(places)
        bits = count.bit_length()
        carrying = np.sort((places << bits) | np.arange(count))
        chosen = np.empty_like(places)
        chosen[carrying & ((1 << bits) - 1)] = np.arange(count)
        places = carrying >> bits
        first, end = np.searchsorted(self._starts, places[[0, -1]], side="right").tolist()
        borders = np.searchsorted(places, self._starts[first - 1 : end + 1]).tolist()
        found = []
        for index, (start, stop) in enumerate(itertools.pairwise(borders), first - 1):
            if start < stop:
                rows = places[start:stop] - self._starts[index]
                found.append((int(self._blocks[index]), rows))
        return found, chosen

    def _mixed_in_windows(self, positions: _Integers) -> _Integers:
        if not self._shuffle:
            return positions
        mixed = np.empty_like(positions)
        bounds = np.searchsorted(positions, self._window_starts)
        for window in np.flatnonzero(np.diff(bounds)).tolist():
            part = slice(bounds[window], bounds[window + 1])
            start, end = self._window_starts[window : window + 2].tolist()
            mixed[part] = start + permuted(positions[part] - start, end - start, *self._key, window)
        return mixed

    def runs(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Say where a range of positions is stored, when the order is the stored one.

        Parameters
        ----------
        start, end
            The range, without its end.

        Returns
        -------
        list of tuple
            Block, first row and end row of each piece, in order.
        """
        first, last = np.searchsorted(self._starts, [start, end - 1], side="right").tolist()
        found = []
        for index in range(first - 1, last):
            block_start, block_end = self._starts[index : index + 2].tolist()
            piece = max(start, block_start) - block_start, min(end, block_end) - block_start
            if piece[0] < piece[1]:
                found.append((index, *piece))
        return found


@dataclass(frozen=True)
class EpochSteps:
    """How the positions of one epoch, or of what is left of it, become one rank's batches.

    Parameters
    ----------
    rows
        Rows of the whole data set.
    batch_size
        Rows a batch of one rank has.
    rank, size
        This rank, and how many there are.
    remainder
        What becomes of the rows that fill no global batch. ``"drop"``: they are left out.
        ``"pad"``: the last batch is filled up with rows from the epoch's beginning. ``"share"``:
        they are shared out evenly in a last, shorter batch; where there are fewer of them than
        ranks, several ranks get the same row. ``"join"``: the same, but ranks that get no row of
        their own have one batch less and call ``hvd.join()``.
    start
        Position at which this epoch goes on.

    Raises
    ------
    DataError
        If there are fewer rows than ranks, or not one whole batch when the rest is dropped.

    Examples
    --------
    >>> steps = EpochSteps(rows=10, batch_size=2, rank=1, size=2, remainder="join")
    >>> [steps.positions(step) for step in range(len(steps))]
    [(2, 4), (6, 8), (9, 10)]
    """

    rows: int
    batch_size: int
    rank: int
    size: int
    remainder: Remainder
    start: int = 0

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
        if self.remainder in ("pad", "share"):
            return self.whole + 1
        return self.whole + (self.left_over > self.rank)

    def positions(self, step: int) -> tuple[int, int]:
        """Give the positions of one batch of this rank.

        Parameters
        ----------
        step
            The batch's number, from 0.

        Returns
        -------
        tuple of int and int
            First position and end. Those from ``rows`` on, which ``"pad"`` gives, mean the
            epoch's beginning again.
        """
        base = self.start + step * self.global_batch
        if step < self.whole or self.remainder == "pad":
            first = base + self.rank * self.batch_size
            return first, first + self.batch_size
        share, extra = divmod(self.left_over, self.size)
        if not share and self.remainder == "share":
            first = base + self.rank % extra
            return first, first + 1
        first = base + self.rank * share + min(self.rank, extra)
        return first, first + share + (self.rank < extra)

    def position_after(self, batches: int) -> int:
        """Give the position at which all ranks go on after so many batches.

        Parameters
        ----------
        batches
            How many batches of this epoch this rank has had, from `start`.

        Returns
        -------
        int
            At most ``rows``.
        """
        return min(self.rows, self.start + batches * self.global_batch)

    def in_words(self) -> str:
        """Describe the epoch, for the log.

        Returns
        -------
        str
            A sentence.
        """
        ranks = "1 rank" if self.size == 1 else f"{self.size:,} ranks"
        text = f"{self.rows:,} rows for {ranks} in batches of {self.batch_size:,}"
        whole = EpochSteps(self.rows, self.batch_size, 0, self.size, self.remainder)
        text += f": {len(whole):,} batch{'es' if len(whole) > 1 else ''} a rank and epoch"
        if not whole.left_over:
            return text
        rest = f"{whole.left_over:,} row{'s are' if whole.left_over > 1 else ' is'}"
        if self.remainder == "drop":
            return f"{text}; {rest} left out of each epoch"
        if self.remainder == "pad":
            return f"{text}; {whole.global_batch - whole.left_over:,} rows come twice"
        fewer = self.size - whole.left_over
        last = f"{text}; the last one is shorter"
        if self.remainder == "share":
            return last + (", and some ranks repeat a row in it" if fewer > 0 else "")
        return last + (f", and {fewer:,} ranks have none" if fewer > 0 else "")
