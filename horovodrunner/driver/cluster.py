"""np >= 0: the run as a barrier stage, and cancelling it. Runs in: the driver."""

from __future__ import annotations

import functools
import math
import re
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from horovodrunner.core.job import FailureKind, JobSpec, Outcome, join_chunks
from horovodrunner.driver.channel import RETRY_REFUSED, DriverChannel
from horovodrunner.driver.console import Console
from horovodrunner.driver.session import is_connect
from horovodrunner.driver.slots import NOTE_SECONDS, slot_holders, tasks_running
from horovodrunner.driver.stage_end import stage_end
from horovodrunner.errors import BarrierStageError, ConfigurationError, StartTimeoutError
from horovodrunner.task.barrier import ROW_SCHEMA, barrier_task
from horovodrunner.task.network import find_address
from horovodrunner.task.store import CheckpointStore

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["BarrierRun"]

MAX_PORT = 65535
PORTS_CONF = "spark.horovodrunner.ports"
CANCEL_SECONDS = 10.0
FIRST_NOTE_SECONDS = 5.0
"""A stage that has not started by then is told to wait for slots."""

AFTER_FAILURE_SECONDS = 10.0
"""How long the stage may take to end once partition 0 has reported the run's failure."""


class BarrierRun:
    """One run as a barrier stage of a Spark session.

    Parameters
    ----------
    spark
        The session.
    job
        The run.
    console
        Shows what the run prints.
    start_timeout
        Seconds the stage's tasks may take to start.
    store
        Where checkpoints that come through the driver channel are kept, if they do.
    """

    def __init__(
        self,
        spark: SparkSession,
        job: JobSpec,
        console: Console,
        start_timeout: float,
        store: CheckpointStore | None = None,
    ) -> None:
        self._spark = spark
        self._job = job
        self._console = console
        self._start_timeout = start_timeout
        self._store = store
        self._tag = f"horovodrunner-{job.run_id}"
        self._outcomes: dict[int, Outcome] | None = None
        self._error: Exception | None = None
        self._ended = False
        self._next_note = time.monotonic() + FIRST_NOTE_SECONDS

    def run(self) -> Outcome:
        """Launch the stage and wait for its end.

        Returns
        -------
        Outcome
            Rank 0's success or the run's failure.

        Raises
        ------
        StartTimeoutError
            If the tasks do not start in time.
        BarrierStageError
            If Spark lost or cancelled the stage.
        KeyboardInterrupt
            If the user interrupts; the stage is cancelled then.
        """
        job, console = self._job, self._console
        with DriverChannel(
            job.run_id, job.token, console, on_event=console.wake, store=self._store
        ) as channel:
            port = channel.open(self._bind_address(), self._port())
            job = replace(
                job, driver_address=(self._advertised_address(), port), ports=self._task_ports()
            )
            thread = self._start_stage(job)
            try:
                self._wait(channel)
            except BaseException:
                channel.stop_run()
                self._cancel()
                thread.join(CANCEL_SECONDS)
                channel.wait_for_leaving(CANCEL_SECONDS)
                raise
            thread.join()
            if self._error is not None:
                # Spark has given the stage up, but its tasks may not have noticed yet.
                channel.stop_run()
                channel.wait_for_leaving(CANCEL_SECONDS)
            return self._outcome(channel)

    def _start_stage(self, job: JobSpec) -> Any:
        from pyspark import InheritableThread

        thread = InheritableThread(target=self._run_stage, args=(job,), session=self._spark)
        thread.name = self._tag
        thread.daemon = True
        thread.start()
        return thread

    def _run_stage(self, job: JobSpec) -> None:
        try:
            self._tag_this_thread()
            rows = self._spark.range(0, job.size, 1, job.size).mapInArrow(
                functools.partial(barrier_task, job), ROW_SCHEMA, barrier=True
            )
            chunks: dict[int, list[bytes]] = {}
            for partition, chunk in _collect(rows):
                chunks.setdefault(partition, []).append(chunk)
            self._outcomes = {partition: join_chunks(c) for partition, c in chunks.items()}
        except Exception as error:  # noqa: BLE001 - judged and raised in the caller's thread
            self._error = error
        finally:
            self._ended = True
            self._console.wake()

    def _wait(self, channel: DriverChannel) -> None:
        """Show output until the stage ends; cancel it when it does not start or not end."""
        start_by = time.monotonic() + self._start_timeout
        end_by: float | None = None
        while not self._ended:
            if channel.failure is not None and end_by is None:
                end_by = time.monotonic() + AFTER_FAILURE_SECONDS
            if end_by is not None:
                end_by = max(end_by, channel.storing_until)
            deadline = end_by if channel.registered else start_by
            self._console.show(self._pause(deadline, channel.registered))
            if not (channel.registered or self._ended):
                self._note_what_is_waited_for()
            if deadline is None or self._ended or time.monotonic() < deadline:
                continue
            if end_by is not None:
                self._cancel()
                return
            if self._tasks_are_running():
                self._console.note(
                    "the run's tasks are running and cannot reach the driver at "
                    f"{self._advertised_address()}; their output stays in the executors' logs"
                )
                start_by = math.inf
                continue
            if not channel.registered:
                holders = slot_holders(self._spark, self._tag)
                facts = f" ({holders.in_words()})" if holders is not None else ""
                raise StartTimeoutError(
                    f"the run's {self._job.size} tasks did not all start within "
                    f"{self._start_timeout:g} s{facts}; other jobs may hold the slots, or "
                    "executors cannot be started (see the Spark UI). Free the cluster, ask for "
                    "fewer ranks, or raise start_timeout"
                )
        self._console.show(0)

    def _pause(self, deadline: float | None, registered: bool) -> float | None:
        """Say how long to show output before something else is to be looked at."""
        remaining = None if deadline in {None, math.inf} else max(0.0, deadline - time.monotonic())
        if registered:
            return remaining
        until_note = max(0.0, self._next_note - time.monotonic())
        return until_note if remaining is None else min(remaining, until_note)

    def _note_what_is_waited_for(self) -> None:
        """Tell, once in a while, who holds the slots that the stage waits for."""
        if time.monotonic() < self._next_note:
            return
        self._next_note = time.monotonic() + NOTE_SECONDS
        holders = slot_holders(self._spark, self._tag)
        if holders is not None and not self._tasks_are_running():
            self._console.note(f"waiting for {self._job.size} slots, {holders.in_words()}")

    def _outcome(self, channel: DriverChannel) -> Outcome:
        outcomes = self._outcomes or {}
        if channel.failure is not None:
            return self._with_sparks_reason(channel)
        leader = outcomes.get(0, Outcome())
        if channel.retried:
            refused = BarrierStageError(RETRY_REFUSED)
            refused.executor_was_lost = True
            raise refused
        if leader.success is not None or leader.failure is not None:
            return leader
        for outcome in outcomes.values():
            if outcome.failure is not None:
                return outcome
        end = stage_end(self._error, channel.placement)
        error = BarrierStageError(end.text)
        error.executor_was_lost = end.task_was_lost
        raise error

    def _with_sparks_reason(self, channel: DriverChannel) -> Outcome:
        """Add what Spark knows about a task that partition 0 lost contact with."""
        outcome = channel.failure or Outcome()
        failure = outcome.failure
        if failure is None or failure.kind is not FailureKind.LOST or self._error is None:
            return outcome
        end = stage_end(self._error, channel.placement)
        if not end.task_was_lost:
            return outcome
        summary = f"contact with its task was lost: {end.text}"
        return replace(outcome, failure=replace(failure, summary=summary))

    def _tag_this_thread(self) -> None:
        if is_connect(self._spark):
            self._spark.addTag(self._tag)
            return
        context = self._spark.sparkContext
        context.addJobTag(self._tag)
        context.setLocalProperty(
            "spark.job.description", f"HorovodRunner(np={self._job.size}), run {self._job.run_id}"
        )

    def _cancel(self) -> None:
        if is_connect(self._spark):
            self._spark.interruptTag(self._tag)
        else:
            self._spark.sparkContext.cancelJobsWithTag(self._tag)

    def _tasks_are_running(self) -> bool:
        """Ask Spark, where it can be asked, whether all tasks of the stage have started."""
        if is_connect(self._spark):
            return False
        return tasks_running(self._spark, self._tag) == self._job.size

    def _bind_address(self) -> str:
        return self._spark.conf.get("spark.driver.bindAddress", None) or "0.0.0.0"  # noqa: S104

    def _task_ports(self) -> tuple[int, int] | None:
        value = self._spark.conf.get(PORTS_CONF, None)
        if not value:
            return None
        match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", value)
        if not match or not 0 < int(match[1]) < int(match[2]) <= MAX_PORT:
            raise ConfigurationError(
                f"{PORTS_CONF}={value!r}: it must be a range of ports such as 40000-40099"
            )
        return int(match[1]), int(match[2])

    def _port(self) -> int:
        value = self._spark.conf.get("spark.horovodrunner.driver.port", None) or "0"
        if not value.isdecimal() or int(value) > MAX_PORT:
            raise ConfigurationError(
                f"spark.horovodrunner.driver.port={value!r}: it must be a port number up to "
                f"{MAX_PORT}, or 0 for any free one"
            )
        return int(value)

    def _advertised_address(self) -> str:
        advertised = (
            None if is_connect(self._spark) else self._spark.conf.get("spark.driver.host", None)
        )
        return advertised or find_address(socket.gethostname(), None)[0]


def _collect(rows: Any) -> Any:
    """Bring the stage's rows to the driver, as Arrow where this PySpark can."""
    if hasattr(rows, "toArrow"):
        table = rows.toArrow()
        return zip(
            table.column("partition").to_pylist(), table.column("chunk").to_pylist(), strict=True
        )
    return ((row["partition"], row["chunk"]) for row in rows.collect())
