"""The Spark side of a task: barrier context in, rows out. Runs in: the task."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import re
import socket
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from horovodrunner.flows.artifacts.task import upload_artifacts, upload_file
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.checkpoints.task.backend import CheckpointBackend, DriverBackend
from horovodrunner.flows.logs.debug import turn_on_if_wanted
from horovodrunner.flows.logs.task import TaskLog
from horovodrunner.flows.members.task import gather
from horovodrunner.flows.results.task import ResultUpload
from horovodrunner.placement.environment import GLOO_INTERFACE
from horovodrunner.placement.packed import PackedEnvironment
from horovodrunner.placement.topology import Member, compose_devices
from horovodrunner.placement.versions import installed_versions
from horovodrunner.processes.task.agent import run_task
from horovodrunner.processes.task.context import TaskContext
from horovodrunner.processes.task.driver_link import DriverLink, register_with_driver
from horovodrunner.processes.task.network import (
    HostAddress,
    find_address,
    host_id,
    loopback_address,
)
from horovodrunner.storage import is_url
from horovodrunner.wire.events import Handlers
from horovodrunner.wire.upload import TransferClient

if TYPE_CHECKING:
    from horovodrunner.flows.rows.task import TaskRows, Travelling

__all__ = ["ROW_SCHEMA", "barrier_task"]

ROW_SCHEMA = "partition int, chunk binary"
"""One outcome is one or more rows of the stage, in order."""

CHUNK_BYTES = 16 * 1024 * 1024
_LOG_FD = 2
"""The executor's stderr, which Spark shows in its UI."""

_SCRATCH_VARIABLES = ("LOCAL_DIRS", "SPARK_EXECUTOR_DIRS", "SPARK_LOCAL_DIRS")
"""Set by YARN, by standalone workers, and by administrators."""


def barrier_task(job: JobSpec, data: Sequence[Travelling], batches: Iterator[Any]) -> Iterator[Any]:
    """Run one task of the barrier stage; for ``DataFrame.mapInArrow(..., barrier=True)``.

    A failed rank is a row of a task that succeeds, so that Spark has nothing to try again.
    """
    import pyarrow
    from pyspark import BarrierTaskContext

    barrier = BarrierTaskContext.get()
    partition = barrier.partitionId()
    turn_on_if_wanted(
        f"partition {partition}'s task on {socket.gethostname()}",
        "this executor's standard error",
        job.environment,
    )
    rows = _rows(data, job, partition, batches)
    client = TransferClient(job.run_id, job.token, job.driver_address)
    result, log = ResultUpload(job, client), TaskLog(_LOG_FD)
    try:
        context = _context(job, barrier, client, result=result, task_log=log, rows=rows)
        outcome = asyncio.run(run_task(job, context))
    finally:
        log.close()
    with contextlib.closing(result):
        for chunk in itertools.chain([outcome.to_bytes()], result.rows(CHUNK_BYTES)):
            yield pyarrow.RecordBatch.from_pydict(
                {
                    "partition": pyarrow.array([partition], pyarrow.int32()),
                    "chunk": pyarrow.array([chunk], pyarrow.binary()),
                }
            )


def _rows(
    data: Sequence[Travelling], job: JobSpec, partition: int, batches: Iterator[Any]
) -> TaskRows | None:
    if not data:
        for _ in batches:
            pass
        return None
    from horovodrunner.flows.rows.task import TaskRows

    first = sum(job.workers[:partition])
    return TaskRows(data, range(first, first + job.workers[partition]), batches)


def _context(
    job: JobSpec,
    barrier: Any,
    client: TransferClient,
    *,
    result: ResultUpload,
    task_log: TaskLog,
    rows: TaskRows | None,
) -> TaskContext:
    partition = barrier.partitionId()
    # One terminal for all needs every line once: from the driver, or else from partition 0.
    quiet = job.shares_terminal and (job.driver_shows_output or partition != 0)
    log = (lambda lines: None) if quiet else task_log.write
    gpus, gpu_problem = _gpus(barrier)
    (address, interface), address_problem = _address(job, barrier)

    async def gather_members(text: str, *, reaches_driver: bool) -> list[str]:
        return await gather(job, partition, text, barrier.allGather, reaches_driver=reaches_driver)

    async def open_driver(handlers: Handlers) -> DriverLink:
        return await register_with_driver(job, handlers, log)

    return TaskContext(
        member=Member(
            partition=partition,
            host_id=host_id(),
            host=socket.gethostname(),
            address=address,
            interface=interface,
            workers=job.workers[partition],
            gpus=gpus,
            problem=gpu_problem or address_problem or _packing_problem(),
            versions=installed_versions(),
        ),
        gather=gather_members,
        open_driver=open_driver,
        log=log,
        take_result=result.take,
        take_file=functools.partial(upload_file, client),
        take_artifacts=functools.partial(upload_artifacts, client),
        checkpoints=_checkpoint_backend(job, client),
        abort_transfers=client.abort,
        rows=rows,
        scratch_base=_scratch_base(),
        cores_per_worker=barrier.cpus() // job.workers[partition],
        session_process=os.getppid(),  # PySpark's daemon, which forks its Python workers
        environ=_inherited_environment(),
    )


def _address(job: JobSpec, context: Any) -> tuple[HostAddress, str]:
    """Return the address at which the peers reach this task, and what is wrong with it."""
    hosts = [info.address.rpartition(":")[0] for info in context.getTaskInfos()]
    driver = job.driver_address[0] if job.driver_address else None
    chosen = job.environment.get(GLOO_INTERFACE)
    if not chosen and GLOO_INTERFACE not in job.removed_variables:
        chosen = os.environ.get(GLOO_INTERFACE)
    try:
        return find_address(hosts[context.partitionId()], driver, hosts, chosen), ""
    except ValueError as error:
        return loopback_address(), f"{error} ({GLOO_INTERFACE} names it)"


def _gpus(context: Any) -> tuple[tuple[str, ...], str]:
    """Return the GPUs that Spark gave this task, and what is wrong with them."""
    resource = context.resources().get("gpu")
    if resource is None:
        return (), ""
    try:
        return compose_devices(resource.addresses, os.environ.get("CUDA_VISIBLE_DEVICES")), ""
    except ValueError as error:
        return (), f"{error}: check the discovery script of spark.worker.resource.gpu"


def _packing_problem() -> str:
    packed = PackedEnvironment.of_this_process()
    return "" if packed is None else packed.problem_here()


def _inherited_environment() -> dict[str, str]:
    """Return this process's variables, but for the number of threads that PySpark chose.

    It is that of the session's spark.task.cpus, whatever this stage's resources are; what the user
    chose (spark.executorEnv.OMP_NUM_THREADS) comes with the driver's variables.
    """
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def _checkpoint_backend(job: JobSpec, client: TransferClient) -> CheckpointBackend | None:
    if job.checkpoint_location is None:
        return None
    if is_url(job.checkpoint_location):
        return CheckpointStore(
            job.checkpoint_location, job.retention, job.record, job.checkpoint_fence
        )
    return DriverBackend(client)


def _scratch_base() -> str | None:
    """Find a directory that Spark or YARN deletes with the application, whatever happens to us."""
    for name in _SCRATCH_VARIABLES:
        for directory in re.split("[,:]", os.environ.get(name, "")):
            if directory and os.access(directory, os.W_OK):
                return directory
    return None
