"""What partition 0 does beside running its workers: the run as a whole. Runs in: the task.

It is complete when it is made, which is once all tasks have met and every rank has its slot.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from horovodrunner.flows.artifacts.places import directory_of_task
from horovodrunner.flows.artifacts.task import bring_artifacts
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.checkpoints.task.latest import LatestCopy, LatestDecision
from horovodrunner.flows.checkpoints.task.parts import PartKeeper
from horovodrunner.flows.checkpoints.task.resumption import Resumption
from horovodrunner.flows.checkpoints.task.uploading import CheckpointUploader
from horovodrunner.flows.logs.task import MergedLog
from horovodrunner.flows.outcome.outcome import Failure, FailureKind, Outcome
from horovodrunner.flows.outcome.task import RunOutcome
from horovodrunner.flows.preflight.task import PreflightCheck
from horovodrunner.flows.results.task import ResultUploader
from horovodrunner.flows.saving.task import SaveAgreement
from horovodrunner.flows.telemetry.phases import Spans
from horovodrunner.flows.telemetry.task import Telemetry
from horovodrunner.formatting import in_one_line
from horovodrunner.placement.topology import Member, Slot
from horovodrunner.processes.task.context import TaskContext
from horovodrunner.processes.task.driver_link import DriverLink
from horovodrunner.processes.task.peers import PeerServer
from horovodrunner.processes.task.process import GRACE_SECONDS
from horovodrunner.processes.task.supervisor import TEARDOWN_SECONDS, Supervisor
from horovodrunner.wire.events import (
    Event,
    Failed,
    Handlers,
    Placed,
    SaveWanted,
    ShowStacks,
    Sink,
    Stop,
    Storing,
    dispatcher,
    refuse,
)
from horovodrunner.wire.upload import in_thread

__all__ = ["Leader", "written_file"]

STORING_SECONDS = 2.0
"""How often it is reported that a checkpoint is still on its way."""

STOP_SECONDS = GRACE_SECONDS + 2.0
"""How long partition 0 waits, once everything is to end, to hear that it has ended."""

_logger = logging.getLogger(__name__)


class Leader:
    """Coordinates a run from placed ranks to its outcome."""

    def __init__(
        self,
        job: JobSpec,
        context: TaskContext,
        driver: DriverLink,
        members: Sequence[Member],
        slots: Sequence[Slot],
        *,
        listening: socket.socket,
        scratch: Path,
        spans: Spans,
        stop_requested: asyncio.Event,
        saves_wanted: asyncio.Queue[SaveWanted],
    ) -> None:
        self._job = job
        self._context = context
        self._driver = driver
        self._slots = slots
        self._scratch = scratch
        self._stop_requested = stop_requested
        self._log = MergedLog(context.log, driver.emit)
        self._outcome = RunOutcome(slots)
        self._telemetry = Telemetry(slots, self._log, self._outcome, spans, driver.emit)
        self.results = ResultUploader(
            functools.partial(context.take_result, reaches_driver=driver.is_reached),
            on_error=functools.partial(self._fail, FailureKind.RESULT),
        )
        self._uploader: CheckpointUploader | None = None
        checkpoint_handlers: list[Handlers] = []
        if context.checkpoints is not None:
            parts = PartKeeper(context.checkpoints, self._emit)
            self._take_request = dispatcher([parts.requests], refuse)
            self._uploader = CheckpointUploader(
                context.checkpoints,
                self._log.note,
                self._checkpoint_failed,
                driver.emit,
                ask=self._ask_all,
                hosts={slot.rank: slot.host for slot in slots},
            )
            checkpoint_handlers = [self._uploader.handlers, parts.handlers]
        self._resumption = Resumption(job, self._log.note)
        decision = LatestDecision(
            context.checkpoints, members, self._log.note, on_found=self._resumption.found
        )
        self.latest = LatestCopy(
            context.checkpoints,
            scratch,
            ask=functools.partial(decision.answer, 0),
            tell=functools.partial(decision.fetched, 0),
        )
        self._preflight = PreflightCheck(
            members,
            slots,
            may_refuse=job.preflight == "refuse",
            note=self._log.note,
            refuse=lambda text: self._outcome.failed(Failure(None, slots[0].host, text)),
        )
        self._saving = SaveAgreement(
            [slot.rank for slot in slots],
            saves_wanted,
            stopping=self._outcome.stopping,
            note=self._log.note,
        )
        self.emit: Sink = dispatcher(
            [
                self._preflight.handlers,
                self._saving.handlers,
                {Storing: self._take_storing},
                self._log.handlers,
                self._outcome.handlers,
                self._telemetry.handlers,
                *checkpoint_handlers,
            ],
            otherwise=driver.emit,
        )
        self._peers = PeerServer(
            job.token,
            listening,
            slots,
            self.emit,
            outcome=self._outcome,
            latest=decision,
            on_lost=self._ranks_are_lost,
            log=context.log,
        )

    async def run(self, supervisors: Sequence[Supervisor]) -> Outcome:
        """Coordinate the run until its end; its own ranks are those of the supervisors."""
        await self._peers.start()
        self._driver.emit(Placed(tuple((s.partition, s.rank, s.host) for s in self._slots)))
        self._log.note(_placement_in_words(self._slots), routine=True)

        def show_stacks() -> None:
            for supervisor in supervisors:
                supervisor.show_stack()
            self._peers.broadcast(ShowStacks())

        watchers: list[Coroutine[Any, Any, object]] = [
            self._peers.watch_joining(),
            self._stop_on_request(),
            self._stop_all(supervisors),
            self._telemetry.watch(self._job.stall_timeout, show_stacks),
            self._telemetry.tell_states(),
            self._let_ranks_save(supervisors),
        ]
        if self._uploader is not None:
            watchers.append(self._uploader.run())
        if self._job.preflight:
            watchers.append(self._check_hosts(supervisors))
        own = asyncio.gather(*(supervisor.run() for supervisor in supervisors))
        tasks: list[asyncio.Future[Any]] = [own, *map(asyncio.create_task, watchers)]
        try:
            return await self._run_to_end(own)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.results.close()
            await self._peers.close()

    async def _run_to_end(self, own: asyncio.Future[list[Outcome]]) -> Outcome:
        await self._outcome.wait_for_end(STOP_SECONDS)
        failure = self._outcome.summary(self._telemetry.waiting_in())
        _logger.debug("the ranks have ended, or are to: %s", failure or "all is well")
        if failure is not None:
            self._driver.emit(Failed(failure.to_bytes()))
            await asyncio.wait([own], timeout=STOP_SECONDS)
            if self._uploader is not None:
                self._uploader.no_more()
            await self._peers.wait_for_leaving(STOP_SECONDS)
        else:
            await own
            await self._peers.wait_for_leaving(TEARDOWN_SECONDS + STOP_SECONDS)
        await self._finish_storing()
        await self._bring_files()
        await bring_artifacts(
            self._context.take_artifacts, directory_of_task(self._scratch), self._driver.emit
        )
        await self._peers.wait_for_leaving(0)
        if failure is not None:
            return failure
        has_results = await self.results.finish(self._stop_requested, self._driver.emit)
        # the last checkpoint may not have been stored, or the result not sent
        if (failure := self._outcome.summary(self._telemetry.waiting_in())) is not None:
            return failure
        has_saved = self._uploader is not None and self._uploader.has_saved
        self._resumption.main_returned(has_saved=has_saved)
        is_complete = has_results and self._outcome.all_ended.is_set()
        return own.result()[0] if is_complete else Outcome()

    def _emit(self, event: Event) -> None:
        self.emit(event)

    def _ask_all(self, event: Event) -> None:
        self._take_request(event)
        self._peers.broadcast(event)

    def _ranks_are_lost(self, ranks: Sequence[int]) -> None:
        if self._uploader is not None:
            self._uploader.lost(ranks)

    def _tell_all(self, supervisors: Sequence[Supervisor], event: Event) -> None:
        for supervisor in supervisors:
            supervisor.tell(event)
        self._peers.broadcast(event)

    async def _let_ranks_save(self, supervisors: Sequence[Supervisor]) -> None:
        await self._peers.wait_for_joining()
        await self._saving.run(functools.partial(self._tell_all, supervisors))

    async def _check_hosts(self, supervisors: Sequence[Supervisor]) -> None:
        try:
            await self._preflight.run(functools.partial(self._tell_all, supervisors))
        except Exception as error:  # noqa: BLE001 - the workers wait for its end
            self._fail(FailureKind.SETUP, 0, f"the preflight failed: {in_one_line(error)}")

    async def _stop_on_request(self) -> None:
        await self._stop_requested.wait()
        _logger.debug("the driver wants the run to end")
        self._outcome.stopping.set()

    async def _stop_all(self, supervisors: Sequence[Supervisor]) -> None:
        await self._outcome.stopping.wait()
        for supervisor in supervisors:
            supervisor.stop()
        self._peers.broadcast(Stop())

    async def _finish_storing(self) -> None:
        """Let the last checkpoint arrive, unless the user wants the run to end now."""
        if self._uploader is None:
            return
        self._uploader.no_more()
        if self._uploader.is_idle:
            return
        text = "the ranks have ended; the last checkpoint is still being stored"
        self._log.note(text, routine=True)
        while not self._stop_requested.is_set():
            if await self._uploader.drain(STORING_SECONDS):
                return
            self._driver.emit(Storing())

    async def _bring_files(self) -> None:
        """Hand over what Horovod wrote, as far as it got."""
        for variable in self._job.brought_files:
            path = written_file(self._scratch, variable)
            bringing = asyncio.create_task(in_thread(self._context.take_file, variable, path))
            while not bringing.done():
                await asyncio.wait([bringing], timeout=STORING_SECONDS)
                self._driver.emit(Storing())
            if (error := bringing.exception()) is not None:
                text = f"{variable}: the file is lost: {type(error).__name__}: {error}"
                self._log.say(text)

    def _take_storing(self, event: Storing) -> None:
        self._peers.storing(event)
        self._driver.emit(event)

    def _fail(self, kind: FailureKind, rank: int, text: str) -> None:
        self._outcome.failed(Failure(rank, self._slots[rank].host, text, kind=kind))

    def _checkpoint_failed(self, text: str) -> None:
        self._log.say(text)
        if self._job.fail_on_checkpoint_error:
            self._fail(FailureKind.STORAGE, 0, text)


def written_file(scratch: Path, variable: str) -> Path:
    """Return where Horovod writes the file that a variable names."""
    return scratch / variable.lower()


def _placement_in_words(slots: Sequence[Slot]) -> str:
    hosts: dict[str, list[int]] = {}
    for slot in slots:
        hosts.setdefault(f"{slot.host} ({slot.address}, {slot.interface})", []).append(slot.rank)
    parts = [
        f"rank{'s' if len(ranks) > 1 else ''} "
        + (str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}")
        + f" on {host}"
        for host, ranks in hosts.items()
    ]
    workers = "1 worker" if len(slots) == 1 else f"{len(slots)} workers"
    return f"{workers} placed: " + "; ".join(parts)
