"""One Spark job of ours: its tag, whether its tasks run, cancelling it. Runs in: the driver."""

from __future__ import annotations

import inspect
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from horovodrunner.spark import interrupt
from horovodrunner.spark.session import is_connect

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["ClassicJob", "ConnectJob", "SparkJob", "collect", "spark_job", "start_thread"]

CANCEL_SECONDS = 10.0


class ClassicJob:
    """A job of this process's own SparkContext."""

    def __init__(self, spark: SparkSession, tag: str, description: str) -> None:
        self._context = spark.sparkContext
        self._tag = tag
        self._description = description

    def begin(self) -> None:
        """Mark what this thread launches as this job's."""
        self._context.addJobTag(self._tag)
        self._context.setLocalProperty("spark.job.description", self._description)

    def end(self) -> None:
        pass  # the marks end with the thread

    def cancel(self) -> None:
        self._context.cancelJobsWithTag(self._tag)

    def running_tasks(self) -> int | None:
        """Return how many of the barrier stage's tasks run now."""
        return self._own_tasks(in_barrier=True)

    def computing_tasks(self) -> int:
        """Return how many tasks run now that compute what the barrier stage reads."""
        return self._own_tasks(in_barrier=False)

    def _own_tasks(self, *, in_barrier: bool) -> int:
        return sum(
            tasks
            for _, tags, tasks, is_barrier in self._task_sets()
            if self._tag in tags and is_barrier == in_barrier
        )

    tells_executors = True

    def executors(self) -> dict[int, str]:
        """Return the executor of each of the barrier stage's tasks, by partition."""
        found: dict[int, str] = {}
        for task_set in self._schedulables():
            if task_set.isBarrier() and self._tag in _tags(task_set):
                infos = task_set.taskInfos().values().iterator()
                while infos.hasNext():
                    info = infos.next()
                    found[info.index()] = info.executorId()
        return found

    def is_decommissioned(self, executor: str) -> bool:
        """Return whether Spark has begun to decommission an executor."""
        scheduler = self._context._jsc.sc().taskScheduler()
        return bool(scheduler.getExecutorDecommissionState(executor).isDefined())

    def slots_by_other_job(self) -> dict[int, int] | None:
        """Return the slots that each other running job holds."""
        by_job: dict[int, int] = {}
        for job_id, tags, tasks, _ in self._task_sets():
            if tasks and self._tag not in tags:
                by_job[job_id] = by_job.get(job_id, 0) + tasks
        return by_job

    def _task_sets(self) -> Iterator[tuple[int, list[str], int, bool]]:
        """Yield each task set's job, tags, running tasks, and whether it is a barrier stage's."""
        for task_set in self._schedulables():
            yield (
                int(task_set.priority()),
                _tags(task_set),
                task_set.runningTasks(),
                task_set.isBarrier(),
            )

    def _schedulables(self) -> Iterator[Any]:
        """Yield the managers of task sets.

        The scheduler itself is asked: what Spark's status tracker tells may be ten seconds old.
        """
        waiting = [self._context._jsc.sc().taskScheduler().rootPool()]
        while waiting:
            schedulable = waiting.pop()
            members = schedulable.schedulableQueue()
            if members is not None:  # a pool
                waiting.extend(members.toArray())
                continue
            yield schedulable


def _tags(task_set: Any) -> list[str]:
    properties = task_set.taskSet().properties()  # a job from Scala may have none
    tags = properties and properties.getProperty("spark.job.tags")
    return (tags or "").split(",")


class ConnectJob:
    """A job that a Spark Connect server runs for this process."""

    def __init__(self, spark: SparkSession, tag: str) -> None:
        self._spark: Any = spark
        self._tag = tag
        self._thread: int | None = None
        self._running: int | None = None

    def begin(self) -> None:
        self._spark.addTag(self._tag)
        self._thread = threading.get_ident()
        if register := self._progress("register"):
            self._running = 0
            register(self._note_progress)

    def end(self) -> None:
        remove = self._progress("remove")
        if remove and self._running is not None:  # otherwise begin() has failed
            remove(self._note_progress)

    def cancel(self) -> None:
        self._spark.interruptTag(self._tag)

    def running_tasks(self) -> int | None:
        """Return how many tasks run now; None before Spark 4.0, whose server does not tell."""
        return self._running

    def computing_tasks(self) -> int:
        """Return how many tasks run now: the server does not tell the stages apart."""
        return self._running or 0

    tells_executors = False

    def executors(self) -> dict[int, str]:
        """Return nothing: the server does not tell."""
        return {}

    def is_decommissioned(self, executor: str) -> bool:
        """Return False: the server does not tell."""
        return False

    def slots_by_other_job(self) -> dict[int, int] | None:
        """Return None: a Spark Connect server tells nothing about others' jobs."""
        return None

    def _progress(self, what: str) -> Callable[[Callable[..., None]], None] | None:
        method: Callable[[Callable[..., None]], None] | None = getattr(
            self._spark, f"{what}ProgressHandler", None
        )
        return method

    def _note_progress(self, *, inflight_tasks: int, **_: Any) -> None:
        """Note what the server reports to the thread that waits for the operation."""
        if threading.get_ident() == self._thread:
            self._running = inflight_tasks


SparkJob: TypeAlias = ClassicJob | ConnectJob


def spark_job(spark: SparkSession, tag: str, description: str) -> SparkJob:
    """Return a job that is not launched yet, with a tag that no other job has."""
    return ConnectJob(spark, tag) if is_connect(spark) else ClassicJob(spark, tag, description)


def start_thread(spark: SparkSession, name: str, target: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread in which Spark has this thread's session and properties."""
    from pyspark import InheritableThread

    takes_session = "session" in inspect.signature(InheritableThread).parameters
    session = {"session": spark} if takes_session else {}  # not before pyspark 4.0
    thread: threading.Thread = InheritableThread(target=target, **session)
    thread.name = name
    thread.daemon = True
    thread.start()
    return thread


def collect(df: Any, description: str) -> list[Any]:
    """Return ``df.collect()``; an interrupt cancels its job and nothing else.

    It runs in a thread of its own, because an interrupt within a call of Py4J leaves the answer
    unread, and the session takes it for the next call's.
    """
    spark = df.sparkSession
    name = f"horovodrunner-{secrets.token_hex(4)}"
    job = spark_job(spark, name, description)
    rows: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            job.begin()
            rows.extend(df.collect())
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)
        finally:
            job.end()

    with interrupt.only_this_run():
        thread = start_thread(spark, name, run)
        try:
            interrupt.join(thread)
        except BaseException:
            job.cancel()
            thread.join(CANCEL_SECONDS)
            raise
    if errors:
        raise errors[0]
    return rows
