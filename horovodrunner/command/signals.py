"""Ctrl-C, SIGTERM and SIGHUP end a run as a whole. Runs in: the command line."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

__all__ = ["EndingSignals"]

SAME_SECONDS = 1.0
"""Signals that follow each other faster are one: a terminal and a scheduler send several."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class EndingSignals:
    """The first signal interrupts, and the run ends in good order; a later one ends at once.

    Even then nothing is left behind: workers and the JVM end with this process.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._when = 0.0

    def install(self) -> None:
        """Take the signals, unless they are ignored; PySpark takes SIGINT with each session."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    @property
    def exit_code(self) -> int:
        """What a shell would show for a process that the first signal ended."""
        return 128 + (self.received or signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> Any:
        now = time.monotonic()
        if self.received is None:
            self.received, self._when = signal.Signals(number), now
            raise KeyboardInterrupt
        if now - self._when >= SAME_SECONDS:
            os._exit(self.exit_code)
