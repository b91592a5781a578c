"""What main() can ask for while it runs. Runs in: the worker.

Called elsewhere (a notebook, a unit test of the training function), the same functions do the
nearest thing that makes sense there.
"""

from __future__ import annotations

import os
import threading

from horovodrunner.core.frames import encode_frame

__all__ = ["MAX_MESSAGE_CHARACTERS", "TaskLink", "log_to_driver"]

MAX_MESSAGE_CHARACTERS = 4000
_TRUNCATED = "...(truncated)"


class TaskLink:
    """The worker's end of the pipe to its task.

    Parameters
    ----------
    report_fd
        File descriptor to write frames to.
    """

    def __init__(self, report_fd: int) -> None:
        self._report_fd = report_fd
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()

    @property
    def is_usable(self) -> bool:
        """False in a process forked from the worker, whose writes could tear the worker's own."""
        return os.getpid() == self._owner_pid

    def send(self, kind: str, body: bytes = b"", **header: object) -> None:
        """Write one frame as a whole.

        Parameters
        ----------
        kind
            What the message is.
        body
            Its bytes.
        **header
            More JSON-compatible fields.
        """
        with self._lock:
            self._write(encode_frame(kind, body, **header))
            self._write(body)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._report_fd, view) :]


_link: TaskLink | None = None


def set_link(link: TaskLink) -> None:
    """Say which task this process works for.

    Parameters
    ----------
    link
        The pipe to it.
    """
    global _link
    _link = link


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
    if _link is None or not _link.is_usable:
        print(message, flush=True)  # noqa: T201 - that is what it is for
        return
    _link.send("message", message.encode(errors="replace"))
