"""Brings what a run reports to MLflow, in a thread that nobody waits for. Runs in: the driver."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from horovodrunner.flows.mlflow.tracking import (
    MAX_METRICS,
    MAX_TEXTS,
    Metric,
    RefusedError,
    RunInMlflow,
    UnavailableError,
)
from horovodrunner.formatting import in_one_line

__all__ = ["END_SECONDS", "Delivery"]

MAX_WAITING = 200_000
"""So many numbers wait for the server, in 40 MB; beyond that every second one is left out."""

SEND_SECONDS = 2.0
"""Numbers are collected for so long before they are sent."""

FIRST_PAUSE, LAST_PAUSE = 0.5, 15.0
"""Seconds between tries while the server cannot be reached; they double up to the last."""

END_SECONDS = 30.0
"""How long after the run's end what is left may take."""

SLOWEST = 2**20
"""Bytes a second: files may take longer."""

SILENT_SECONDS = 10.0
"""A server that cannot be reached for longer is reported."""

_logger = logging.getLogger(__name__)


class Delivery:
    """Sends numbers, texts and in the end a status, in this order, and tries again what fails.

    `opened` makes the run in MLflow, in the delivery's own thread.
    """

    def __init__(self, opened: Callable[[], RunInMlflow], note: Callable[[str], None]) -> None:
        self._opened = opened
        self._note = note
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._waiting: deque[Metric] = deque()
        self._in_flight: list[Metric] = []
        self._steps: deque[Callable[[RunInMlflow], None]] = deque()
        self._last_steps: list[Callable[[RunInMlflow], None]] | None = None
        self._deadline = float("inf")
        self._failing_since: float | None = None
        self._has_told = False
        self.was_tried = threading.Event()
        """Set when the run is open, or could not be opened at once."""
        self.run: RunInMlflow | None = None
        self.delivered = self.thinned = 0
        self.refused: dict[str, str] = {}
        """The names of what MLflow does not store, and why."""
        self.error: Exception | None = None
        """What the last try met, if it failed."""
        self._thread = threading.Thread(target=self._work, name="horovodrunner-mlflow", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def add(self, metrics: Iterable[Metric]) -> None:
        """Take numbers; never waits."""
        with self._lock:
            self._waiting.extend(metrics)
            if len(self._waiting) > MAX_WAITING:
                self._thin()

    def add_texts(self, kind: str, texts: Mapping[str, str]) -> None:
        """Take ``"params"`` or ``"tags"``."""
        items = iter(texts.items())
        while some := dict(itertools.islice(items, MAX_TEXTS)):
            self._steps.append(functools.partial(self._send_texts, kind, some))
        self._wake.set()

    def finish(self, steps: Sequence[Callable[[RunInMlflow], None]]) -> None:
        """Let the thread end when all is sent and these steps are done, or the time is up."""
        self._deadline = time.monotonic() + END_SECONDS
        self._last_steps = list(steps)
        self._wake.set()

    def allow(self, size: int) -> None:
        """Let a file of so many bytes take its time."""
        if self._deadline:  # else it was abandoned
            self._deadline = time.monotonic() + END_SECONDS + size / SLOWEST

    def join(self, seconds: float) -> bool:
        """Wait, and return whether the thread has ended, or its time is up."""
        self._thread.join(seconds)
        return not self._thread.is_alive() or time.monotonic() >= self._deadline

    def abandon(self) -> None:
        """Let the thread end after what it is just doing."""
        self._deadline = 0.0
        self._wake.set()

    @property
    def left(self) -> int:
        """How many numbers were not sent."""
        with self._lock:
            return len(self._waiting) + len(self._in_flight)

    @property
    def steps_left(self) -> int:
        """How many of the last steps were not done, and texts before them not sent."""
        return len(self._steps) + len(self._last_steps or ())

    @property
    def is_complete(self) -> bool:
        """Whether all was sent, and all steps are done."""
        return not (self.left or self.steps_left)

    def _work(self) -> None:
        pause = FIRST_PAUSE
        while True:
            is_ending = self._last_steps is not None
            try:
                self._send_all()
                self.error, self._failing_since, pause = None, None, FIRST_PAUSE
                if is_ending:
                    return
                wait = SEND_SECONDS
            except (UnavailableError, RefusedError) as error:
                may_pass = isinstance(error, UnavailableError) and error.may_pass
                self._note_failure(error, may_pass=may_pass)
                wait, pause = pause, min(2 * pause, LAST_PAUSE)
                if is_ending and not may_pass:
                    return
            except Exception as error:  # ours, or MLflow's of a version that is not known
                self.error = UnavailableError(in_one_line(error))
                _logger.exception("the delivery to MLflow ends")
                return
            finally:
                self.was_tried.set()
            if time.monotonic() + wait > self._deadline:
                wait = max(0.0, self._deadline - time.monotonic())
            self._wake.wait(wait)
            self._wake.clear()
            if time.monotonic() >= self._deadline:
                return

    def _send_all(self) -> None:
        run = self._open()
        while self._steps:
            self._steps[0](run)
            self._steps.popleft()
        while batch := self._next_batch():
            self._send_metrics(run, batch)
            self._in_flight = []
            self._check_deadline()
        while self._last_steps:
            self._last_steps[0](run)
            del self._last_steps[0]

    def _open(self) -> RunInMlflow:
        if self.run is None:
            self.run = self._opened()
        self.was_tried.set()
        return self.run

    def _check_deadline(self) -> None:
        if time.monotonic() >= self._deadline:
            raise UnavailableError("it took too long")

    def _next_batch(self) -> list[Metric]:
        with self._lock:
            if not self._in_flight:
                size = min(MAX_METRICS, len(self._waiting))
                self._in_flight = [self._waiting.popleft() for _ in range(size)]
            return self._in_flight

    def _send_metrics(self, run: RunInMlflow, metrics: Sequence[Metric]) -> None:
        try:
            run.log_metrics(metrics)
            self.delivered += len(metrics)
        except RefusedError as error:
            if len(metrics) == 1:
                self.refused[metrics[0].name] = str(error)
                return
            middle = len(metrics) // 2
            self._send_metrics(run, metrics[:middle])
            self._send_metrics(run, metrics[middle:])

    def _send_texts(self, kind: str, texts: Mapping[str, str], run: RunInMlflow) -> None:
        try:
            run.log_texts(kind, texts)
        except RefusedError as error:
            if len(texts) == 1:
                self.refused[next(iter(texts))] = str(error)
                return
            for name, text in texts.items():
                self._send_texts(kind, {name: text}, run)

    def _thin(self) -> None:
        """Leave out every second number of each name."""
        seen: Counter[str] = Counter()

        def kept() -> Iterator[Metric]:
            for metric in self._waiting:
                seen[metric.name] += 1
                if seen[metric.name] % 2:
                    yield metric

        before = len(self._waiting)
        self._waiting = deque(kept())
        self.thinned += before - len(self._waiting)

    def _note_failure(self, error: Exception, *, may_pass: bool) -> None:
        self.error = error
        now = time.monotonic()
        since = self._failing_since = self._failing_since or now
        _logger.debug("MLflow takes nothing: %s", error)
        if not self._has_told and (now - since > SILENT_SECONDS or not may_pass):
            self._has_told = True
            self._note(
                f"MLflow takes nothing ({error}): the run goes on, and what it reports is sent "
                "when that works again"
            )
