"""One task of a run, from the gather step to the outcome. Runs in: the task (np < 0: the driver).

Knows nothing of Spark: :class:`Surroundings` says where it runs and how to reach its peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovodrunner.flows.artifacts.task import FileTaker
from horovodrunner.flows.call.import_path import of_worker
from horovodrunner.flows.call.record import calls_another_main, changes
from horovodrunner.flows.checkpoints.backend import Depot
from horovodrunner.flows.checkpoints.manifest import Manifest
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.checkpoints.task import (
    Courier,
    LatestCopy,
    LatestDecision,
    in_thread,
    is_of_run,
    nothing_saved_in_words,
    resumption_in_words,
)
from horovodrunner.flows.results.task import ResultCourier, ResultTaker
from horovodrunner.flows.rows.taking import RowsTaker, data_directory, with_rows
from horovodrunner.flows.telemetry.phases import Spans
from horovodrunner.pickling.buffers import Layout
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
from horovodrunner.processes.task.coordinator import Coordinator, DriverLink, RankEvents
from horovodrunner.processes.task.links import HubLink
from horovodrunner.processes.task.network import LOOPBACK, REACH_EACH_OTHER, on_free_port
from horovodrunner.processes.task.peer_server import Hub
from horovodrunner.processes.task.process import GRACE_SECONDS, WorkerProcess
from horovodrunner.processes.task.scratch import Scratch
from horovodrunner.processes.task.supervisor import TEARDOWN_SECONDS, Supervisor
from horovodrunner.wire.job import Failure, FailureKind, JobSpec, Outcome, WorkerSpec

if TYPE_CHECKING:
    from horovodrunner.placement.rendezvous import Rendezvous

__all__ = ["Agent", "Surroundings"]

BEAT_SECONDS = 5.0
"""How often a worker tells where its main is."""

STORING_SECONDS = 2.0
"""How often the driver is told that a checkpoint is still on its way."""

STOP_SECONDS = GRACE_SECONDS + 2.0
"""How long partition 0 waits, once everything is to end, to hear that it has ended."""


@dataclass(frozen=True)
class Surroundings:
    """Where an agent runs.

    Parameters
    ----------
    member
        What this task tells its peers; the ports are filled in by the agent.
    gather
        Exchanges one text between all tasks: waits until all have called it, and gives all texts.
    open_driver
        Called by partition 0: registers the run and gives the way to the driver, or says why the
        run must not start. The argument ends the run.
    log
        Takes whole lines for this task's own log.
    result
        Takes what rank 0's main returned.
    depot
        Where checkpoints are kept, or None when the run keeps none.
    files
        Takes the files that Horovod writes on rank 0's host, or None when nobody wants any.
    rows
        Takes the rows that travel with the run, or None when there are none.
    scratch_base
        Directory below which this task may have one of its own.
    cores_per_worker
        How many cores each worker may use.
    session_process
        A process here that lasts as long as the user's session.
    environ
        The environment variables that workers inherit.
    """

    member: Member
    gather: Callable[[str], Awaitable[list[str]]]
    open_driver: Callable[[Callable[[], None]], Awaitable[DriverLink | str]]
    log: Callable[[bytes], None]
    result: ResultTaker
    depot: Depot | None = None
    files: FileTaker | None = None
    rows: RowsTaker | None = None
    scratch_base: str | None = None
    cores_per_worker: int = 1
    session_process: int = field(default_factory=os.getpid)
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)


class Agent:
    """Runs one task's workers and, on partition 0, coordinates the run.

    Parameters
    ----------
    job
        The run.
    surroundings
        Where this agent runs.
    """

    def __init__(self, job: JobSpec, surroundings: Surroundings) -> None:
        self._job = job
        self._surroundings = surroundings
        self._leads = surroundings.member.partition == 0
        self._workers: list[WorkerProcess] = []
        self._result = ResultCourier(surroundings.result)
        self._stop_requested = asyncio.Event()
        self._has_gathered = False
        self._scratch = Path()
        self._stack_tasks: set[asyncio.Task[None]] = set()
        self._courier: Courier | None = None
        self._latest: LatestCopy | None = None
        self._went_on_from: Manifest | None = None
        self._has_saved = False
        self._spans = Spans()

    async def run(self) -> Outcome:
        """Run this task from start to end; whatever happens, no worker outlives it.

        Returns
        -------
        Outcome
            Partition 0: rank 0's success or the run's failure. Others: their rank's success, a
            failure that partition 0 may not know of, or nothing of the two.
        """
        now = time.time()
        self._spans.add("stage start", now, now)  # when it began, the driver knows
        scratch = Scratch(self._job.run_id, self._surroundings.scratch_base)
        self._scratch = scratch.path
        try:
            # The workers import what main needs while the tasks find each other.
            self._workers = [self._spawn() for _ in range(self._surroundings.member.workers)]
            async with contextlib.AsyncExitStack() as resources:
                if problem := _launcher_problem():
                    member = replace(self._surroundings.member, problem=problem)
                    return _refused(await self._gather(member))
                if self._leads:
                    return await self._lead(resources)
                return await self._follow(resources)
        except Exception as error:  # noqa: BLE001 - the run must end everywhere, and say why
            return await self._give_up(error)
        finally:
            for worker in self._workers:
                worker.kill()
            await self._result.close()
            for taker in (self._surroundings.depot, self._surroundings.files):
                if taker is not None:
                    taker.abort()
            scratch.delete()

    def _spawn(self) -> WorkerProcess:
        environment = worker_base_environment(
            self._surroundings.environ,
            self._job.environment,
            of_worker(self._job.import_path, sys.path),
            self._surroundings.cores_per_worker,
        )
        return WorkerProcess(
            self._job.early_imports,
            environment,
            self._result.descriptor,
            self._surroundings.session_process if self._job.keep_warm else None,
        )

    async def _lead(self, resources: contextlib.AsyncExitStack) -> Outcome:
        member = self._member(resources)
        ports = self._job.ports
        rendezvous = _open_rendezvous(resources, member.address, ports)
        hub = Hub(self._job.token, self._surroundings.log, self._job.size)
        resources.push_async_callback(hub.close)
        member = replace(
            member,
            hub_port=await hub.open(member.address, ports),
            rendezvous_port=rendezvous.port if rendezvous is not None else 0,
            master_port=_reserve_port(resources, ports),
        )
        driver = await self._surroundings.open_driver(self._stop_requested.set)
        if isinstance(driver, str):
            members = await self._gather(replace(member, problem=driver))
            return _refused(members)
        resources.push_async_callback(driver.close)
        members = await self._gather(member)
        if (refusal := self._refusal(members)).failure is not None:
            return refusal
        if found := self._differences(members):
            driver.note(f"what is installed differs:\n{format_differences(found)}")

        began = time.time()
        slots = assign_slots(members)
        if rendezvous is not None:
            rendezvous.set_plan(slots)
        self._spans.add("rendezvous", began, time.time())
        try:
            return await self._coordinate(resources, members, slots, hub, driver)
        finally:
            if rendezvous is not None and (times := rendezvous.times_of_requests()) is not None:
                self._spans.add("init", *times)
            driver.phases(self._spans.phases())

    async def _coordinate(
        self,
        resources: contextlib.AsyncExitStack,
        members: Sequence[Member],
        slots: Sequence[Slot],
        hub: Hub,
        driver: DriverLink,
    ) -> Outcome:
        own = [slot for slot in slots if slot.partition == 0]
        coordinator = Coordinator(slots, driver, self._surroundings.log, self._spans)
        coordinator.on_stop(self._stop_workers)
        coordinator.on_stack_request(lambda: self._show_stacks(own, coordinator))
        latest = LatestDecision(
            self._surroundings.depot,
            members,
            driver.note,
            lambda manifest: self._goes_on_from(manifest, driver),
        )
        self._latest = LatestCopy(
            self._surroundings.depot,
            self._scratch,
            ask=lambda: latest.answer(0),
            tell=lambda directory: latest.fetched(0, directory),
        )
        self._result.on_error = lambda text: coordinator.failed(
            Failure(slots[0].rank, slots[0].host, text, kind=FailureKind.RESULT)
        )
        hub.begin(coordinator, slots, latest)
        driver.placed(slots)
        driver.note(_placement_in_words(slots), routine=True)
        watchers = [
            asyncio.create_task(hub.watch_joining()),
            asyncio.create_task(self._stop_on_request(coordinator)),
            asyncio.create_task(coordinator.watch_for_stalls(self._job.stall_timeout)),
        ]
        if self._surroundings.depot is not None:
            self._courier = Courier(
                self._surroundings.depot,
                note=driver.note,
                on_error=lambda text: self._checkpoint_failed(text, slots[0], driver, coordinator),
            )
            watchers.append(asyncio.create_task(self._courier.run()))
        run = asyncio.create_task(self._run_workers(own, members, coordinator))
        resources.push_async_callback(_cancel, [*watchers, run])

        await coordinator.wait_for_end(STOP_SECONDS)
        if (verdict := coordinator.verdict()) is not None:
            driver.failed(verdict)
            await asyncio.wait([run], timeout=STOP_SECONDS)
            await hub.wait_for_leaving(STOP_SECONDS)
            await self._finish_storing(driver)
            await self._bring_files(driver)
            return verdict
        outcomes = await run
        await hub.wait_for_leaving(TEARDOWN_SECONDS + STOP_SECONDS)
        await self._finish_storing(driver)
        await self._bring_files(driver)
        has_result = await self._result.finish(self._stop_requested)
        if (verdict := coordinator.verdict()) is not None:
            return verdict  # the last checkpoint could not be stored, or the result not sent
        if self._went_on_from is not None and not self._has_saved:
            driver.note(nothing_saved_in_words(self._went_on_from))
        return outcomes[0] if has_result and coordinator.all_ended.is_set() else Outcome()

    async def _finish_storing(self, driver: DriverLink) -> None:
        """Let the last checkpoint arrive, unless the user wants the run to end now."""
        courier = self._courier
        if courier is None or courier.is_idle:
            return
        driver.note("the ranks have ended; the last checkpoint is still being stored", routine=True)
        while not self._stop_requested.is_set() and not await courier.drain(STORING_SECONDS):
            driver.storing()

    async def _bring_files(self, driver: DriverLink) -> None:
        """Hand over what Horovod wrote, as far as it got."""
        taker = self._surroundings.files
        for variable, path in self._written_files().items():
            if taker is None:
                continue
            bringing = asyncio.create_task(in_thread(taker.put, variable, path))
            while not bringing.done():
                await asyncio.wait([bringing], timeout=STORING_SECONDS)
                driver.storing()
            if (error := bringing.exception()) is not None:
                text = f"{variable}: the file is lost: {type(error).__name__}: {error}"
                driver.note(text)
                self._surroundings.log(f"HorovodRunner: {text}\n".encode(errors="backslashreplace"))

    def _written_files(self) -> dict[str, Path]:
        """Say where Horovod writes, by variable, what the driver wants."""
        return {variable: self._scratch / variable.lower() for variable in self._job.brought_files}

    def _checkpoint_failed(
        self, text: str, slot: Slot, driver: DriverLink, coordinator: Coordinator
    ) -> None:
        driver.note(text)
        self._surroundings.log(f"HorovodRunner: {text}\n".encode(errors="backslashreplace"))
        if self._job.fail_on_checkpoint_error:
            coordinator.failed(Failure(slot.rank, slot.host, text, kind=FailureKind.STORAGE))

    def _show_stacks(self, slots: Sequence[Slot], events: RankEvents) -> None:
        async def show(worker: WorkerProcess, rank: int) -> None:
            events.stack(rank, await worker.stack())

        for worker, slot in zip(self._workers, slots, strict=True):
            task = asyncio.create_task(show(worker, slot.rank))
            self._stack_tasks.add(task)
            task.add_done_callback(self._stack_tasks.discard)

    async def _follow(self, resources: contextlib.AsyncExitStack) -> Outcome:
        member = self._member(resources)
        partition = member.partition
        members = await self._gather(member)
        if (refusal := self._refusal(members)).failure is not None:
            return refusal
        leader = members[0]
        own = [slot for slot in assign_slots(members) if slot.partition == partition]
        try:
            link = await HubLink.open(leader.address, leader.hub_port, self._job.token, partition)
        except OSError as error:
            text = (
                f"{own[0].host} ({own[0].address}) cannot reach rank 0's task on {leader.host} "
                f"({leader.address}:{leader.hub_port}): {error}; {REACH_EACH_OTHER}"
            )
            self._surroundings.log(f"HorovodRunner: {text}\n".encode(errors="backslashreplace"))
            return Outcome(failure=Failure(own[0].rank, own[0].host, text))
        resources.push_async_callback(link.close)
        self._latest = LatestCopy(
            self._surroundings.depot, self._scratch, ask=link.ask_latest, tell=link.fetched
        )
        run = asyncio.create_task(self._run_workers(own, members, link))
        stop = asyncio.create_task(link.listen(lambda: self._show_stacks(own, link)))
        resources.push_async_callback(_cancel, [run, stop])
        await asyncio.wait([run, stop], return_when=asyncio.FIRST_COMPLETED)
        if not run.done():
            self._stop_workers()
        outcomes = await run
        return outcomes[0]

    def _refusal(self, members: Sequence[Member]) -> Outcome:
        """Say why nobody must run main; every task comes to the same answer."""
        for refusal in (_refused(members), _beyond_reach(members)):
            if refusal.failure is not None:
                return refusal
        found = self._differences(members)
        if not must_fail(found):
            return Outcome()
        text = (
            "the driver and the executors must have the same Python (3.11, say) and the same "
            f"release of horovodrunner:\n{format_differences(found)}"
        )
        return Outcome(failure=Failure(None, members[0].host, text))

    def _differences(self, members: Sequence[Member]) -> list[Difference]:
        executors = [(member.host, member.versions) for member in members if member.versions]
        return differences(self._job.versions, executors)

    async def _give_up(self, error: Exception) -> Outcome:
        """Report a failure of this task itself; its peers may still be waiting to gather."""
        member = self._surroundings.member
        summary = f"its task failed: {type(error).__name__}: {error}"
        if not self._has_gathered:
            await self._gather(replace(member, problem=summary))
        text = "".join(traceback.format_exception(error))
        return Outcome(failure=Failure(None, member.host, summary, traceback=text))

    async def _gather(self, member: Member) -> list[Member]:
        member = await with_rows(self._surroundings.rows, member, self._scratch)
        self._has_gathered = True
        began = time.time()
        texts = await self._surroundings.gather(member.to_json())
        self._spans.add("gather", began, time.time())
        return sorted((Member.from_json(text) for text in texts), key=lambda m: m.partition)

    async def _stop_on_request(self, coordinator: Coordinator) -> None:
        await self._stop_requested.wait()
        coordinator.stop()

    def _stop_workers(self) -> None:
        for worker in self._workers:
            worker.stop()

    async def _run_workers(
        self, slots: Sequence[Slot], members: Sequence[Member], events: RankEvents
    ) -> list[Outcome]:
        supervisors = [
            Supervisor(worker, slot, events, log=self._log_of_rank, services=self)
            for worker, slot in zip(self._workers, slots, strict=True)
        ]
        jobs = [self._spec(slot, members) for slot in slots]
        return list(
            await asyncio.gather(
                *(
                    supervisor.run(self._job.payload, spec)
                    for supervisor, spec in zip(supervisors, jobs, strict=True)
                )
            )
        )

    def _log_of_rank(self, lines: bytes) -> None:
        if not self._leads:  # partition 0's log has the lines of all ranks
            self._surroundings.log(lines)

    async def latest_checkpoint(self) -> dict[str, Any]:
        """Answer a worker that asks where main goes on."""
        assert self._latest is not None  # noqa: S101 - set before the workers get their jobs
        return await self._latest.get()

    def _goes_on_from(self, manifest: Manifest, driver: DriverLink) -> bool:
        """Tell the user, once in a run, that it goes on from another one's checkpoint."""
        record, location = self._job.record, self._job.checkpoint_location
        if record is None or location is None or is_of_run(manifest, record):
            return False
        if manifest.run is None or not calls_another_main(manifest.run, record):
            self._went_on_from = manifest
        found = [] if manifest.run is None else changes(manifest.run, record)
        if self._job.attempt == 1:  # later attempts are announced by the driver
            path = CheckpointStore(location, self._job.keep_checkpoints).path_of(manifest.step)
            for text in resumption_in_words(manifest, path, found):
                driver.note(text)
        return bool(found)

    def checkpoint_saved(self, step: int, directory: Path) -> None:
        """Take over a checkpoint that rank 0 has written."""
        self._has_saved = True
        if self._courier is not None:
            self._courier.saved(step, directory)

    def result_written(self, layout: Layout) -> None:
        """Let what rank 0's main returned be taken while the other ranks go on."""
        self._result.written(layout)

    def _member(self, resources: contextlib.AsyncExitStack) -> Member:
        """Say where this task is, with ports for TensorFlow's servers if the run wants them."""
        member = self._surroundings.member
        if not self._job.tf_config:
            return member
        ports = [_reserve_port(resources, self._job.ports) for _ in range(member.workers)]
        return replace(member, tf_ports=tuple(ports))

    def _spec(self, slot: Slot, members: Sequence[Member]) -> WorkerSpec:
        leader = members[0]
        hosts = len({member.host_id for member in members})
        environment = slot_environment(
            slot,
            rendezvous=(leader.address, leader.rendezvous_port),
            master=(leader.address, leader.master_port),
            forwarded=self._job.environment,
            ports=self._job.ports,
        )
        environment.update({name: str(path) for name, path in self._written_files().items()})
        environment |= torchrun_environment(slot, hosts, self._job.run_id, self._job.attempt)
        environment |= tf_config(tf_workers(members), slot.rank)
        if self._surroundings.rows is not None:
            environment[DATA_DIRECTORY] = data_directory(self._surroundings.rows, members)
        return WorkerSpec(
            rank=slot.rank,
            host=slot.host,
            environment=environment,
            return_result=slot.rank == 0,
            attempt=self._job.attempt,
            scratch=str(self._scratch),
            keeps_checkpoints=self._surroundings.depot is not None,
            beat_seconds=min(BEAT_SECONDS, (self._job.stall_timeout or math.inf) / 4),
        )


async def _cancel(tasks: Sequence[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _refused(members: Sequence[Member]) -> Outcome:
    """Give the first problem that a task gathered, or an empty outcome."""
    for member in members:
        if member.problem:
            kind = member.problem_kind
            return Outcome(failure=Failure(None, member.host, member.problem, kind))
    return Outcome()


def _beyond_reach(members: Sequence[Member]) -> Outcome:
    """Name the first host that the others cannot reach for sure, or give an empty outcome."""
    if len({member.host_id for member in members}) == 1:
        return Outcome()
    for member in members:
        if member.address == LOOPBACK:
            text = (
                f"{member.host} has no IPv4 address but {LOOPBACK}, and the run has other hosts: "
                "Horovod's rendezvous speaks no IPv6, so every host needs an IPv4 address that the "
                "others reach; it may stand beside the IPv6 address that Spark uses"
            )
            return Outcome(failure=Failure(None, member.host, text))
    return Outcome()


def _has_horovod() -> bool:
    spec = importlib.util.find_spec("horovod")
    return spec is not None and spec.origin is not None  # what pip leaves behind has none


def _open_rendezvous(
    resources: contextlib.AsyncExitStack, address: str, ports: tuple[int, int] | None
) -> Rendezvous | None:
    """Serve Horovod's rendezvous where Horovod is installed; what main uses may be another."""
    if not _has_horovod():
        return None
    from horovodrunner.placement.rendezvous import Rendezvous

    rendezvous = on_free_port(ports, lambda port: Rendezvous(address, port))
    resources.callback(rendezvous.close)
    return rendezvous


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


def _reserve_port(resources: contextlib.AsyncExitStack, ports: tuple[int, int] | None) -> int:
    """Keep a port from others until the run ends: bound, not listened on.

    torch.distributed's store and TensorFlow's server bind it with SO_REUSEADDR, which Linux allows
    beside a socket that has the same option and does not listen.
    """
    keeper = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    resources.callback(keeper.close)
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    on_free_port(ports, lambda port: keeper.bind(("", port)))
    return int(keeper.getsockname()[1])


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
