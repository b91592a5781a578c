"""np < 0: the same agent on the driver, without Spark. Runs in: the driver."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import sys
import threading
from collections.abc import Sequence

from horovodrunner.errors import ConfigurationError
from horovodrunner.flows.artifacts.driver import BroughtFiles, copy_file
from horovodrunner.flows.artifacts.store import ArtifactStore
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.going import GoingRun
from horovodrunner.flows.logs.debug import turn_on_if_wanted
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.outcome.outcome import Outcome, with_result
from horovodrunner.flows.results.driver import ResultStore
from horovodrunner.flows.rows.taking import RowsTaker
from horovodrunner.pickling.buffers import Layout
from horovodrunner.placement.topology import Member, compose_devices
from horovodrunner.processes.task.agent import run_task
from horovodrunner.processes.task.context import TaskContext
from horovodrunner.processes.task.driver_link import DriverLink
from horovodrunner.processes.task.network import host_id, loopback_address
from horovodrunner.wire.events import Event, Handlers, Sink, Stop, dispatcher, ignore, refuse

__all__ = ["run_locally"]


def run_locally(
    job: JobSpec,
    console: Console,
    files: BroughtFiles,
    results: ResultStore,
    rows: RowsTaker | None = None,
    *,
    run: GoingRun,
    artifacts: ArtifactStore,
    flows: Sequence[Handlers] = (),
    deals_gpus: bool = True,
) -> Outcome:
    """Run all ranks as processes of this machine; `flows` take events beside the console."""
    address, interface = loopback_address()
    member = Member(
        partition=0,
        host_id=host_id(),
        host=socket.gethostname(),
        address=address,
        interface=interface,
        workers=job.size,
        gpus=_gpus_of_the_driver() if deals_gpus else (),
    )
    told: list[Sink] = []
    interrupted = threading.Event()
    results.begin(job.size)

    async def open_driver(handlers: Handlers) -> DriverLink:
        loop, take = asyncio.get_running_loop(), dispatcher([handlers], refuse)

        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has just ended
                loop.call_soon_threadsafe(take, event)

        told.append(tell)
        if interrupted.is_set():
            take(Stop())
        sending = contextlib.AsyncExitStack()
        sending.enter_context(run.wishes_go_to(tell))
        # ignored: what matters to a driver that only hears of the run
        return DriverLink(dispatcher([console.handlers, *flows], ignore), close=sending.aclose)

    async def gather(text: str, *, reaches_driver: bool) -> list[str]:
        return [text]

    def take_result(descriptor: int, layout: Layout, rank: int, *, reaches_driver: bool) -> None:
        results.take(descriptor, layout, rank)

    context = TaskContext(
        member=member,
        gather=gather,
        open_driver=open_driver,
        log=lambda lines: None,  # the console shows them
        take_result=take_result,
        take_file=functools.partial(copy_file, files, console.note),
        take_artifacts=artifacts.take,
        checkpoints=(
            CheckpointStore(
                job.checkpoint_location, job.retention, job.record, job.checkpoint_fence
            )
            if job.checkpoint_location is not None
            else None
        ),
        rows=rows,
        cores_per_worker=len(os.sched_getaffinity(0)) // job.size,
    )
    turn_on_if_wanted("the driver and its task", "its standard error")
    outcomes: list[Outcome] = []
    errors: list[BaseException] = []

    def run_in_thread() -> None:
        try:
            outcomes.append(asyncio.run(run_task(job, context)))
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)
        finally:
            console.wake()

    thread = threading.Thread(target=run_in_thread, name="horovodrunner-local", daemon=True)
    thread.start()
    try:
        console.show()
    except BaseException:
        interrupted.set()
        for tell in told:
            tell(Stop())
        thread.join()
        raise
    thread.join()
    if errors:
        raise errors[0]
    return with_result(outcomes[0], results.first)


def _gpus_of_the_driver() -> tuple[str, ...]:
    """Return the GPUs that Spark gave the driver, if there is a session and it asked for some.

    Without any, the workers see what this process sees.
    """
    pyspark = sys.modules.get("pyspark")  # np < 0 needs no Spark, so it is not imported here
    context = getattr(getattr(pyspark, "SparkContext", None), "_active_spark_context", None)
    resource = context.resources.get("gpu") if context is not None else None
    if resource is None:
        return ()
    try:
        return compose_devices(resource.addresses, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except ValueError as error:
        raise ConfigurationError(f"{error}: check spark.driver.resource.gpu") from error
