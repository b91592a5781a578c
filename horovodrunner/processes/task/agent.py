"""One task of a run, from gathering to its outcome. Runs in: the task (np < 0: the driver)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import importlib.util
import itertools
import logging
import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovodrunner.flows.artifacts.places import directory_of_task
from horovodrunner.flows.artifacts.task import bring_artifacts
from horovodrunner.flows.call.import_path import of_worker
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.checkpoints.task.latest import LatestCopy
from horovodrunner.flows.checkpoints.task.parts import PartKeeper
from horovodrunner.flows.logs.lines import prefix_lines
from horovodrunner.flows.logs.task import own_line
from horovodrunner.flows.outcome.outcome import Failure, FailureKind, Outcome
from horovodrunner.flows.preflight.task import Prober
from horovodrunner.flows.results.task import ResultUploader, file_without_a_name
from horovodrunner.flows.rows.taking import data_directories, with_rows
from horovodrunner.flows.telemetry.phases import Spans
from horovodrunner.placement.environment import (
    DATA_DIRECTORY,
    slot_environment,
    tf_config,
    torchrun_environment,
    worker_base_environment,
)
from horovodrunner.placement.topology import Member, Slot, assign_slots, tf_workers
from horovodrunner.placement.versions import (
    Difference,
    differences,
    format_differences,
    must_fail,
)
from horovodrunner.processes.task.context import TaskContext
from horovodrunner.processes.task.driver_link import DriverLink, StartRefusedError
from horovodrunner.processes.task.leader import Leader, written_file
from horovodrunner.processes.task.network import LOOPBACK, REACH_EACH_OTHER, on_free_port
from horovodrunner.processes.task.peers import PeerLink
from horovodrunner.processes.task.process import WorkerProcess
from horovodrunner.processes.task.scratch import Scratch
from horovodrunner.processes.task.supervisor import Supervisor
from horovodrunner.wire.events import (
    CountCalls,
    Ended,
    Event,
    Job,
    LatestWanted,
    Lines,
    Measure,
    Note,
    Phases,
    Proceed,
    RangesWanted,
    SaveAt,
    SaveWanted,
    ShowStacks,
    Sink,
    Stop,
    dispatcher,
)

if TYPE_CHECKING:
    from horovodrunner.placement.rendezvous import Rendezvous

__all__ = ["run_task"]

BEAT_SECONDS = 5.0
"""How often a worker tells where its main is."""

_BACKLOG = 1024
"""So many peers may connect before the leader serves them."""

_NO_ADDRESS = (
    f"has no IPv4 address but {LOOPBACK}, and the run has other hosts: Horovod's rendezvous speaks "
    "no IPv6, so every host needs an IPv4 address that the others reach; it may stand beside the "
    "IPv6 address that Spark uses"
)

_TOO_LARGE = (
    "its variables and arguments are more than Linux starts a process with (Argument list too "
    "long): let fewer variables travel (environment=, forward=), or pass large values as arguments "
    "of main"
)

_logger = logging.getLogger(__name__)


async def run_task(job: JobSpec, context: TaskContext) -> Outcome:
    """Run one task from start to end; whatever happens, no worker outlives it.

    Partition 0 returns rank 0's success or the run's failure; the others their rank's success, a
    failure that partition 0 may not know of, or nothing of the two.
    """
    async with contextlib.AsyncExitStack() as resources:
        return await _Agent(job, context, resources).run()


class _Agent:
    """Runs one task's workers and, on partition 0, lets a leader coordinate the run."""

    def __init__(
        self, job: JobSpec, context: TaskContext, resources: contextlib.AsyncExitStack
    ) -> None:
        self._job = job
        self._context = context
        self._resources = resources
        self._stop_requested = asyncio.Event()
        self._saves_wanted: asyncio.Queue[SaveWanted] = asyncio.Queue()
        self._has_gathered = False
        self._spans = Spans()
        now = time.time()
        self._spans.add("stage start", now, now)  # when it began, the driver knows
        scratch = Scratch(job.run_id, context.scratch_base)
        resources.callback(scratch.delete)
        self._scratch = scratch.path
        self._result_files: list[int] = []
        self._prober: Prober | None = None
        self._preflight_rendezvous: Rendezvous | None = None
        resources.callback(context.abort_transfers)

    async def run(self) -> Outcome:
        try:
            # The workers import what main needs while the tasks find each other.
            try:
                workers = [self._spawn() for _ in range(self._context.member.workers)]
            except OSError as error:
                if error.errno != errno.E2BIG:
                    raise
                return await self._refuse(_TOO_LARGE)
            if problem := _launcher_problem():
                return await self._refuse(problem)
            if self._context.member.partition == 0:
                return await self._lead(workers)
            return await self._follow(workers)
        except Exception as error:  # noqa: BLE001 - the run must end everywhere, and say why
            return await self._give_up(error)

    def _spawn(self) -> WorkerProcess:
        environment = worker_base_environment(
            self._context.environ,
            self._job.environment,
            of_worker(self._job.import_path, sys.path),
            self._context.cores_per_worker,
            self._job.removed_variables,
        )
        result_file = file_without_a_name()
        self._resources.callback(os.close, result_file)
        self._result_files.append(result_file)
        worker = WorkerProcess(
            self._job.early_imports,
            environment,
            result_file,
            self._context.session_process if self._job.keep_warm else None,
        )
        self._resources.callback(worker.kill)
        return worker

    async def _lead(self, workers: Sequence[WorkerProcess]) -> Outcome:
        member, ports = self._member(), self._job.ports
        rendezvous = self._open_rendezvous(member.address)
        listening = on_free_port(
            ports, lambda port: socket.create_server((member.address, port), backlog=_BACKLOG)
        )
        self._resources.callback(listening.close)
        member = replace(
            member,
            peer_port=listening.getsockname()[1],
            rendezvous_port=rendezvous.port if rendezvous is not None else 0,
            master_port=self._reserve_port(),
        )
        member = await self._open_preflight(member)
        try:
            driver = await self._context.open_driver(
                {
                    Stop: lambda _: self._stop_requested.set(),
                    SaveWanted: self._saves_wanted.put_nowait,
                }
            )
        except StartRefusedError as error:
            return await self._refuse(str(error))
        self._resources.push_async_callback(driver.close)
        members = await self._gather(member, reaches_driver=driver.is_reached)
        if (refusal := self._refusal(members)) is not None:
            return Outcome(failure=refusal)
        if found := self._differences(members):
            driver.emit(Note(f"what is installed differs:\n{format_differences(found)}"))

        began = time.time()
        slots = assign_slots(members)
        for each in (rendezvous, self._preflight_rendezvous):
            if each is not None:
                each.set_plan(slots)
        self._spans.add("rendezvous", began, time.time())
        try:
            return await self._coordinate(workers, members, slots, driver, listening)
        finally:
            if rendezvous is not None and (times := rendezvous.times_of_requests()) is not None:
                self._spans.add("init", *times)
            phases = self._spans.phases()
            driver.emit(Phases(tuple((p.name, p.began, p.ended, p.last_rank) for p in phases)))

    async def _coordinate(
        self,
        workers: Sequence[WorkerProcess],
        members: Sequence[Member],
        slots: Sequence[Slot],
        driver: DriverLink,
        listening: socket.socket,
    ) -> Outcome:
        leader = Leader(
            self._job,
            self._context,
            driver,
            members,
            slots,
            listening=listening,
            scratch=self._scratch,
            spans=self._spans,
            stop_requested=self._stop_requested,
            saves_wanted=self._saves_wanted,
        )
        own = [slot for slot in slots if slot.partition == 0]
        self._probe(members, leader.emit)
        return await leader.run(
            self._supervisors(
                workers,
                members,
                own,
                leader.emit,
                latest=leader.latest,
                results=leader.results,
            )
        )

    async def _follow(self, workers: Sequence[WorkerProcess]) -> Outcome:
        member = await self._open_preflight(self._member())
        members = await self._gather(member)
        if (refusal := self._refusal(members)) is not None:
            return Outcome(failure=refusal)
        leader, log = members[0], self._context.log
        own = [slot for slot in assign_slots(members) if slot.partition == member.partition]
        try:
            link = await PeerLink.open(
                leader.address, leader.peer_port, self._job.token, member.partition
            )
        except OSError as error:
            text = (
                f"{own[0].host} ({own[0].address}) cannot reach rank 0's task on {leader.host} "
                f"({leader.address}:{leader.peer_port}): {error}; {REACH_EACH_OTHER}"
            )
            log(own_line(text))
            return Outcome(failure=Failure(own[0].rank, own[0].host, text))
        self._resources.push_async_callback(link.close)

        def take_lines(event: Lines) -> None:
            link.emit(event)
            log(prefix_lines(event.lines, event.rank, event.stream))

        keeps = self._context.checkpoints
        parts = None if keeps is None else PartKeeper(keeps, link.emit)
        saved, asked = ({}, {}) if parts is None else (parts.handlers, parts.requests)
        emit = dispatcher([{Lines: take_lines}, saved], otherwise=link.emit)
        latest = LatestCopy(
            self._context.checkpoints, self._scratch, ask=link.ask_latest, tell=link.fetched
        )
        stopping = asyncio.Event()

        def result_lost(rank: int, text: str) -> None:
            failure = Failure(rank, own[0].host, text, FailureKind.RESULT)
            link.emit(Ended(rank, Outcome(failure=failure).to_bytes()))

        results = ResultUploader(
            functools.partial(self._context.take_result, reaches_driver=True), result_lost
        )
        self._resources.push_async_callback(results.close)
        supervisors = self._supervisors(workers, members, own, emit, latest=latest, results=results)

        def stop(_: object) -> None:
            stopping.set()
            for supervisor in supervisors:
                supervisor.stop()

        def show(_: object) -> None:
            for supervisor in supervisors:
                supervisor.show_stack()

        def tell(event: Event) -> None:
            for supervisor in supervisors:
                supervisor.tell(event)

        self._probe(members, link.emit)
        told = dict.fromkeys((Measure, Proceed, CountCalls, SaveAt), tell)
        handlers = {Stop: stop, ShowStacks: show, **told}
        listening = asyncio.create_task(link.listen([handlers, asked]))
        listening.add_done_callback(stop)  # without partition 0 there is no run
        try:
            outcomes = await asyncio.gather(*(each.run() for each in supervisors))
            await results.finish(stopping, link.emit)
            if parts is not None:
                await parts.finish(listening)
            await bring_artifacts(
                self._context.take_artifacts, directory_of_task(self._scratch), link.emit
            )
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        return _of_all(outcomes)

    async def _open_preflight(self, member: Member) -> Member:
        """Answer the other hosts' probes, if the run wants them tried."""
        job = self._job
        if not job.preflight:
            return member
        listening = on_free_port(
            job.ports, lambda port: socket.create_server((member.address, port), backlog=_BACKLOG)
        )
        self._resources.callback(listening.close)
        self._prober = Prober(job.token, lambda why: self._context.log(own_line(why)))
        self._resources.push_async_callback(self._prober.close)
        await self._prober.open(listening)
        ports = [listening.getsockname()[1]]
        if member.partition == 0:
            self._preflight_rendezvous = rendezvous = self._open_rendezvous(member.address)
            ports += [rendezvous.port if rendezvous is not None else 0, self._reserve_port()]
        return replace(member, preflight_ports=tuple(ports))

    def _probe(self, members: Sequence[Member], emit: Sink) -> None:
        """Try the links to the other hosts, if the run wants it, and report them."""
        prober, partition = self._prober, self._context.member.partition
        if prober is None:
            return

        async def probe() -> None:
            emit(await prober.probe(members[partition], members))

        probing = asyncio.create_task(probe())
        self._resources.callback(probing.cancel)

    def _supervisors(
        self,
        workers: Sequence[WorkerProcess],
        members: Sequence[Member],
        slots: Sequence[Slot],
        emit: Sink,
        *,
        latest: LatestCopy,
        results: ResultUploader,
    ) -> list[Supervisor]:
        data = None
        if self._context.rows is not None:
            data = itertools.cycle(data_directories(self._context.rows, members))
        return [
            Supervisor(
                worker,
                self._job_of(slot, members, next(data) if data is not None else None),
                emit,
                {LatestWanted: latest.get, RangesWanted: latest.read},
                functools.partial(results.written, slot.rank, file),
                beside=self._usage_watch(worker, slot, emit),
            )
            for worker, slot, file in zip(workers, slots, self._result_files, strict=True)
        ]

    def _usage_watch(
        self, worker: WorkerProcess, slot: Slot, emit: Sink
    ) -> Callable[[], Coroutine[Any, Any, None]] | None:
        if self._job.usage_seconds is None:
            return None
        from horovodrunner.flows.usage.task import watch_usage

        seconds = self._job.usage_seconds
        return lambda: watch_usage(slot, lambda: worker.pid, emit, seconds)

    async def _refuse(self, problem: str) -> Outcome:
        """Let no task go on; what the peers found first may be another problem."""
        members = await self._gather(replace(self._context.member, problem=problem))
        return Outcome(failure=self._refusal(members))

    def _refusal(self, members: Sequence[Member]) -> Failure | None:
        """Return why nobody must run main; every task comes to the same answer."""
        for member in members:
            if member.problem:
                return Failure(None, member.host, member.problem, member.problem_kind)
        if len({member.host_id for member in members}) > 1:
            for member in members:
                if member.address == LOOPBACK:
                    return Failure(None, member.host, f"{member.host} {_NO_ADDRESS}")
        found = self._differences(members)
        if not must_fail(found):
            return None
        text = (
            "the driver and the executors must have the same Python (3.11, say) and the same "
            f"release of horovodrunner:\n{format_differences(found)}"
        )
        return Failure(None, members[0].host, text)

    def _differences(self, members: Sequence[Member]) -> list[Difference]:
        executors = [(member.host, member.versions) for member in members if member.versions]
        return differences(self._job.versions, executors)

    async def _give_up(self, error: Exception) -> Outcome:
        """Report a failure of this task itself; its peers may still be waiting to gather."""
        _logger.debug("the task has failed", exc_info=error)
        summary = f"its task failed: {type(error).__name__}: {error}"
        if not self._has_gathered:
            await self._refuse(summary)
        text = "".join(traceback.format_exception(error))
        return Outcome(failure=Failure(None, self._context.member.host, summary, traceback=text))

    async def _gather(self, member: Member, *, reaches_driver: bool = True) -> list[Member]:
        member = await with_rows(self._context.rows, member, self._scratch)
        self._has_gathered = True
        began = time.time()
        texts = await self._context.gather(member.to_json(), reaches_driver=reaches_driver)
        self._spans.add("gather", began, time.time())
        return sorted((Member.from_json(text) for text in texts), key=lambda m: m.partition)

    def _member(self) -> Member:
        """Return where this task is, with ports for TensorFlow's servers if the run wants them."""
        member = self._context.member
        if not self._job.tf_config:
            return member
        return replace(member, tf_ports=tuple(self._reserve_port() for _ in range(member.workers)))

    def _job_of(self, slot: Slot, members: Sequence[Member], data: Path | None) -> Job:
        leader = members[0]
        environment = slot_environment(
            slot,
            rendezvous=(leader.address, leader.rendezvous_port),
            master=(leader.address, leader.master_port),
            forwarded=self._job.environment,
            ports=self._job.ports,
        )
        for variable in self._job.brought_files:
            environment[variable] = str(written_file(self._scratch, variable))
        hosts = len({member.host_id for member in members})
        environment |= torchrun_environment(slot, hosts, self._job.run_id, self._job.attempt)
        environment |= tf_config(tf_workers(members), slot.rank)
        if data is not None:
            environment[DATA_DIRECTORY] = str(data)
        _logger.debug("rank %d is on %s, local rank %d", slot.rank, slot.host, slot.local_rank)
        return Job(
            rank=slot.rank,
            host=slot.host,
            environment=environment,
            return_result=slot.rank == 0 or self._job.all_results,
            attempt=self._job.attempt,
            scratch=str(self._scratch),
            keeps_checkpoints=self._context.checkpoints is not None,
            profiles=self._job.profiles,
            preflight=_preflight_environment(leader),
            beat_seconds=min(BEAT_SECONDS, (self._job.stall_timeout or math.inf) / 4),
            call=self._job.payload,
        )

    def _open_rendezvous(self, address: str) -> Rendezvous | None:
        """Serve Horovod's rendezvous where Horovod is installed; what main uses may be another."""
        if not _has_horovod():
            return None
        from horovodrunner.placement.rendezvous import Rendezvous

        rendezvous = on_free_port(self._job.ports, lambda port: Rendezvous(address, port))
        self._resources.callback(rendezvous.close)
        return rendezvous

    def _reserve_port(self) -> int:
        """Keep a port from others until the run ends: bound, not listened on.

        torch.distributed's store and TensorFlow's server bind it with SO_REUSEADDR, which Linux
        allows beside a socket that has the same option and does not listen.
        """
        keeper = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._resources.callback(keeper.close)
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        on_free_port(self._job.ports, lambda port: keeper.bind(("", port)))
        return int(keeper.getsockname()[1])


def _of_all(outcomes: Sequence[Outcome]) -> Outcome:
    """Return what a task tells of its ranks: a failure, if one failed."""
    return next((each for each in outcomes if each.failure is not None), outcomes[0])


def _preflight_environment(leader: Member) -> dict[str, str]:
    """Return what differs for a worker that tries its backend before main."""
    if not leader.preflight_ports:
        return {}
    _, rendezvous, master = leader.preflight_ports
    return {"MASTER_PORT": str(master), "HOROVOD_GLOO_RENDEZVOUS_PORT": str(rendezvous)}


def _has_horovod() -> bool:
    spec = importlib.util.find_spec("horovod")
    return spec is not None and spec.origin is not None  # what pip leaves behind has none


def _launcher_problem() -> str:
    """Explain why the installed Horovod's launcher cannot be used here, if so."""
    if not _has_horovod():
        return ""
    try:
        import horovodrunner.placement.rendezvous  # noqa: F401
    except ImportError as error:
        return (
            f"Horovod cannot be imported by {sys.executable} on {socket.gethostname()}: {error}. "
            f"Run `{sys.executable} -m horovodrunner build-horovod` there"
        )
    return ""
