"""A rank's calls of should_save_now(), and SIGTERM as a wish to save. Runs in: the worker."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from horovodrunner.wire.events import (
    CallsCounted,
    CountCalls,
    Ending,
    Event,
    Handlers,
    Job,
    SaveAt,
    SaveWanted,
)

__all__ = ["SaveCalls"]

SAME_SECONDS = 1.0
"""Signals that follow each other faster are one: schedulers send several."""


class SaveCalls:
    """Counts the calls, and answers those that all ranks have agreed upon with True.

    The control thread answers for main, which may be waiting for other ranks anywhere. A call that
    begins between its answer and the agreement waits for that.
    """

    _now = staticmethod(time.monotonic)  # main may put a clock of its own in its place

    def __init__(self, send: Callable[[Event], None]) -> None:
        self._send = send
        self._rank = -1
        self._host = ""
        self._calls = 0
        self._looks_closer = False
        self._changed = threading.Condition()
        self._asked = self._answered = 0
        self._agreed: set[int] = set()
        self._on_sigterm = self._take_sigterm  # one object, to know it again
        self._signalled_at = -SAME_SECONDS
        self._sigterm_waits = False
        self.handlers: Handlers = {CountCalls: self._count, SaveAt: self._agree, Ending: self._end}

    def begin(self, job: Job) -> None:
        """Note which rank this is."""
        self._rank, self._host = job.rank, job.host

    def should_save_now(self) -> bool:
        """Count a call, and return whether all ranks save at it."""
        self._calls = call = self._calls + 1
        if call == 1:
            self._take_signals()
        # Looked at after counting, as the control thread counts after setting it: so a call that
        # does not see it was counted.
        return self._looks_closer and self._look_closer(call)

    def main_ends(self) -> None:
        """Give SIGTERM back; the main thread calls this."""
        with contextlib.suppress(Exception):  # main may have put anything in their places
            if signal.getsignal(signal.SIGTERM) is self._on_sigterm:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _look_closer(self, call: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._answered >= self._asked)
            is_agreed = call in self._agreed
            self._agreed = {each for each in self._agreed if each > call}
            self._looks_closer = bool(self._agreed)
        if is_agreed:
            self._sigterm_waits = False
        return is_agreed

    def _count(self, event: CountCalls) -> None:
        with self._changed:
            self._asked = event.question
            self._looks_closer = True
        self._send(CallsCounted(self._rank, event.question, self._calls))

    def _agree(self, event: SaveAt) -> None:
        with self._changed:
            self._answered = max(self._answered, event.question)
            if event.call:
                self._agreed.add(event.call)
            self._changed.notify_all()

    def _take_signals(self) -> None:
        """Take SIGTERM, unless main has a handler of its own."""
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        ):
            signal.signal(signal.SIGTERM, self._on_sigterm)
            os.register_at_fork(after_in_child=self.main_ends)

    def _take_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Pass the first one on; a later one, while it has had no effect yet, ends the process."""
        now, before = self._now(), self._signalled_at
        self._signalled_at = now
        if now - before < SAME_SECONDS:
            return
        if self._sigterm_waits:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._sigterm_waits = True
        why = f"rank {self._rank} on {self._host} was sent SIGTERM"
        # What this has interrupted may have the lock of the pipe.
        _thread.start_new_thread(self._send, (SaveWanted(why, urgent=True),))

    def _end(self, event: Ending) -> None:
        """End as if SIGTERM had never been taken, also where main cannot run a handler."""
        if signal.getsignal(signal.SIGTERM) is not self._on_sigterm:
            return
        import ctypes

        libc = ctypes.CDLL(None)  # Python lets the main thread alone change handlers
        libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        libc.signal(signal.SIGTERM, None)
        os.kill(os.getpid(), signal.SIGTERM)
