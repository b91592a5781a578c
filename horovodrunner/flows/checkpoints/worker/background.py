"""A checkpoint that is written while main goes on, one at a time. Runs in: the worker."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

__all__ = ["start", "wait"]

_writing: tuple[int, threading.Thread] | None = None


def start(write: Callable[[], None]) -> None:
    """Call `write` in a thread, after the one before."""
    global _writing
    wait()
    may_begin = threading.Event()  # or it would keep the GIL from main, which waits for its start

    def write_then() -> None:
        may_begin.wait()
        write()

    # a daemon: when main raises, its process does not wait
    thread = threading.Thread(target=write_then, name="horovodrunner-checkpoint", daemon=True)
    _writing = os.getpid(), thread
    thread.start()
    may_begin.set()


def wait() -> None:
    """Wait until the checkpoint is written; a process that main forked has none to wait for."""
    global _writing
    if _writing is None:
        return
    pid, thread = _writing
    if pid == os.getpid():
        thread.join()
    _writing = None
