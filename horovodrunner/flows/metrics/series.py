"""Many points in little memory. Runs in: the driver."""

from __future__ import annotations

import copy
import math
import random
from array import array
from collections.abc import Iterator, Mapping
from itertools import compress

from horovodrunner.flows.metrics.records import Point

__all__ = ["Moments", "PointTable", "RankSummary"]

_FACTOR, _MODULUS = 0x9E3779B97F4A7C15, 2**61 - 1
"""They mix a step's number: main may report odd steps only, or each 50th."""


class PointTable:
    """Points in columns; of a point that has no number of a name, that column has no entry.

    When there are more than `most` (an even number), one of each two is left out, and from then on
    one of each two that come, and so on. Chance says which: what alternates, such as two names or
    two ranks, is kept alike. The extremes and the last number of every name are kept apart.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._chance = random.Random(0)  # noqa: S311 - the same each time
        self._next = 0
        self._steps, self._times = array("q"), array("d")
        self._ranks, self._attempts = array("i"), array("i")
        self._columns: dict[str, tuple[array[int], array[float]]] = {}
        self._every = 1
        self._seen = 0
        self._last: Point | None = None
        self._extremes: dict[str, tuple[Point, Point]] = {}
        self._latest: dict[str, tuple[int, float]] = {}

    def __len__(self) -> int:
        """Return how many points are kept."""
        return len(self._steps)

    @property
    def every(self) -> int:
        """1 while all points are kept, 2 when one of two is, and so on."""
        return self._every

    @property
    def seen(self) -> int:
        """Return how many points have come."""
        return self._seen

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all numbers, in the order in which they first came."""
        return tuple(self._columns)

    @property
    def last(self) -> Point | None:
        """The point that came last."""
        return self._last

    def extremes(self, name: str) -> tuple[Point, Point] | None:
        """Return the first points with the smallest and the largest number, which NaN is not."""
        return self._extremes.get(name)

    def add(self, point: Point) -> None:
        """Take a point."""
        self._last = point
        number = self._seen
        self._seen += 1
        for name, value in point.values.items():
            self._columns.setdefault(name, (array("I"), array("d")))
            self._latest[name] = point.step, value
            low, high = self._extremes.get(name, (None, None))
            if not math.isnan(value):
                low = point if low is None or value < low.values[name] else low
                high = point if high is None or value > high.values[name] else high
                self._extremes[name] = low, high
        if number == self._next and len(self._steps) == self._most:
            self._thin()
        if number != self._next:
            return
        row = len(self._steps)
        self._steps.append(point.step)
        self._times.append(point.time)
        self._ranks.append(point.rank)
        self._attempts.append(point.attempt)
        for name, value in point.values.items():
            rows, values = self._columns[name]
            rows.append(row)
            values.append(value)
        self._choose_next()

    def _choose_next(self) -> None:
        self._next = len(self._steps) * self._every + self._chance.randrange(self._every)

    def _thin(self) -> None:
        chosen = self._chance.randbytes(len(self._steps) // 2)
        kept = bytearray(len(self._steps))
        kept[::2] = bytes(byte & 1 for byte in chosen)
        kept[1::2] = bytes(not byte & 1 for byte in chosen)
        self._every *= 2
        self._steps = array("q", compress(self._steps, kept))
        self._times = array("d", compress(self._times, kept))
        self._ranks = array("i", compress(self._ranks, kept))
        self._attempts = array("i", compress(self._attempts, kept))
        for name, (rows, values) in self._columns.items():
            in_column = bytes(map(kept.__getitem__, rows))
            self._columns[name] = (
                array("I", (row // 2 for row in compress(rows, in_column))),
                array("d", compress(values, in_column)),
            )
        self._choose_next()

    def copy(self) -> PointTable:
        """Return one that stays as it is; it takes little time."""
        twin = copy.copy(self)
        twin._steps, twin._times = self._steps[:], self._times[:]
        twin._ranks, twin._attempts = self._ranks[:], self._attempts[:]
        twin._columns = {name: (rows[:], it[:]) for name, (rows, it) in self._columns.items()}
        twin._extremes, twin._latest = dict(self._extremes), dict(self._latest)
        return twin

    def series(self, name: str) -> Iterator[tuple[int, float]]:
        """Yield step and number of the points that have one."""
        rows, values = self._columns[name]
        for row, value in zip(rows, values, strict=True):
            yield self._steps[row], value

    def samples(self, name: str, most: int) -> list[tuple[int, float]]:
        """Return about so many steps and numbers, evenly, and at last the one that came last."""
        rows, values = self._columns[name]
        every = max(1, len(rows) // most)
        found = [(self._steps[rows[place]], values[place]) for place in range(0, len(rows), every)]
        latest = self._latest[name]
        return found if found and found[-1] == latest else [*found, latest]

    @property
    def steps(self) -> array[int]:
        """The steps of all points that are kept."""
        return self._steps

    @property
    def attempts(self) -> array[int]:
        """The attempts of all points that are kept."""
        return self._attempts

    def places(self) -> dict[str, array[int] | array[float]]:
        """Return the columns that say where and when each point was."""
        return {
            "step": self._steps,
            "time": self._times,
            "rank": self._ranks,
            "attempt": self._attempts,
        }

    def column(self, name: str) -> array[float]:
        """Return the numbers of a name, with NaN where a point has none."""
        column = array("d", [math.nan]) * len(self._steps)
        for row, value in zip(*self._columns.get(name, ((), ())), strict=True):
            column[row] = value
        return column

    def __iter__(self) -> Iterator[Point]:
        """Yield all points that are kept."""
        cursors = dict.fromkeys(self._columns, 0)
        for row in range(len(self._steps)):
            found = {}
            for name, (rows, values) in self._columns.items():
                place = cursors[name]
                if place < len(rows) and rows[place] == row:
                    found[name] = values[place]
                    cursors[name] = place + 1
            yield Point(
                self._steps[row],
                found,
                self._ranks[row],
                self._attempts[row],
                self._times[row],
            )


class RankSummary:
    """Count, mean, minimum and maximum over the ranks, of each step and name.

    When there are more than `most` steps, about half of them are left out, and so on: the same ones
    of every rank and name, however many lie between the steps that are reported.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._every = 1
        self._steps: dict[tuple[int, int], dict[str, Moments]] = {}

    @property
    def every(self) -> int:
        """1 while all steps are kept, 2 when about half of them are, and so on."""
        return self._every

    def add(self, point: Point) -> None:
        """Take a point of any rank."""
        if not self._is_kept(point.step):
            return
        moments = self._steps.setdefault((point.attempt, point.step), {})
        for name, value in point.values.items():
            if (known := moments.get(name)) is None:
                known = moments[name] = Moments()
            known.add(value)
        if len(self._steps) > self._most:
            self._every *= 2
            self._steps = {key: it for key, it in self._steps.items() if self._is_kept(key[1])}

    def _is_kept(self, step: int) -> bool:
        return step * _FACTOR % _MODULUS % self._every == 0

    def at(self, attempt: int, step: int) -> Mapping[str, Moments]:
        """Return what is known of a step."""
        return self._steps.get((attempt, step), {})


class Moments:
    """Sums up a number over the ranks."""

    __slots__ = ("count", "max", "min", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.min = self.max = float("nan")

    def add(self, value: float) -> None:
        """Take a number."""
        self.count += 1
        self.total += value
        if math.isnan(value):
            return
        if not self.min <= value:  # also the first one
            self.min = value
        if not self.max >= value:
            self.max = value

    @property
    def mean(self) -> float:
        """The mean of all, NaN if one is."""
        return self.total / self.count
