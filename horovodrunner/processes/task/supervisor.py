"""One worker from its job to its end. Runs in: the task (np < 0: the driver)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from horovodrunner.flows.logs.lines import prefix_lines
from horovodrunner.pickling.buffers import Layout
from horovodrunner.placement.topology import Slot
from horovodrunner.processes.task.coordinator import RankEvents
from horovodrunner.processes.task.process import (
    DRAIN_SECONDS,
    ExitStatus,
    WorkerProcess,
    describe_exit,
)
from horovodrunner.wire.frames import Frame
from horovodrunner.wire.job import (
    EXIT_WITHOUT_PIPES,
    Failure,
    FailureKind,
    Outcome,
    WorkerSpec,
    speaks_of_peer_loss,
)

__all__ = ["Supervisor", "WorkerServices"]

TEARDOWN_SECONDS = 30.0
"""How long a worker may take to leave after main returned, before it is stopped."""

LAST_LINES = 10
LAST_BYTES = 4096
"""So much of its standard error is shown of a worker that left without a word."""


class WorkerServices(Protocol):
    """What a worker asks its task for while main runs."""

    async def latest_checkpoint(self) -> dict[str, Any]:
        """Say where main goes on: the fields of the answer."""

    def checkpoint_saved(self, step: int, directory: Path) -> None:
        """Take over a checkpoint that rank 0 has written."""

    def result_written(self, layout: Layout) -> None:
        """Take over what rank 0's main returned."""


class Supervisor:
    """Gives a worker its job, passes on what it reports, and says how it ended.

    Parameters
    ----------
    worker
        The process.
    slot
        Its place in the run.
    events
        Takes what there is to tell about the rank.
    log
        Takes the rank's whole, prefixed lines for this task's own log.
    services
        What the worker may ask for.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        slot: Slot,
        events: RankEvents,
        log: Callable[[bytes], None],
        services: WorkerServices,
    ) -> None:
        self._worker = worker
        self._slot = slot
        self._events = events
        self._log = log
        self._services = services
        self._reported: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._answers: list[asyncio.Task[None]] = []
        self._last_stderr = b""
        self._ready_at = 0.0
        self._part_of_life = "before main was called"

    async def run(self, call: bytes, spec: WorkerSpec) -> Outcome:
        """Supervise the worker until it has ended.

        Parameters
        ----------
        call
            The pickled ``(main, kwargs)``.
        spec
            The worker's slot.

        Returns
        -------
        Outcome
            What main did; neither success nor failure when the worker was stopped.
        """
        worker = self._worker
        readers = [
            asyncio.create_task(worker.read_output(self._on_lines)),
            asyncio.create_task(worker.read_reports(self._on_frame)),
        ]
        others = [
            asyncio.create_task(worker.send_job(call, spec.to_header())),
            asyncio.create_task(self._stop_when_slow_to_leave()),
        ]
        try:
            status = await worker.wait()
            worker.catch_up()
            await asyncio.wait(readers, timeout=DRAIN_SECONDS)
            if readers[1].done() and (error := readers[1].exception()) is not None:
                self._part_of_life = f"after a report that cannot be read ({error})"
        finally:
            tasks = [*readers, *others, *self._answers]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._reported.done():
            return self._reported.result()
        outcome = Outcome()
        if not worker.was_stopped(status):
            outcome = Outcome(failure=self._silent_end(status))
        self._events.ended(self._slot.rank, outcome)
        return outcome

    def _on_frame(self, frame: Frame) -> None:
        rank = self._slot.rank
        if frame.kind in ("message", "notice", "outcome"):
            self._worker.catch_up()  # what was printed before it comes before it
        if frame.kind == "message":
            self._events.message(rank, bytes(frame.body))
        elif frame.kind == "notice":
            self._events.notice(rank, str(frame.header["key"]), bytes(frame.body))
        elif frame.kind == "ready":
            self._worker.shows_stacks = True
            self._ready_at = float(frame.header["at"])
        elif frame.kind == "started":
            self._part_of_life = "before main returned (os._exit?)"
            self._events.started(rank)
        elif frame.kind == "main_ended":
            self._part_of_life = "after main had ended, before it could be reported how"
        elif frame.kind == "times":
            self._events.times(rank, self._spans(frame.header))
        elif frame.kind == "state":
            fields = {name: value for name, value in frame.header.items() if name != "kind"}
            self._events.state(rank, fields)
        elif frame.kind == "latest":
            self._answers.append(asyncio.create_task(self._answer_latest()))
        elif frame.kind == "checkpoint":
            directory = Path(frame.header["directory"])
            self._services.checkpoint_saved(int(frame.header["step"]), directory)
        elif frame.kind == "outcome" and not self._reported.done():
            outcome = Outcome.from_frame(frame.header, frame.body)
            self._reported.set_result(outcome)
            if outcome.success is not None and outcome.success.layout:
                self._services.result_written(outcome.success.layout)
            self._events.ended(rank, outcome)

    def _spans(self, told: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
        spawned, ready = self._worker.spawned_at, self._ready_at
        began, ended = told["warmed"]
        if ended > spawned:  # the warm parent had to import first, and then forked it
            ready = max(began, spawned)
        return {
            "worker spawn": (spawned, ready),
            "imports": (ready, told["imported_at"]),
            **told["times"],
        }

    def _on_lines(self, stream: str, lines: bytes) -> None:
        if stream == "stderr":
            self._last_stderr = (self._last_stderr + lines[-LAST_BYTES:])[-LAST_BYTES:]
        self._events.lines(self._slot.rank, stream, lines)
        self._log(prefix_lines(lines, self._slot.rank, stream))

    async def _answer_latest(self) -> None:
        self._worker.answer("latest", **await self._services.latest_checkpoint())

    async def _stop_when_slow_to_leave(self) -> None:
        await asyncio.wait([self._reported])
        await asyncio.sleep(TEARDOWN_SECONDS)
        text = (
            f"HorovodRunner: rank {self._slot.rank} is still there {TEARDOWN_SECONDS:g} s after "
            "main returned (a thread that is not a daemon?); it is stopped\n"
        )
        self._on_lines("stderr", text.encode(errors="backslashreplace"))
        self._worker.stop()

    def _silent_end(self, status: ExitStatus) -> Failure:
        text, exit_code, signal_name = describe_exit(
            status, self._worker.killed_by_kernel(), self._part_of_life
        )
        last_lines = self._last_lines()
        return Failure(
            rank=self._slot.rank,
            host=self._slot.host,
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
