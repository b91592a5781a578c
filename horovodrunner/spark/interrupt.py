"""Ctrl-C and the notebook's stop button. Runs in: the driver."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

__all__ = ["LOOK_UP_SECONDS", "join", "main_thread_was_interrupted", "only_this_run"]

LOOK_UP_SECONDS = 0.2
"""How often a thread that waits looks whether it was interrupted.

Signals reach the main thread only, and not a wait that was just about to begin; and an exception
that was sent to another thread waits for it.
"""


@contextlib.contextmanager
def only_this_run() -> Iterator[None]:
    """Let Ctrl-C end what this thread waits for, and no other Spark job.

    The SparkContext's handler cancels all jobs of the session. In the main thread Python's own
    handler takes its place here; any other handler is left alone.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if is_main else None
    if not str(getattr(handler, "__module__", "")).startswith("pyspark"):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def join(thread: threading.Thread) -> None:
    """Wait for the end of a thread, or for an interrupt."""
    while thread.is_alive():
        thread.join(LOOK_UP_SECONDS)
        if main_thread_was_interrupted():
            raise KeyboardInterrupt


def main_thread_was_interrupted() -> bool:
    """Return whether Ctrl-C ended the main thread, and Python only waits for other threads."""
    return (
        not threading.main_thread().is_alive()
        and getattr(sys, "last_type", None) is KeyboardInterrupt
    )
