"""One worker from its job to its end. Runs in: the task (np < 0: the driver)."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from horovodrunner.flows.logs.task import own_line
from horovodrunner.flows.outcome.outcome import Failure, FailureKind, Outcome, speaks_of_peer_loss
from horovodrunner.pickling.buffers import Layout
from horovodrunner.processes.task.exits import ExitStatus, describe_exit
from horovodrunner.processes.task.process import DRAIN_SECONDS, METRICS, WorkerProcess
from horovodrunner.wire.events import (
    Ended,
    Event,
    Job,
    Lines,
    MainEnded,
    Points,
    RankPhases,
    Ready,
    Sink,
    Stack,
    Started,
    WorkerTimes,
    dispatcher,
)
from horovodrunner.wire.signals import EXIT_WITHOUT_PIPES

__all__ = ["TEARDOWN_SECONDS", "Supervisor"]

TEARDOWN_SECONDS = 30.0
"""How long a worker may take to leave after main returned, before it is stopped."""

LAST_LINES = 10
LAST_BYTES = 4096
"""So much of its standard error is shown of a worker that left without a word."""

_logger = logging.getLogger(__name__)


class Supervisor:
    """Sends a worker its job, takes what it reports, and finds out how it ended.

    `emit` takes the events that do not end here. `answers` has what answers the worker's questions;
    `on_result` takes the layout of what rank 0's main returned, which is in the worker's file.
    `beside` runs as long as the worker does.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        job: Job,
        emit: Sink,
        answers: Mapping[type[Event], Callable[[Any], Awaitable[Event]]],
        on_result: Callable[[Layout], None],
        *,
        beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._worker = worker
        self._job = job
        self._pass_on = emit
        self._on_result = on_result
        self._beside = beside
        self._reported: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._answers: list[asyncio.Task[None]] = []
        self._has_job = asyncio.Event()
        self._last_stderr = b""
        self._ready_at = 0.0
        self._part_of_life = "before main was called"
        self._left_early = b""
        self._emit = dispatcher(
            [
                {
                    Ready: self._take_ready,
                    Started: self._take_start,
                    MainEnded: self._take_end_of_main,
                    WorkerTimes: self._take_times,
                    Ended: self._take_outcome,
                },
                {asked: functools.partial(self._answer, how) for asked, how in answers.items()},
            ],
            otherwise=emit,
        )

    async def run(self) -> Outcome:
        """Supervise the worker until it has ended."""
        worker = self._worker
        readers = [
            asyncio.create_task(worker.read_output(self._on_lines)),
            asyncio.create_task(worker.read_events(self._on_event)),
        ]
        others = [
            asyncio.create_task(self._send_job()),
            asyncio.create_task(self._stop_when_slow_to_leave()),
        ]
        if self._beside is not None:
            others.append(asyncio.create_task(self._beside()))
        try:
            status = await worker.wait()
            _logger.debug("rank %d: its process ended with %d", self._job.rank, status)
            worker.catch_up()
            await asyncio.wait(readers, timeout=DRAIN_SECONDS)
            if readers[1].done() and (error := readers[1].exception()) is not None:
                self._part_of_life = f"after a report that cannot be read ({error})"
        finally:
            tasks = [*readers, *others, *self._answers]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if status == 0 and self._left_early:
            self._take_outcome(Ended(self._job.rank, self._left_early))
        if self._reported.done():
            return self._reported.result()
        outcome = Outcome()
        if not worker.was_stopped(status):
            outcome = Outcome(failure=self._silent_end(status))
        self._pass_on(Ended(self._job.rank, outcome.to_bytes()))
        return outcome

    def stop(self) -> None:
        """Ask the worker to end."""
        self._worker.stop()

    def tell(self, event: Event) -> None:
        """Send the worker an event, once it has its job."""

        async def send() -> None:
            await self._has_job.wait()
            await self._worker.send(event)

        self._answers.append(asyncio.create_task(send()))

    def show_stack(self) -> None:
        """Find out where the worker's threads are, and report it."""

        async def show() -> None:
            text = "(no stack: main has not been called, or the process has ended)"
            if self._ready_at and not self._worker.has_ended():
                text = await self._worker.stack()
            self._pass_on(Stack(self._job.rank, text.encode(errors="backslashreplace")))

        self._answers.append(asyncio.create_task(show()))

    async def _send_job(self) -> None:
        await self._worker.send(self._job)
        self._has_job.set()

    def _on_event(self, event: Event) -> None:
        self._worker.catch_up()  # what was printed before it comes before it
        self._emit(event)

    def _take_ready(self, event: Ready) -> None:
        self._ready_at = event.at

    def _take_start(self, event: Started) -> None:
        self._part_of_life = "before main returned (os._exit?)"
        self._left_early = event.left_early
        self._pass_on(event)

    def _take_end_of_main(self, event: MainEnded) -> None:
        self._part_of_life = "after main had ended, before it could be reported how"

    def _take_times(self, event: WorkerTimes) -> None:
        spawned, ready = self._worker.spawned_at, self._ready_at
        began, ended = event.warmed
        if ended > spawned:  # the warm parent had to import first, and then forked it
            ready = max(began, spawned)
        own = {"worker spawn": (spawned, ready), "imports": (ready, event.imported_at)}
        self._pass_on(RankPhases(event.rank, {**own, **event.spans}))

    def _answer(self, how: Callable[[Event], Awaitable[Event]], event: Event) -> None:
        async def answer() -> None:
            await self._worker.send(await how(event))

        self._answers.append(asyncio.create_task(answer()))

    def _take_outcome(self, event: Ended) -> None:
        if self._reported.done():
            return
        outcome = Outcome.from_bytes(event.outcome)
        self._reported.set_result(outcome)
        if outcome.success is not None and outcome.success.layout:
            self._on_result(outcome.success.layout)
        self._pass_on(event)

    def _on_lines(self, stream: str, lines: bytes) -> None:
        if stream == METRICS:
            self._pass_on(Points(self._job.rank, lines))
            return
        if stream == "stderr":
            self._last_stderr = (self._last_stderr + lines[-LAST_BYTES:])[-LAST_BYTES:]
        self._pass_on(Lines(self._job.rank, stream, lines))

    async def _stop_when_slow_to_leave(self) -> None:
        await asyncio.wait([self._reported])
        await asyncio.sleep(TEARDOWN_SECONDS)
        text = (
            f"rank {self._job.rank} is still there {TEARDOWN_SECONDS:g} s after main returned "
            "(a thread that is not a daemon?); it is stopped"
        )
        self._on_lines("stderr", own_line(text))
        self._worker.stop()

    def _silent_end(self, status: ExitStatus) -> Failure:
        text, exit_code, signal_name = describe_exit(
            status, self._worker.killed_by_kernel, self._part_of_life
        )
        last_lines = self._last_lines()
        return Failure(
            rank=self._job.rank,
            host=self._job.host,
            summary=text,
            # What main closed once it closes again: another attempt would end the same way.
            kind=FailureKind.EXCEPTION if status == EXIT_WITHOUT_PIPES else FailureKind.PROCESS,
            exit_code=exit_code,
            signal=signal_name,
            # Horovod's background thread aborts the process when a peer's connection breaks.
            after_peer_loss=signal_name == "SIGABRT"
            and (not last_lines or speaks_of_peer_loss(last_lines)),
            last_lines=last_lines,
        )

    def _last_lines(self) -> str:
        lines = self._last_stderr.decode(errors="replace").splitlines()
        if len(self._last_stderr) == LAST_BYTES:
            del lines[0]  # its beginning is cut off
        return "\n".join(lines[-LAST_LINES:])
