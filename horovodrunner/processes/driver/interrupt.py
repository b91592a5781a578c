"""Ctrl-C and the notebook's stop button. Runs in: the driver."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

__all__ = ["main_thread_was_interrupted", "only_this_run"]


@contextlib.contextmanager
def only_this_run() -> Iterator[None]:
    """Let Ctrl-C end this run and no other Spark job.

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


def main_thread_was_interrupted() -> bool:
    """Return whether Ctrl-C ended the main thread, and Python only waits for other threads."""
    return (
        not threading.main_thread().is_alive()
        and getattr(sys, "last_type", None) is KeyboardInterrupt
    )
