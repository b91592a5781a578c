"""The pipe for what a rank reports, which never holds it up. Runs in: the worker.

What was written stays in the pipe when the process is killed, so its last points are not lost.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Mapping

from horovodrunner.wire.signals import pipe_at

__all__ = ["MetricsPipe"]

MAX_WAITING_BYTES = 64 * 1024 * 1024
"""So much waits in this process while the pipe is full; what is reported beyond it is dropped."""

MAX_UNSAVED = 10_000
"""Of more names that wait for the next checkpoint the older half is left out."""

_RECORD_BYTES = 64
"""What a record takes beside its text."""

WRITES_AT_ONCE = 64
"""Of a backlog, so many records are written with a new one, which takes 0.1 ms."""

FINISH_SECONDS = 5.0
"""How long main's end waits for the backlog when nobody reads it."""

MOST_FINISH_SECONDS = 60.0
"""How long it waits for one that is read."""


class MetricsPipe:
    """Writes records without ever waiting for the reader, which looks ten times a second."""

    _monotonic = staticmethod(time.monotonic)  # main may put others of its own in their place
    _os_write = staticmethod(os.write)

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._pipe = pipe_at(fd)
        self._writing = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self.dropped = 0
        """So many records the task was too slow for."""
        self._unsaved: dict[str, float] = {}

    def keep_for_checkpoint(self, values: Mapping[str, float]) -> None:
        """Keep what is reported for the checkpoint that is saved next."""
        self._unsaved.update(values)
        if len(self._unsaved) > MAX_UNSAVED:
            self._unsaved = dict([*self._unsaved.items()][len(self._unsaved) // 2 :])

    def take_unsaved(self) -> dict[str, float]:
        """Return what was reported last since this was called before."""
        taken, self._unsaved = self._unsaved, {}
        return taken

    def send(self, record: bytes) -> None:
        """Write a line, or keep it until there is room."""
        size = len(record) + _RECORD_BYTES
        if self._waiting_bytes + size > MAX_WAITING_BYTES:
            self.dropped += 1
        else:
            self._waiting_bytes += size
            self._waiting.append(record)
        # where another thread writes, it looks again when it has let go
        while self._waiting and self._writing.acquire(blocking=False):
            try:
                has_room = self._write()
            finally:
                self._writing.release()
            if not has_room:
                break

    def finish(self) -> None:
        """Wait, for a bounded time, until all is written."""
        began = self._monotonic()
        deadline = began + FINISH_SECONDS
        if not self._writing.acquire(timeout=FINISH_SECONDS):
            return
        try:
            room = select.poll()
            room.register(self._fd, select.POLLOUT)
            while self._waiting and (left := deadline - self._monotonic()) > 0:
                room.poll(left * 1000)
                backlog = len(self._waiting)
                self._write()
                if len(self._waiting) < backlog:
                    deadline = min(self._monotonic() + FINISH_SECONDS, began + MOST_FINISH_SECONDS)
            self.dropped += len(self._waiting)
        finally:
            self._writing.release()

    def _write(self) -> bool:
        """Write some of what waits, and return whether it was all."""
        try:
            if pipe_at(self._fd) != self._pipe:  # main has put another file in its place
                self._forget()
            for _ in range(WRITES_AT_ONCE):
                if not self._waiting:
                    return True
                record = self._waiting[0]
                written = self._os_write(self._fd, record)
                if written < len(record):
                    self._waiting[0] = record[written:]
                    self._waiting_bytes -= written
                    break
                self._waiting.popleft()
                self._waiting_bytes -= written + _RECORD_BYTES
        except BlockingIOError:
            pass
        except OSError:  # main has closed it, or the task is gone
            self._forget()
        return False

    def _forget(self) -> None:
        self._waiting.clear()
        self._waiting_bytes = 0
