"""What reaches the notebook cell. Runs in: the driver.

Lines arrive from other threads and are printed by the thread that called ``run()``: so output
lands in the right cell, redirected standard output works, and Ctrl-C is met there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from horovodrunner.flows.going import GoingRun
from horovodrunner.flows.logs.lines import count_lines, missing_mark, prefix_lines
from horovodrunner.flows.logs.showing import show_text
from horovodrunner.flows.telemetry.phases import Phase
from horovodrunner.formatting import in_one_line
from horovodrunner.spark.interrupt import LOOK_UP_SECONDS, main_thread_was_interrupted
from horovodrunner.wire.events import Handlers, Lines, Message, Note, Phases, ignore

__all__ = ["Console"]

MAX_WAITING_BYTES = 16 * 1024 * 1024
"""Workers' lines that would make more than this wait to be printed are dropped and counted."""

MAX_WAITING_CALLS = 100_000
"""Of more calls that wait, the oldest are left out."""

QUIET = "HOROVODRUNNER_QUIET"
"""Leaves out what a run says of itself as long as all is well, unless it is empty or 0."""


class Drawing(Protocol):
    """What is drawn beside the lines."""

    def is_due(self) -> bool:
        """Return whether there is something new to draw."""

    def draw(self) -> None:
        """Draw it."""

    def beside(self) -> contextlib.AbstractContextManager[object]:
        """Make room for lines of text."""


class Console:
    """Takes lines from any thread and prints them in one.

    `executors_have_lines`: whether what is dropped here can be found in an executor's log.
    `shows_lines`: whether the ranks' output is shown when it comes; their messages always are.
    `run`: what this shows; when it is stopped, :meth:`show` raises what it is stopped with.
    `errors_apart`: whether what ranks write to standard error, and notes, go to standard error.
    `shows_routine`: whether routine notes are shown; None: as `QUIET` says.
    """

    def __init__(
        self,
        *,
        executors_have_lines: bool = True,
        shows_lines: bool = True,
        drawing: Drawing | None = None,
        run: GoingRun | None = None,
        errors_apart: bool = False,
        shows_routine: bool | None = None,
    ) -> None:
        self._run = run or GoingRun("")
        self._executors_have_lines = executors_have_lines
        self._drawing = drawing
        self._errors = "stderr" if errors_apart else "stdout"
        # No Condition or Queue: an interrupt may hit the waiting thread anywhere in their code, and
        # leave them locked for ever. It cannot in a plain lock's.
        self._lock = threading.Lock()
        self._nothing_new = threading.Lock()
        self._nothing_new.acquire()
        self._waiting: deque[tuple[str, str]] = deque()  # stream and text
        self._waiting_bytes = 0
        self._calls: deque[Callable[[], object]] = deque(maxlen=MAX_WAITING_CALLS)
        self._dropped_lines = 0
        self._woken = False
        self._tells_it_is_not_shown = False
        is_quiet = os.environ.get(QUIET, "0") not in ("", "0")
        self._leaves_routine_out = is_quiet if shows_routine is None else not shows_routine
        self.run_phases: tuple[Phase, ...] = ()
        """What the run told of its phases."""
        self.handlers: Handlers = {
            Lines: self._take_lines if shows_lines else ignore,
            Message: lambda event: self.message(event.text),
            Note: lambda event: self.note(event.text, routine=event.routine),
            Phases: self._take_phases,
        }

    def _take_lines(self, event: Lines) -> None:
        lines = prefix_lines(event.lines, event.rank, event.stream)
        self.lines(lines, self._errors if event.stream == "stderr" else "stdout")

    def lines(self, lines: bytes, stream: str = "stdout") -> None:
        """Take whole, prefixed lines of the workers; never blocks."""
        with self._lock:
            if self._waiting_bytes > MAX_WAITING_BYTES:
                self._dropped_lines += count_lines(lines)
                return
            self._report_dropped_lines()
            self._put(lines.decode("utf-8", errors="replace"), stream)

    def message(self, text: str) -> None:
        """Take a ``log_to_driver`` message, which is shown as it was given."""
        with self._lock:
            self._put(text + "\n")

    def note(self, text: str, *, routine: bool = False) -> None:
        """Take a line of the run's own; a routine one says only that all goes as it should."""
        if routine and self._leaves_routine_out:
            return
        with self._lock:
            self._put(f"HorovodRunner: {text}\n", self._errors)

    def _take_phases(self, event: Phases) -> None:
        self.run_phases = tuple(Phase(*fields) for fields in event.phases)

    def call(self, function: Callable[[], object]) -> None:
        """Have a function called by the thread that shows the run; what it raises stops the run."""
        with self._lock:
            self._calls.append(function)
            self._tell()

    def wake(self) -> None:
        """Make :meth:`show` return after it has printed everything."""
        with self._lock:
            self._woken = True
            self._tell()

    def show(self, timeout: float | None = None) -> bool:
        """Print what arrives until somebody calls :meth:`wake`; return False if the time was up."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self._wait_for_change(deadline)
            with self._lock:
                self._report_dropped_lines()
                waiting = list(self._waiting)
                self._waiting.clear()
                self._waiting_bytes = 0
                woken, self._woken = self._woken, False
            for stream, texts in itertools.groupby(waiting, key=lambda each: each[0]):
                with self._beside_drawing():
                    why = show_text("".join(text for _, text in texts), stream)
                if why:
                    self._tell_that_nothing_is_shown(why)
            self._draw()
            self._make_calls()
            if woken:
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False

    def _wait_for_change(self, deadline: float | None) -> None:
        """Wait for something to print, or for an interrupt."""
        while True:
            self._run.check()
            with self._lock:
                if self._waiting or self._calls or self._woken:
                    return
            if self._drawing is not None and self._drawing.is_due():
                return
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if left == 0.0:
                return
            left = LOOK_UP_SECONDS if left is None else min(left, LOOK_UP_SECONDS)
            self._nothing_new.acquire(timeout=left)
            if main_thread_was_interrupted():
                raise KeyboardInterrupt

    def _make_calls(self) -> None:
        """Call what was asked for so far, until the run is stopped or has ended."""
        with self._lock:
            calls = list(self._calls)
            self._calls.clear()
        for call in calls:
            if self._run.is_closed:
                return
            self._run.check()
            try:
                call()
            except BaseException as error:
                self._run.stop(error)
                raise

    def _draw(self) -> None:
        if self._drawing is None or not self._drawing.is_due():
            return
        try:
            self._drawing.draw()
        except Exception as error:  # noqa: BLE001 - the user may have put anything in its way
            self._drawing = None
            self.note(f"the run's progress is no longer shown: {in_one_line(error)}")

    @contextlib.contextmanager
    def _beside_drawing(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._drawing is not None:
                with contextlib.suppress(Exception):
                    stack.enter_context(self._drawing.beside())
            yield

    def _tell_that_nothing_is_shown(self, why: str) -> None:
        """Report it once, by the only other way there is, which may be as broken."""
        if not self._tells_it_is_not_shown:
            self._tells_it_is_not_shown = True
            with contextlib.suppress(Exception):
                sys.stderr.write(
                    f"HorovodRunner: nothing can be written to sys.stdout ({sys.stdout!r:.200}), "
                    f"so what the run prints is not shown; the run goes on ({why})\n"
                )

    def _put(self, text: str, stream: str = "stdout") -> None:
        if label := self._run.label:
            text = label + " " + text[:-1].replace("\n", f"\n{label} ") + "\n"
        self._waiting.append((stream, text))
        self._waiting_bytes += len(text)
        self._tell()

    def _tell(self) -> None:
        if self._nothing_new.locked():
            self._nothing_new.release()

    def _report_dropped_lines(self) -> None:
        if self._dropped_lines:
            why = "output was too fast for this console"
            if self._executors_have_lines:
                why += "; the executor's log has them"
            mark = missing_mark(self._dropped_lines, why)
            self._dropped_lines = 0
            self._put(mark.decode(), self._errors)
