"""Many points in little memory. Runs in: the driver."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping

from horovodrunner.flows.metrics.records import Point

__all__ = ["Moments", "PointTable", "RankSummary"]


class PointTable:
    """Points in columns; of a point that has no number of a name, that column has no entry.

    When there are more than `most`, every second one is left out, and from then on every second
    one that comes, and so on. The extremes and the last point of every name are kept apart.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._steps, self._times = array("q"), array("d")
        self._ranks, self._attempts = array("i"), array("i")
        self._columns: dict[str, tuple[array[int], array[float]]] = {}
        self._every = 1
        self._seen = 0
        self._last: Point | None = None
        self._extremes: dict[str, tuple[Point, Point]] = {}

    def __len__(self) -> int:
        """Return how many points are kept."""
        return len(self._steps)

    @property
    def every(self) -> int:
        """1 while all points are kept, 2 when every second one is, and so on."""
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
        self._seen += 1
        for name, value in point.values.items():
            self._columns.setdefault(name, (array("I"), array("d")))
            low, high = self._extremes.get(name, (None, None))
            if not math.isnan(value):
                low = point if low is None or value < low.values[name] else low
                high = point if high is None or value > high.values[name] else high
                self._extremes[name] = low, high
        if (self._seen - 1) % self._every:
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
        if len(self._steps) > self._most:
            self._thin()

    def _thin(self) -> None:
        self._every *= 2
        self._steps, self._times = self._steps[::2], self._times[::2]
        self._ranks, self._attempts = self._ranks[::2], self._attempts[::2]
        for name, (rows, values) in self._columns.items():
            kept = [place for place, row in enumerate(rows) if row % 2 == 0]
            self._columns[name] = (
                array("I", (rows[place] // 2 for place in kept)),
                array("d", (values[place] for place in kept)),
            )

    def series(self, name: str) -> Iterator[tuple[int, float]]:
        """Yield step and number of the points that have one."""
        rows, values = self._columns[name]
        for row, value in zip(rows, values, strict=True):
            yield self._steps[row], value

    def columns(self) -> dict[str, list[float | int | None]]:
        """Return all columns, with None where a point has no number of that name."""
        table: dict[str, list[float | int | None]] = {
            "step": list(self._steps),
            "time": list(self._times),
            "rank": list(self._ranks),
            "attempt": list(self._attempts),
        }
        for name, (rows, values) in self._columns.items():
            column: list[float | int | None] = [None] * len(self._steps)
            for row, value in zip(rows, values, strict=True):
                column[row] = value
            table[name] = column
        return table

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

    When there are more than `most` steps, those that 2 does not divide are left out, then those
    that 4 does not, and so on: the same ones of every rank and name.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._every = 1
        self._steps: dict[tuple[int, int], dict[str, Moments]] = {}

    @property
    def every(self) -> int:
        """1 while all steps are kept, 2 when the even ones are, and so on."""
        return self._every

    def add(self, point: Point) -> None:
        """Take a point of any rank."""
        if point.step % self._every:
            return
        moments = self._steps.setdefault((point.attempt, point.step), {})
        for name, value in point.values.items():
            if (known := moments.get(name)) is None:
                known = moments[name] = Moments()
            known.add(value)
        if len(self._steps) > self._most:
            self._every *= 2
            self._steps = {key: it for key, it in self._steps.items() if key[1] % self._every == 0}

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
