"""Takes what the ranks report. Runs in: the driver."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from horovodrunner.flows.metrics.history import History
from horovodrunner.flows.metrics.records import Bar, Point, decode_records
from horovodrunner.flows.observer import Observer
from horovodrunner.wire.events import Points

__all__ = ["MetricsRecorder", "ReportCalls", "StaysHere"]

MAX_BARS = 10
"""Of one rank; of more, the first one and the last ones are known."""


class MetricsRecorder(Observer):
    """Adds points to a history, and knows how far each rank's progress bars are."""

    title = "keeping the metrics"

    def __init__(self, history: History) -> None:
        self._history = history
        self._attempt = 1
        self._event: Points | None = None
        self._records: list[Point | Bar] = []
        self.bars: dict[int, dict[int, Bar]] = {}
        """By rank and number: those that have not ended, and the last that did."""
        self.handlers = {Points: self._take}

    def begin(self, attempt: int) -> None:
        """Note that what comes from now on is another attempt's."""
        self._attempt = attempt
        self.bars = {}

    def records_of(self, event: Points) -> list[Point | Bar]:
        """Return what an event has; others who follow the run need not decode it again."""
        if event is not self._event:
            decoded = decode_records(bytes(event.records), event.rank, self._attempt)
            self._event, self._records = event, list(decoded)
        return self._records

    def _take(self, event: Points) -> None:
        for record in self.records_of(event):
            if isinstance(record, Bar):
                self._draw(event.rank, record)
            else:
                self._history._add(record)

    def _draw(self, rank: int, bar: Bar) -> None:
        bars = self.bars.get(rank, {})
        unended = {number: each for number, each in bars.items() if not each.has_ended}
        bars = {**unended, bar.number: bar}
        if len(bars) > MAX_BARS:
            del bars[sorted(bars)[1]]
        self.bars[rank] = bars


class StaysHere:
    """A function of the driver's, which does not travel where its runner does."""

    def __init__(self, function: Callable[[Point], object]) -> None:
        self._function = function

    def __call__(self, point: Point) -> object:
        """Call the function."""
        return self._function(point)

    def __repr__(self) -> str:
        return repr(self._function)

    def __deepcopy__(self, memo: object) -> StaysHere:
        """Stay the same in a copy of the runner, as functions do."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    return None


class ReportCalls(Observer):
    """Has a function of the user's called with each point of rank 0, in the run's own thread."""

    title = "calling on_report"

    def __init__(
        self,
        on_report: Callable[[Point], object],
        recorder: MetricsRecorder,
        call: Callable[[Callable[[], object]], None],
    ) -> None:
        self._on_report = on_report
        self._recorder = recorder
        self._call = call
        self.handlers = {Points: self._take}

    def _take(self, event: Points) -> None:
        if event.rank != 0:
            return
        for record in self._recorder.records_of(event):
            if isinstance(record, Point):
                self._call(functools.partial(self._on_report, record))
