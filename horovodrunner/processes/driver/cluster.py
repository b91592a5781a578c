"""np >= 0: the run as a barrier stage, and cancelling it. Runs in: the driver."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from horovodrunner.errors import BarrierStageError, DataError, StartTimeoutError
from horovodrunner.flows.artifacts.driver import BroughtFiles
from horovodrunner.flows.artifacts.store import ArtifactStore
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.going import GoingRun
from horovodrunner.flows.logs.debug import turn_on_if_wanted
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.outcome.outcome import FailureKind, Outcome, with_result
from horovodrunner.flows.results.driver import ResultStore
from horovodrunner.flows.rows.driver import stage_input
from horovodrunner.flows.saving.driver import decommissions_noticed
from horovodrunner.processes.driver import addresses
from horovodrunner.processes.driver.channel import RETRY_REFUSED, DriverChannel
from horovodrunner.processes.driver.resources import TaskRequest
from horovodrunner.processes.driver.slots import NOTE_SECONDS, slot_holders
from horovodrunner.processes.driver.stage_end import StageEnd, data_problem, stage_end
from horovodrunner.processes.task.barrier import ROW_SCHEMA, barrier_task
from horovodrunner.spark.arrow import map_in_arrow
from horovodrunner.spark.jobs import spark_job, start_thread
from horovodrunner.spark.session import end_is_told, was_stopped
from horovodrunner.wire.events import Handlers

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from horovodrunner.data.unshared import UnsharedDataSet
    from horovodrunner.flows.rows.task import Travelling

__all__ = ["BarrierRun"]

CANCEL_SECONDS = 10.0
CANCEL_AGAIN_SECONDS = 0.5
"""Spark forgets a cancellation that comes before the job."""

FIRST_LOOK_SECONDS = 5.0
"""A stage that has not started by then is looked at."""

LOOK_SECONDS = 1.0
SILENT_SECONDS = 60.0
"""Longer than Spark on a busy machine takes to start tasks where slots are free, and such a task to
start its Python, import Horovod's launcher and call the driver: then something is wrong."""

AFTER_FAILURE_SECONDS = 10.0
"""How long the stage may take to end once partition 0 has reported the run's failure."""


_logger = logging.getLogger(__name__)


class BarrierRun:
    """One run as a barrier stage of a Spark session."""

    def __init__(
        self,
        spark: SparkSession,
        job: JobSpec,
        request: TaskRequest,
        console: Console,
        files: BroughtFiles,
        *,
        run: GoingRun,
        results: ResultStore,
        artifacts: ArtifactStore | None = None,
        start_timeout: float,
        waiting_since: float,
        on_start: Callable[[], None] = lambda: None,
        store: CheckpointStore | None = None,
        data: Sequence[UnsharedDataSet] = (),
        flows: Sequence[Handlers] = (),
    ) -> None:
        self._spark = spark
        self._job = job
        self._tasks = len(job.workers)
        self._request = request
        self._console = console
        self._files = files
        self._run = run
        self._results = results
        self._artifacts = artifacts
        self._start_timeout = start_timeout
        self._on_start = on_start
        self._store = store
        self._data = data
        self._flows = flows
        self._tag = f"horovodrunner-{job.run_id}"
        self._spark_job = spark_job(
            spark,
            self._tag,
            f"HorovodRunner(np={job.size}), {GoingRun(job.run_id, run.name).title}",
        )
        self._outcomes: dict[int, Outcome] | None = None
        self._error: Exception | None = None
        self._ended = False
        self._is_given_up = False
        self._start_by = waiting_since + start_timeout
        self._next_note = time.monotonic() + FIRST_LOOK_SECONDS
        self._all_running_since: float | None = None
        self._free_since: float | None = None
        self._last_note = ""

    def run(self) -> Outcome:
        """Launch the stage and wait for its end."""
        turn_on_if_wanted("the driver", "its standard error")
        job, spark, console = self._job, self._spark, self._console
        self._results.begin(job.size)
        with DriverChannel(
            job.run_id,
            job.token,
            console,
            on_event=console.wake,
            store=self._store,
            files=self._files,
            artifacts=self._artifacts,
            results=self._results,
            tasks=len(job.workers),
            flows=self._flows,
        ) as channel:
            port = channel.open(addresses.bind_host(spark), addresses.channel_port(spark))
            job = replace(
                job,
                driver_address=(addresses.advertised_host(spark), port),
                ports=addresses.task_ports(spark),
            )
            _logger.debug("run %s: listening at %s", job.run_id, job.driver_address)
            thread = start_thread(spark, self._tag, functools.partial(self._run_stage, job))
            try:
                with (
                    self._run.wishes_go_to(channel.want_save),
                    decommissions_noticed(
                        spark, self._spark_job, lambda: channel.placement, channel.want_save
                    ),
                ):
                    self._wait(channel)
            except BaseException:
                channel.stop_run()
                self._cancel(thread)
                channel.wait_for_leaving(CANCEL_SECONDS)
                self._note_lost_files(channel)
                raise
            thread.join()
            if self._error is not None:
                # Spark has given the stage up, but its tasks may not have noticed yet.
                channel.stop_run()
            channel.wait_for_leaving(CANCEL_SECONDS)  # the last lines may still be on their way
            console.show(0)  # on_report gets the last points before the outcome is known
            self._note_lost_files(channel)
            outcome = self._outcome(channel)
            has_run = outcome.success is not None or _rank_of(outcome) is not None
            if has_run and not channel.registered:
                self._note_no_contact()
            return outcome

    def _cancel(self, stage: threading.Thread) -> None:
        """Cancel the stage, also one that its thread is only about to launch."""
        self._is_given_up = True
        end_by = time.monotonic() + CANCEL_SECONDS
        while stage.is_alive() and time.monotonic() < end_by:
            self._spark_job.cancel()
            stage.join(CANCEL_AGAIN_SECONDS)

    def _run_stage(self, job: JobSpec) -> None:
        profile = {} if self._request.profile is None else {"profile": self._request.profile}
        try:
            self._spark_job.begin()
            rows = map_in_arrow(
                stage_input(self._spark, job.workers, self._data),
                functools.partial(barrier_task, job, self._travelling()),
                ROW_SCHEMA,
                barrier=True,
                **profile,
            )
            if self._is_given_up:
                return
            chunks: dict[int, list[bytes]] = {}
            for partition, chunk in _collect(rows):
                chunks.setdefault(partition, []).append(chunk)
            take_rows = self._results.take_rows
            self._outcomes = {number: take_rows(each) for number, each in chunks.items()}
        except Exception as error:  # noqa: BLE001 - judged and raised in the caller's thread
            self._error = error
        finally:
            _logger.debug("the stage has ended: %s", self._error or sorted(self._outcomes or {}))
            self._spark_job.end()
            self._ended = True
            self._console.wake()

    def _travelling(self) -> tuple[Travelling, ...]:
        if not self._data:
            return ()
        from horovodrunner.flows.rows.task import Travelling

        return tuple(Travelling(each.identity, each.columns) for each in self._data)

    def _wait(self, channel: DriverChannel) -> None:
        """Show output until the stage ends; cancel it when it does not start or not end."""
        first_look = time.monotonic() + FIRST_LOOK_SECONDS
        while not (self._ended or channel.registered):
            until_look = first_look - time.monotonic()
            self._console.show(until_look if until_look > 0 else LOOK_SECONDS)
            if time.monotonic() >= first_look and not (self._ended or channel.registered):
                with end_is_told(self._spark):
                    self._look_whether_it_starts(has_heard=channel.has_heard)
        self._on_start()
        end_by: float | None = None
        while not self._ended:
            if channel.failure is not None:
                end_by = end_by or time.monotonic() + AFTER_FAILURE_SECONDS
                end_by = max(end_by, channel.storing_until)
                if time.monotonic() >= end_by:
                    self._spark_job.cancel()
                    return
            self._console.show(None if end_by is None else max(0.0, end_by - time.monotonic()))
        self._console.show(0)

    def _look_whether_it_starts(self, *, has_heard: bool = False) -> None:
        """Note what a stage that has not been heard of waits for; give up when it is late."""
        now = time.monotonic()
        if self._data and (computing := self._spark_job.computing_tasks()):
            self._start_by = now + self._start_timeout
            tasks = f"{computing} task{'s run' if computing > 1 else ' runs'}"
            self._note(f"computing the data sets that travel with the run: {tasks}", routine=True)
            return
        running = self._spark_job.running_tasks()
        if running == self._tasks:
            self._on_start()
            self._all_running_since = self._all_running_since or now
            if now - self._all_running_since >= SILENT_SECONDS and not has_heard:
                self._note(
                    "nothing was heard of the run's tasks, which run for "
                    f"{SILENT_SECONDS:g} s now: executors are unpacking archives, or cannot reach "
                    f"this process at {addresses.advertised_host(self._spark)} (then the result "
                    "comes all the same)"
                )
            return
        if self._all_running_since is not None:
            return  # some have ended
        holders = slot_holders(self._spark, self._request, self._spark_job)
        if now >= self._start_by and running is not None:
            facts = f" ({holders.describe()})" if holders is not None else ""
            raise StartTimeoutError(
                f"the run's {self._request.describe_tasks(self._job.size)} did not all start "
                f"within {self._start_timeout:g} s{facts}; other jobs may hold the slots, or "
                "executors cannot be started (see the Spark UI). Free the cluster, ask for "
                "fewer ranks, or raise start_timeout"
            )
        if holders is None or holders.free < self._tasks:
            self._free_since = None
            facts = f", {holders.describe()}" if holders is not None else ""
            self._note(f"waiting for {self._tasks} slots{facts}")
            return
        self._free_since = self._free_since or now
        if now - self._free_since >= SILENT_SECONDS:
            self._note(f"{holders.describe()}; waiting for Spark to start the tasks")

    def _note(self, text: str, *, routine: bool = False) -> None:
        """Note what is waited for, now and then, if it is something else than before."""
        now = time.monotonic()
        if now >= self._next_note and text != self._last_note:
            self._next_note, self._last_note = now + NOTE_SECONDS, text
            self._console.note(text, routine=routine)

    def _note_lost_files(self, channel: DriverChannel) -> None:
        """Note which files will not come, when whoever has them could not."""
        if not (channel.placement and self._files.missing()):
            return
        channel.wait_for_leaving(CANCEL_SECONDS)
        missing = self._files.missing()
        if missing and not channel.has_taken_leave:
            self._console.note(
                f"{missing}: nothing came, because rank 0's task ended before it could send it"
            )

    def _note_no_contact(self) -> None:
        """Note what was missed by a driver that the tasks could not reach."""
        lost = ", and checkpoints were not kept" if self._store is not None else ""
        if missing := self._files.missing():
            lost += f"; nothing came of {missing}"
        self._console.note(
            "the run's tasks could not reach this process at "
            f"{addresses.advertised_host(self._spark)}: what the ranks printed and their "
            f"log_to_driver messages are in the executors' logs{lost}. "
            f"{addresses.HOST_CONF} and {addresses.PORT_CONF} say where executors are to connect"
        )

    def _outcome(self, channel: DriverChannel) -> Outcome:
        outcomes = self._outcomes or {}
        if channel.failure is not None:
            return self._with_sparks_reason(channel)
        leader = with_result(outcomes.get(0, Outcome()), self._results.first)
        if channel.retried:
            raise BarrierStageError(RETRY_REFUSED, executor_was_lost=True)
        if leader.success is not None or leader.failure is not None:
            return leader
        for outcome in outcomes.values():
            if outcome.failure is not None:
                return outcome
        if self._data and not channel.registered and (cause := data_problem(self._error)):
            raise DataError(
                f"the rows of the data sets could not be computed: {cause}"
            ) from self._error
        end = self._stage_end(channel)
        raise BarrierStageError(
            end.text, executor_was_lost=end.task_was_lost, was_cancelled=end.was_cancelled
        )

    def _stage_end(self, channel: DriverChannel) -> StageEnd:
        """Return how the stage ended; of a lost task also what bounds its memory."""
        end = stage_end(self._error, channel.placement)
        if self._error is not None and not end.task_was_lost and was_stopped(self._spark):
            text = "the Spark session was stopped while the run was going on"
            return StageEnd(f"{text}: start the run again in a new session", was_cancelled=True)
        limit = None
        with contextlib.suppress(Exception):  # the session may have gone
            limit = self._spark.conf.get("spark.executor.pyspark.memory", None)
        if not end.task_was_lost or not limit:
            return end
        bound = f"spark.executor.pyspark.memory={limit} bounds its Python processes: raise it"
        return replace(end, text=f"{end.text}; {bound}")

    def _with_sparks_reason(self, channel: DriverChannel) -> Outcome:
        """Add what Spark knows about a task that partition 0 lost contact with."""
        outcome = channel.failure or Outcome()
        failure = outcome.failure
        if failure is None or failure.kind is not FailureKind.LOST or self._error is None:
            return outcome
        end = self._stage_end(channel)
        if not end.task_was_lost:
            return outcome
        summary = f"{failure.summary.partition(';')[0]}: {end.text}"
        return replace(outcome, failure=replace(failure, summary=summary))


def _rank_of(outcome: Outcome) -> int | None:
    """Return the rank that failed; None where the tasks refused to start."""
    return None if outcome.failure is None else outcome.failure.rank


def _collect(rows: Any) -> Any:
    """Bring the stage's rows to the driver, as Arrow where this PySpark can."""
    if hasattr(rows, "toArrow"):
        table = rows.toArrow()
        return zip(
            table.column("partition").to_pylist(), table.column("chunk").to_pylist(), strict=True
        )
    return ((row["partition"], row["chunk"]) for row in rows.collect())
