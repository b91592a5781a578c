"""What main() can ask for while it runs. Runs in: the worker.

Called elsewhere (a notebook, a unit test of the training function), the same functions do the
nearest thing that makes sense there.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from horovodrunner.flows.logs.showing import show_text
from horovodrunner.flows.metrics.worker import MetricsPipe
from horovodrunner.flows.saving.worker import SaveCalls
from horovodrunner.wire.events import Event, Job, Message, Notice, encode
from horovodrunner.wire.signals import pipe_at

__all__ = [
    "MAX_MESSAGE_CHARACTERS",
    "TaskLink",
    "WorkerContext",
    "current_context",
    "inherited_context",
    "log_to_driver",
    "notice",
    "set_context",
]

MAX_MESSAGE_CHARACTERS = 4000
_TRUNCATED = "...(truncated)"


class TaskLink:
    """The worker's end of the pipe to its task."""

    _os_write = staticmethod(os.write)  # main may put another in its place

    def __init__(self, report_fd: int) -> None:
        self._report_fd = report_fd
        self._pipe = pipe_at(report_fd)
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()

    @property
    def is_usable(self) -> bool:
        """False in a process forked from the worker, whose writes could tear the worker's own."""
        return os.getpid() == self._owner_pid

    def send(self, event: Event) -> None:
        """Write one event as a whole; a process that main forked writes nothing."""
        if self.is_usable:
            with self._lock:
                self._write(*encode(event))

    def send_unless_busy(self, event: Event) -> None:
        """Write one event, or nothing when another thread is just writing a long one."""
        if self._lock.acquire(blocking=False):
            try:
                self._write(*encode(event))
            finally:
                self._lock.release()

    def _write(self, *parts: bytes) -> None:
        if pipe_at(self._report_fd) != self._pipe:
            raise OSError(errno.EBADF, "main has put another file in the place of this pipe")
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[self._os_write(self._report_fd, view) :]


class _AnswersQuestions(Protocol):
    saves: SaveCalls

    def ask(self, question: Event) -> Any: ...


@dataclass(frozen=True)
class WorkerContext:
    """What this process is within its run."""

    spec: Job
    link: TaskLink
    control: _AnswersQuestions
    metrics: MetricsPipe
    on_step: Callable[[int], None] | None = None
    """Called with each step that main gets to, where a test wants faults to happen."""
    on_latest: Callable[[], None] | None = None
    """Called when main asks for the latest checkpoint, in such a test."""


_context: WorkerContext | None = None
_notices: dict[str, str] = {}
"""What was said by this process, or waits until it has somebody to say it to."""


def set_context(context: WorkerContext) -> None:
    """Mark this process as a worker."""
    global _context
    _context = context
    for key, text in _notices.items():
        context.link.send(_notice(context, key, text))


def current_context() -> WorkerContext | None:
    """Return what this process is within its run."""
    return _context if _context is not None and _context.link.is_usable else None


def inherited_context() -> WorkerContext | None:
    """Return the same, also in a process that main forked, which must not use its pipes."""
    return _context


def _notice(context: WorkerContext, key: str, text: str) -> Notice:
    return Notice(context.spec.rank, key, text.encode(errors="replace").decode())


def notice(key: str, text: str) -> None:
    """Let the driver show something once, however often and on however many ranks it happens."""
    if key in _notices:
        return
    _notices[key] = text
    if (context := current_context()) is not None:
        context.link.send(_notice(context, key, text))


def log_to_driver(message: str) -> None:
    """Print a message on the driver, from any rank, whatever the driver's log verbosity is.

    Outside a run it prints here. The behaviour, the limit of 4000 characters included, is that
    of Databricks' documented ``sparkdl.horovod.log_to_driver``.

    Parameters
    ----------
    message
        Text; over 4000 characters it is cut and ends in ``...(truncated)``.

    Raises
    ------
    TypeError
        If `message` is not a str.

    Examples
    --------
    >>> log_to_driver("epoch 1: loss 0.25")
    epoch 1: loss 0.25
    """
    if not isinstance(message, str):
        raise TypeError(
            f"log_to_driver takes a str, got {type(message).__name__}: {message!r:.80}; "
            "use log_to_driver(str(value)) or an f-string"
        )
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = message[:MAX_MESSAGE_CHARACTERS] + _TRUNCATED
    context = current_context()
    if context is None:
        show_text(message + "\n")
        return
    text = message.encode(errors="replace").decode()
    context.link.send(Message(context.spec.rank, text))
