"""Points as single numbers with a name, which is what tracking tools keep. Runs in: the driver."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from horovodrunner.flows.metrics.records import Bar, Point
from horovodrunner.flows.metrics.series import Moments

__all__ = ["Scalar", "ScalarStream"]

MAX_OPEN = 10_000
"""So many numbers wait for other ranks to report the same step."""


class Scalar(NamedTuple):
    """A number that a rank reported, or a statistic of all ranks, which has rank 0."""

    name: str
    value: float
    step: int
    time: float
    rank: int = 0


class ScalarStream:
    """Takes what the ranks report, and yields what is to be kept of it, as it comes.

    That is all of rank 0; of others what they report with ``ranks="all"``; and, once ranks have
    differed in a number, its ``.mean``, ``.min`` and ``.max`` at each step over all ranks. A
    number that was summed over the ranks is the same everywhere, and has none.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._open: dict[tuple[int, str], tuple[Moments, float]] = {}
        self._differing: set[str] = set()

    def begin(self) -> None:
        """Note that what comes from now on is another attempt's."""
        self._open.clear()

    def take(self, records: Iterable[Point | Bar]) -> Iterator[Scalar]:
        """Yield what follows from what a rank has reported."""
        for point in records:
            if not isinstance(point, Point):
                continue
            if point.rank == 0 or point.is_kept:
                for name, value in point.values.items():
                    yield Scalar(name, value, point.step, point.time, point.rank)
            if self._size != 1:
                yield from self._compare(point)

    def rest(self) -> Iterator[Scalar]:
        """Yield the statistics of steps that not all ranks have reported."""
        while self._open:
            yield from self._close(next(iter(self._open)))

    def _compare(self, point: Point) -> Iterator[Scalar]:
        for name, value in point.values.items():
            key = (point.step, name)
            moments, _ = self._open.get(key) or (Moments(), 0.0)
            moments.add(value)
            self._open[key] = moments, point.time
            if moments.count == self._size:
                yield from self._close(key)
            elif len(self._open) > MAX_OPEN:
                yield from self._close(next(iter(self._open)))

    def _close(self, key: tuple[int, str]) -> Iterator[Scalar]:
        (step, name), (moments, time) = key, self._open.pop(key)
        if moments.count == 1:
            return
        some_are_nan = math.isnan(moments.mean) and not math.isnan(moments.min)
        if moments.min < moments.max or some_are_nan:
            self._differing.add(name)
        if name in self._differing:
            for statistic in ("mean", "min", "max"):
                yield Scalar(f"{name}.{statistic}", getattr(moments, statistic), step, time)
