"""The control pipe: the job and answers come in; its end ends this process. Runs in: the worker."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import select
import signal
import threading
import time
import traceback
from typing import Any, NoReturn

from horovodrunner.processes.worker.context import TaskLink, pipe_at
from horovodrunner.processes.worker.watch import MainThreadWatch
from horovodrunner.wire.frames import PREFIX_BYTES, Frame, parse_header, parse_prefix
from horovodrunner.wire.job import EXIT_WITHOUT_PIPES, WorkerSpec

__all__ = ["ControlPipe", "leave_without_pipes"]

_Bytes = bytes | bytearray | memoryview

SAMPLE_SECONDS = 1.0
"""How often the main thread is looked at, at least; a shorter call is never seen to wait."""


class ControlPipe:
    """Waits for what the task sends, in a thread of its own, and for the pipe's end.

    The pipe stays open as long as the task lives. When it ends, this process and all it started
    in its process group are ended.

    Parameters
    ----------
    control_fd
        Read end of the pipe whose write end only the task holds.
    link
        The pipe to the task.
    """

    _now, _monotonic = staticmethod(time.time), staticmethod(time.monotonic)
    """Kept here: main may put clocks of its own in their place, as freezegun does."""

    def __init__(self, control_fd: int, link: TaskLink) -> None:
        self._control_fd = control_fd
        self._pipe = pipe_at(control_fd)
        self._link = link
        self._watch = MainThreadWatch()
        self._jobs: queue.SimpleQueue[tuple[WorkerSpec, _Bytes]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._asking = threading.Lock()
        self._beat_seconds = SAMPLE_SECONDS
        self._next_beat = 0.0
        self._main_runs = False
        self._main_began = 0.0
        self._times: dict[str, tuple[float, float]] = {}
        threading.Thread(target=self._serve, name="horovodrunner-control", daemon=True).start()

    def wait_for_job(self) -> tuple[WorkerSpec, _Bytes]:
        """Wait for the job.

        Returns
        -------
        tuple of WorkerSpec and bytes-like
            The slot and the pickled call; nothing else keeps the call, which may be large.
        """
        return self._jobs.get()

    def unpickled(self, began: float) -> None:
        """Note that main was unpickled, or could not be, and the modules that it names imported.

        Parameters
        ----------
        began
            Seconds since the epoch.
        """
        self._times["unpickle"] = (began, self._now())

    def main_begins(self) -> None:
        """Tell the task so, and from now on where main is."""
        self._main_began = self._now()
        self._link.send("started")
        self._main_runs = True

    def main_ends(self) -> None:
        """Tell the task so, and no longer where main is."""
        self._main_runs = False
        self._times["main"] = (self._main_began, self._now())
        with contextlib.suppress(OSError):  # the outcome will meet it, too
            self._link.send("main_ended")

    def times(self) -> dict[str, tuple[float, float]]:
        """Return when main was unpickled and when it ran, as far as that happened.

        Returns
        -------
        dict of (float, float)
            Begin and end, in seconds since the epoch.
        """
        return self._times

    def ask(self, kind: str) -> dict[str, Any]:
        """Ask the task something and wait for the answer.

        Parameters
        ----------
        kind
            The question.

        Returns
        -------
        dict
            The answer's fields.
        """
        with self._asking:
            self._link.send(kind)
            return self._answers.get()

    def _serve(self) -> None:
        try:
            self._take_what_comes()
        except OSError as error:
            if error.errno == errno.EBADF:
                leave_without_pipes()
            # Else the task went just while it was being told something.
        except BaseException:  # noqa: BLE001 - nobody would end this process any more
            with contextlib.suppress(BaseException):  # standard error is main's
                traceback.print_exc()
        self._end_everything()

    def _take_what_comes(self) -> None:
        incoming = select.poll()  # select() takes no descriptor from 1024 on
        incoming.register(self._control_fd, select.POLLIN)
        while True:
            pause = min(SAMPLE_SECONDS, self._beat_seconds)
            if not incoming.poll(pause * 1000):
                self._look_at_main()
                continue
            if pipe_at(self._control_fd) != self._pipe:
                leave_without_pipes()
            frame = self._receive()
            if frame is None:
                return
            fields = {name: value for name, value in frame.header.items() if name != "kind"}
            if frame.kind == "job":
                spec = WorkerSpec.from_header(fields)
                self._beat_seconds = spec.beat_seconds
                self._jobs.put((spec, frame.body))
            else:
                self._answers.put(fields)
            del frame

    def _look_at_main(self) -> None:
        if not self._main_runs:
            return
        try:
            state = self._watch.sample()
        except Exception:  # noqa: BLE001 - names in main's frames may be any object
            return
        if self._monotonic() >= self._next_beat:
            self._next_beat = self._monotonic() + self._beat_seconds * 0.9
            self._link.send_unless_busy("state", **state)

    def _end_everything(self) -> None:
        """End this process group: the task is gone, or wants us gone."""
        if os.getpgrp() == os.getpid():  # so started by the task: our children go with us
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    def _receive(self) -> Frame | None:
        prefix = self._read(PREFIX_BYTES)
        if prefix is None:
            return None
        header_bytes, body_bytes = parse_prefix(bytes(prefix), None)
        header = self._read(header_bytes)
        body = self._read(body_bytes)
        if header is None or body is None:
            return None
        return Frame(parse_header(bytes(header)), body)

    def _read(self, count: int) -> bytearray | None:
        """Read so many bytes, and not one more: what follows is to be seen by poll()."""
        data = bytearray(count)
        view = memoryview(data)
        while view:
            read = os.readv(self._control_fd, [view])
            if not read:
                return None
            view = view[read:]
        return data


def leave_without_pipes() -> NoReturn:
    """End this process, which can neither tell its task anything nor see it go."""
    with contextlib.suppress(OSError):
        os.write(
            2,
            b"HorovodRunner: main has closed the descriptors by which this process talks to its "
            b"task (os.closerange?), so that nothing more of it can be reported\n",
        )
    os._exit(EXIT_WITHOUT_PIPES)
