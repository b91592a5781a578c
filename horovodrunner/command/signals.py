"""Ctrl-C, SIGTERM and SIGHUP end a run as a whole. Runs in: the command line."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

__all__ = ["EndingSignals", "end_jvm"]

JVM_SECONDS = 5.0
"""How long a JVM may take to end when it is asked to."""

SAME_SECONDS = 1.0
"""Signals that follow each other faster are one: a terminal and a scheduler send several."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class EndingSignals:
    """The first signal interrupts, and the run ends in good order; a later one ends at once.

    Even then nothing is left behind: workers end with this process.
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
            end_jvm(grace=0)
            os._exit(self.exit_code)


def end_jvm(grace: float = JVM_SECONDS) -> None:
    """End the JVM that PySpark has started in this process, with its executors, if there is one.

    It ends by itself when this process does, but not while it is still starting.
    """
    import psutil

    with contextlib.suppress(psutil.Error):
        jvms = [each for each in psutil.Process().children() if _is_sparks(each)]
        for ask in ([psutil.Process.terminate] if grace else []) + [psutil.Process.kill]:
            for each in jvms:
                with contextlib.suppress(psutil.NoSuchProcess):
                    ask(each)
            _, jvms = psutil.wait_procs(jvms, grace)


def _is_sparks(process: psutil.Process) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return any("spark-submit" in word or "SparkSubmit" in word for word in process.cmdline())
    return False
