"""A task's own log, which may be slow or stand still. Runs in: the task."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque

from horovodrunner.flows.logs.lines import count_lines, missing_mark

__all__ = ["TaskLog"]

MAX_WAITING_BYTES = 8 * 1024 * 1024
"""So much may wait to be written; then whoever writes has to wait, too."""

PATIENCE_SECONDS = 1.0
"""A log that makes no room for so long loses lines from then on, and they are counted."""

FLUSH_SECONDS = 5.0
"""How long closing waits for the log to take what is left."""


class TaskLog:
    """Writes lines to a file descriptor in a thread, so that nobody else waits for it for long.

    The executor's log is where every line should be found. So a log that is merely slower than the
    ranks holds them up; one that stands still does so for `PATIENCE_SECONDS`, once.

    Parameters
    ----------
    fd
        File descriptor to write to; it stays open.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._stands_still = False
        self._dropped_lines = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="horovodrunner-log", daemon=True)
        self._thread.start()

    def write(self, lines: bytes) -> None:
        """Take whole lines; waits for room, and drops them when there is none in time.

        Parameters
        ----------
        lines
            Whole lines.
        """
        with self._changed:
            if not self._stands_still:
                self._stands_still = not self._changed.wait_for(self._has_room, PATIENCE_SECONDS)
            if self._stands_still:
                self._dropped_lines += count_lines(lines)
            else:
                self._put(lines)

    def close(self) -> None:
        """Write what is waiting, for a bounded time."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(FLUSH_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                lines = self._waiting.popleft()
            self._write_all(lines)
            with self._changed:
                self._waiting_bytes -= len(lines)
                # Not before half of it is free: else a log that crawls would hold up every line.
                if self._stands_still and self._waiting_bytes <= MAX_WAITING_BYTES // 2:
                    self._stands_still = False
                    self._report_dropped_lines()
                self._changed.notify_all()

    def _write_all(self, lines: bytes) -> None:
        view = memoryview(lines)
        with contextlib.suppress(OSError):  # there is no log any more
            while view:
                view = view[os.write(self._fd, view) :]

    def _has_room(self) -> bool:
        return self._waiting_bytes <= MAX_WAITING_BYTES

    def _put(self, lines: bytes) -> None:
        self._waiting.append(lines)
        self._waiting_bytes += len(lines)
        self._changed.notify_all()

    def _report_dropped_lines(self) -> None:
        if self._dropped_lines:
            self._put(missing_mark(self._dropped_lines, "this log stood still"))
            self._dropped_lines = 0
