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
from typing import TYPE_CHECKING, Any, NoReturn

from horovodrunner.flows.metrics.worker import MetricsPipe
from horovodrunner.flows.saving.worker import SaveCalls
from horovodrunner.processes.worker.context import TaskLink
from horovodrunner.processes.worker.watch import MainThreadWatch
from horovodrunner.wire.events import (
    PREFIX_BYTES,
    Event,
    Job,
    Latest,
    MainEnded,
    Measure,
    Notice,
    Proceed,
    RangesRead,
    Started,
    WorkerTimes,
    decode,
    dispatcher,
    parse_prefix,
    refuse,
)
from horovodrunner.wire.signals import EXIT_WITHOUT_PIPES, pipe_at

if TYPE_CHECKING:
    from horovodrunner.flows.profile.worker import StackProfile

__all__ = ["ControlPipe", "leave_without_pipes"]

_TOO_MANY_REPORTS = "they came faster than they could be read; report once in a while"

SAMPLE_SECONDS = 1.0
"""How often the main thread is looked at, at least; a shorter call is never seen to wait."""

PROFILE_SECONDS = 30.0
"""How often it is reported where main's time goes, at least; at first more often."""


class ControlPipe:
    """Waits for what the task sends, in a thread of its own, and for the pipe's end.

    The pipe stays open as long as the task lives. When it ends, this process and all it started
    in its process group are ended.
    """

    _now, _monotonic = staticmethod(time.time), staticmethod(time.monotonic)
    """Kept here: main may put clocks of its own in their place, as freezegun does."""

    def __init__(self, control_fd: int, link: TaskLink, metrics: MetricsPipe) -> None:
        self._control_fd = control_fd
        self._pipe = pipe_at(control_fd)
        self._link = link
        self._metrics = metrics
        self.saves = SaveCalls(link.send)
        self._watch = MainThreadWatch()
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._steps: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._asking = threading.Lock()
        self._rank = -1
        self._beat_seconds = SAMPLE_SECONDS
        self._next_beat = 0.0
        self._profile: StackProfile | None = None
        self._profile_began = self._next_profile = 0.0
        self._main_runs = False
        self._main_began = 0.0
        self._times: dict[str, tuple[float, float]] = {}
        threading.Thread(target=self._serve, name="horovodrunner-control", daemon=True).start()

    def wait_for_job(self) -> tuple[Job, bytes]:
        """Wait for the job, and for the call, which is large and is not kept."""
        job = self._jobs.get()
        return job.replace(call=b""), job.call

    def wait_for_step(self) -> None:
        """Wait until the task lets the worker go on with what comes before main."""
        self._steps.get()

    def measured(self, began: float) -> None:
        """Note that the backend was tried."""
        self._times["preflight"] = (began, self._now())

    def unpickled(self, began: float) -> None:
        """Note that main was unpickled, or could not be, and the modules that it names imported."""
        self._times["unpickle"] = (began, self._now())

    def main_begins(self, left_early: bytes = b"") -> None:
        """Report it, and from now on where main is."""
        self._main_began = self._now()
        self._profile_began = self._monotonic()
        self._next_profile = self._profile_began + SAMPLE_SECONDS
        self._watch.begin()
        self._link.send(Started(self._rank, left_early))
        self._main_runs = True

    def main_ends(self) -> None:
        """Report it, and no longer where main is."""
        self._main_runs = False
        self._times["main"] = (self._main_began, self._now())
        self.saves.main_ends()
        with contextlib.suppress(OSError):  # the outcome will meet it, too
            self._metrics.finish()
            if self._metrics.dropped:
                text = f"{self._metrics.dropped} reports of rank {self._rank} are lost: "
                self._link.send(Notice(self._rank, "metrics", text + _TOO_MANY_REPORTS))
            if self._profile is not None:
                with contextlib.suppress(Exception):  # main may have left little room for it
                    self._link.send(self._profile.event(self._monotonic() - self._profile_began))
            self._link.send(MainEnded(self._rank))

    def times(self, imported_at: float, warmed: tuple[float, float]) -> WorkerTimes:
        """Return when main was unpickled and when it ran, as far as that happened."""
        return WorkerTimes(self._rank, imported_at, warmed, self._times)

    def ask(self, question: Event) -> Any:
        """Ask the task for something and wait for the answer."""
        with self._asking:
            self._link.send(question)
            return self._answers.get()

    def _serve(self) -> None:
        try:
            self._take_what_comes()
        except OSError as error:
            if error.errno == errno.EBADF:
                leave_without_pipes()
            # Else the task went just while something was being reported.
        except BaseException:  # noqa: BLE001 - nobody would end this process any more
            with contextlib.suppress(BaseException):  # standard error is main's
                traceback.print_exc()
        self._end_everything()

    def _take_what_comes(self) -> None:
        incoming = select.poll()  # select() takes no descriptor from 1024 on
        incoming.register(self._control_fd, select.POLLIN)
        steps = {Measure: self._steps.put, Proceed: self._steps.put}
        answers = {Latest: self._answers.put, RangesRead: self._answers.put}
        take = dispatcher([{Job: self._take_job}, answers, steps, self.saves.handlers], refuse)
        while True:
            pause = min(SAMPLE_SECONDS, self._beat_seconds)
            if not incoming.poll(pause * 1000):
                self._look_at_main()
                continue
            if pipe_at(self._control_fd) != self._pipe:
                leave_without_pipes()
            event = self._receive()
            if event is None:
                return
            take(event)
            del event  # a call may be large

    def _take_job(self, job: Job) -> None:
        self._rank, self._beat_seconds = job.rank, job.beat_seconds
        self.saves.begin(job)
        if job.profiles:
            from horovodrunner.flows.profile.worker import StackProfile

            self._profile = StackProfile(job.rank)
        self._jobs.put(job)

    def _look_at_main(self) -> None:
        if not self._main_runs:
            return
        try:
            beat = self._watch.sample(self._rank, self._profile)
        except Exception:  # noqa: BLE001 - names in main's frames may be any object
            return
        if self._monotonic() >= self._next_beat:
            self._next_beat = self._monotonic() + self._beat_seconds * 0.9
            self._link.send_unless_busy(beat)
        now = self._monotonic()
        if self._profile is not None and now >= self._next_profile:
            seconds = now - self._profile_began
            self._next_profile = now + min(PROFILE_SECONDS, seconds)
            self._link.send_unless_busy(self._profile.event(seconds))

    def _end_everything(self) -> None:
        """End this process group: the task is gone, or wants us gone."""
        if os.getpgrp() == os.getpid():  # so started by the task: our children go with us
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    def _receive(self) -> Event | None:
        prefix = self._read(PREFIX_BYTES)
        if prefix is None:
            return None
        header_bytes, body_bytes = parse_prefix(bytes(prefix), None)
        header = self._read(header_bytes)
        body = self._read(body_bytes)
        if header is None or body is None:
            return None
        return decode(bytes(header), body)

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
