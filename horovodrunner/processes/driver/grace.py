"""SIGTERM to this process: the ranks save, and the run ends soon after. Runs in: the driver."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from horovodrunner.errors import ConfigurationError, RunStoppedError
from horovodrunner.flows.going import GoingRun
from horovodrunner.processes.driver.attempts import STOPPED
from horovodrunner.wire.events import SaveWanted

__all__ = ["sigterm_grace"]

SAME_SECONDS = 1.0
"""Signals that follow each other faster are one: schedulers send several."""


@contextlib.contextmanager
def sigterm_grace(run: GoingRun, seconds: float | None) -> Iterator[None]:
    """Let the ranks save when SIGTERM comes, and stop the run when main returns, or in so long.

    A signal that is ignored stays so.
    """
    before = signal.getsignal(signal.SIGTERM)
    if seconds is None or before is signal.SIG_IGN or before is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise ConfigurationError(
            f"sigterm_grace={seconds:g}: run() was called in {threading.current_thread().name!r}, "
            "and Python takes signals in the main thread only: call it there, or leave "
            "sigterm_grace out and call runner.request_checkpoint() in a handler of your own"
        )
    grace = _Grace(run, seconds)
    signal.signal(signal.SIGTERM, grace.take)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        grace.is_over.set()


class _Grace:
    def __init__(self, run: GoingRun, seconds: float) -> None:
        self._run = run
        self._seconds = seconds
        self._received_at: float | None = None
        self.is_over = threading.Event()

    def take(self, number: int, frame: FrameType | None) -> None:
        """Begin the grace period; a later signal ends it."""
        now, first = time.monotonic(), self._received_at
        if first is None:
            self._received_at = now
            wanted = SaveWanted("this process was sent SIGTERM", urgent=True)
            self._run.stop_with_main(_stopped())
            if self._run.has_ranks and self._run.want_save(wanted):
                _thread.start_new_thread(self._wait, ())  # threading has locks
                return
        if first is None or now - first >= SAME_SECONDS:
            self._run.stop(_stopped())

    def _wait(self) -> None:
        if not self.is_over.wait(self._seconds):
            self._run.stop(_stopped())


def _stopped() -> RunStoppedError:
    return RunStoppedError(f"SIGTERM: {STOPPED}", reason="SIGTERM")
