"""How long a rank's steps take, by the times at which it reports. Runs in: the driver."""

from __future__ import annotations

from typing import Any

from horovodrunner.flows.metrics.records import Bar, Point

__all__ = ["StepClock"]

MAX_KEPT = 1000
"""So many times of steps are kept of each rank, spread evenly over the run."""


class StepClock:
    """Takes what one rank reports; a step lasts from one report to that of the next step.

    Progress bars count as long as nothing else is reported.
    """

    def __init__(self) -> None:
        self._points = _Clock()
        self._bars = _Clock()
        self._bar = 0
        self.last_step: int | None = None
        self.last_time = 0.0

    def begin(self) -> None:
        """Begin anew, with another attempt."""
        self._points.pause()
        self._bars.pause()

    def take(self, record: Point | Bar) -> None:
        """Take a point or the state of a bar."""
        self.last_time = record.time
        if isinstance(record, Point):
            self.last_step = record.step
            self._points.tick(record.step, record.time)
            return
        if record.number != self._bar:
            self._bar = record.number
            self._bars.pause()
        self._bars.tick(record.done, record.time)

    def summary(self) -> dict[str, Any]:
        """Return the median and the 95th percentile in seconds, and how far the rank is."""
        clock = self._points if self._points.kept else self._bars
        ordered = sorted(clock.kept)
        found: dict[str, Any] = {"last_step": self.last_step, "last_time": self.last_time}
        if ordered:
            found["median"] = ordered[len(ordered) // 2]
            found["p95"] = ordered[int(len(ordered) * 0.95)]
            found["steps"] = clock.seen
        return found


class _Clock:
    def __init__(self) -> None:
        self.kept: list[float] = []
        self.seen = 0
        self._every = 1
        self._last: tuple[int, float] | None = None

    def pause(self) -> None:
        self._last = None

    def tick(self, step: int, time: float) -> None:
        if self._last is not None:
            steps, seconds = step - self._last[0], time - self._last[1]
            if steps == 0:
                return
            if steps > 0 and seconds >= 0:
                self._add(seconds / steps)
        self._last = (step, time)

    def _add(self, seconds: float) -> None:
        if self.seen % self._every == 0:
            self.kept.append(seconds)
        self.seen += 1
        if len(self.kept) > MAX_KEPT:
            del self.kept[1::2]
            self._every *= 2
