"""Which row comes when. Runs in: the worker.

An epoch is a sequence of positions 0, 1, 2, ... Which row stands at a position depends on (seed,
epoch, position) alone, so the ranks agree without a word, whatever their number, and a position is
all there is to remember for going on.

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

import numpy as np
from numpy.typing import NDArray

__all__ = ["EpochOrder", "permuted"]

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
    """Return the grid that holds `count` elements, and what each half round adds."""
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
    """Return where a pseudo-random permutation of ``range(count)`` sends some of its elements.

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

    About `window_rows` consecutive rows, in whole blocks, are mixed with each other.
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

    def by_block(self, positions: _Integers) -> tuple[list[tuple[int, _Integers]], _Integers]:
        """Return where the rows of some positions are stored, those of a block together.

        Positions ascend; those from ``rows`` on mean the epoch's beginning again. Returns blocks,
        each with the places of its rows, ascending; and for each position which of all these rows
        it has.
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
