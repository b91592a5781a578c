"""The pipe for what a rank reports, which never holds it up. Runs in: the worker.

What was written stays in the pipe when the process is killed, so its last points are not lost.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque

from horovodrunner.wire.signals import pipe_at

__all__ = ["MetricsPipe"]

MAX_WAITING_RECORDS = 500_000
"""So many wait in this process while the pipe is full; what is reported beyond them is dropped."""

WRITES_AT_ONCE = 64
"""Of a backlog, so many records are written with a new one, which takes 0.1 ms."""

FINISH_SECONDS = 5.0
"""How long main's end waits for the backlog to be read."""


class MetricsPipe:
    """Writes records without ever waiting for the reader, which looks ten times a second."""

    _monotonic = staticmethod(time.monotonic)  # main may put a clock of its own in its place

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._pipe = pipe_at(fd)
        self._writing = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self.dropped = 0
        """So many records the task was too slow for."""

    def send(self, record: bytes) -> None:
        """Write a line, or keep it until there is room."""
        if len(self._waiting) >= MAX_WAITING_RECORDS:
            self.dropped += 1
        else:
            self._waiting.append(record)
        if self._writing.acquire(blocking=False):  # else whoever writes now writes it, too
            try:
                self._write()
            finally:
                self._writing.release()

    def finish(self) -> None:
        """Wait, for a bounded time, until all is written."""
        deadline = self._monotonic() + FINISH_SECONDS
        if not self._writing.acquire(timeout=FINISH_SECONDS):
            return
        try:
            room = select.poll()
            room.register(self._fd, select.POLLOUT)
            while self._waiting and (left := deadline - self._monotonic()) > 0:
                room.poll(left * 1000)
                self._write()
            self.dropped += len(self._waiting)
        finally:
            self._writing.release()

    def _write(self) -> None:
        try:
            if pipe_at(self._fd) != self._pipe:  # main has put another file in its place
                self._waiting.clear()
            for _ in range(min(WRITES_AT_ONCE, len(self._waiting))):
                record = self._waiting[0]
                written = os.write(self._fd, record)
                if written < len(record):
                    self._waiting[0] = record[written:]
                    break
                self._waiting.popleft()
        except BlockingIOError:
            pass
        except OSError:  # main has closed it, or the task is gone
            self._waiting.clear()
