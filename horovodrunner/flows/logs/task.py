"""The ranks' output on its way, and a task's own log, which may stand still. Runs in: the task."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable

from horovodrunner.flows.logs.lines import count_lines, missing_mark, prefix_lines
from horovodrunner.wire.events import Event, Handlers, Lines, Message, Note, Notice, Sink
from horovodrunner.wire.stream import Connection

__all__ = ["LineSender", "MergedLog", "TaskLog", "own_line", "what_the_log_keeps"]

MAX_WAITING_BYTES = 8 * 1024 * 1024
"""So much may wait to be written; then whoever writes has to wait, too."""

MAX_UNSENT_BYTES = 8 * 1024 * 1024
"""Log lines that would make more than this wait for a slow peer are dropped and counted."""

PATIENCE_SECONDS = 1.0
"""A log that makes no room for so long loses lines from then on, and they are counted."""

FLUSH_SECONDS = 5.0
"""How long closing waits for the log to take what is left."""


def own_line(text: str) -> bytes:
    """Return a line of the run's own for a log."""
    return f"HorovodRunner: {text}\n".encode(errors="backslashreplace")


class MergedLog:
    """All ranks' output on partition 0: to its log, and on to the driver."""

    def __init__(self, log: Callable[[bytes], None], to_driver: Sink) -> None:
        self._log = log
        self._to_driver = to_driver
        self._noticed: set[str] = set()
        self.handlers: Handlers = {Lines: self.lines, Notice: self._take_notice}

    def lines(self, event: Lines) -> None:
        """Merge lines of one rank into the log."""
        self._log(prefix_lines(event.lines, event.rank, event.stream))
        self._to_driver(event)

    def note(self, text: str, *, routine: bool = False) -> None:
        """Show the user a line on the driver."""
        self._to_driver(Note(text, routine))

    def say(self, text: str) -> None:
        """Show the user a line on the driver, and in the log."""
        self._log(own_line(text))
        self._to_driver(Note(text))

    def _take_notice(self, event: Notice) -> None:
        if event.key not in self._noticed:
            self._noticed.add(event.key)
            self.say(event.text)


def what_the_log_keeps(log: Callable[[bytes], None]) -> Handlers:
    """Return what to do with events for a driver that cannot be reached: no message is lost."""
    return {
        Message: lambda event: log(
            prefix_lines(event.text.encode(errors="replace") + b"\n", event.rank, "log_to_driver")
        ),
        Note: lambda event: log(own_line(event.text)),
    }


class LineSender:
    """Sends events; drops lines while the peer reads too slowly, and says how many.

    What says so is a line of the last rank's, or a note where the lines are those `of_all_ranks`.
    """

    def __init__(self, connection: Connection, *, of_all_ranks: bool = False) -> None:
        self._connection = connection
        self._of_all_ranks = of_all_ranks
        self._dropped_lines = 0
        self._last_dropped = Lines(0, "stdout", b"")

    def send(self, event: Event) -> None:
        """Send an event, or drop it."""
        if not isinstance(event, Lines):
            self._connection.send(event)
        elif self._connection.unsent_bytes > MAX_UNSENT_BYTES:
            self._dropped_lines += count_lines(event.lines)
            self._last_dropped = event
        else:
            self._report_dropped_lines()
            self._connection.send(event)

    async def close(self) -> None:
        """Send what is waiting, for a bounded time, and close the connection."""
        self._report_dropped_lines()
        await self._connection.close()

    def _report_dropped_lines(self) -> None:
        if self._dropped_lines:
            why = "the reader was too slow; the executor's log has them"
            mark = missing_mark(self._dropped_lines, why)
            self._dropped_lines = 0
            last = self._last_dropped
            self._connection.send(
                Note(mark.decode().partition(": ")[2].rstrip("\n"))
                if self._of_all_ranks
                else Lines(last.rank, last.stream, mark)
            )


class TaskLog:
    """Writes lines to a file descriptor in a thread, so that nobody else waits for it for long.

    The executor's log is where every line should be found. So a log that is merely slower than the
    ranks holds them up; one that stands still does so for `PATIENCE_SECONDS`, once.
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
        """Take whole lines; wait for room, and drop them when there is none in time."""
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
