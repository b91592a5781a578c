"""Task slots: how many there are, how many may come, and who holds them. Runs in: the driver."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from horovodrunner.driver.console import Console
from horovodrunner.driver.session import is_connect
from horovodrunner.errors import ClusterCapacityError, ConfigurationError, StartTimeoutError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["Holders", "require_slots", "slot_holders", "tasks_running", "total_slots"]

QUIET_SECONDS = 30.0
"""Where Spark does not say how many executors will come: none that has not registered after so
long without any other is waited for."""

CHECK_SECONDS = 0.1
NOTE_SECONDS = 15.0
"""How often the user is told what is waited for."""

_DECIDING_CONFS = (
    "spark.executor.instances",
    "spark.executor.cores",
    "spark.task.cpus",
    "spark.executor.resource.gpu.amount",
    "spark.task.resource.gpu.amount",
    "spark.cores.max",
)


@dataclass(frozen=True)
class Holders:
    """Who holds a cluster's slots.

    Parameters
    ----------
    total
        Slots of the registered executors.
    by_job
        Slots that each running Spark job holds, by its id.
    """

    total: int
    by_job: dict[int, int]

    def in_words(self) -> str:
        """Say how many are free, and which jobs hold the others.

        Returns
        -------
        str
            Half a sentence.

        Examples
        --------
        >>> Holders(4, {17: 2}).in_words()
        '2 free, 2 held by job 17'
        >>> Holders(4, {}).in_words()
        '4 free'
        """
        free = max(0, self.total - sum(self.by_job.values()))
        held = [f"{count} held by job {job}" for job, count in sorted(self.by_job.items()) if count]
        return ", ".join([f"{free} free", *held])


def total_slots(spark: SparkSession) -> int | None:
    """Count the barrier tasks that the registered executors can run at once.

    Spark's own figure, the one it checks barrier stages against: cores and, where tasks ask for
    them, GPUs.

    Parameters
    ----------
    spark
        The session.

    Returns
    -------
    int or None
        The slots; None over Spark Connect, where they cannot be asked for.
    """
    if is_connect(spark):
        return None
    context = spark.sparkContext._jsc.sc()
    profile = context.resourceProfileManager().defaultResourceProfile()
    return int(context.maxNumConcurrentTasks(profile))


def slot_holders(spark: SparkSession, own_tag: str) -> Holders | None:
    """Find out who holds the cluster's slots.

    Parameters
    ----------
    spark
        The session.
    own_tag
        The job tag of the run that waits; its own job is left out.

    Returns
    -------
    Holders or None
        The slots and their holders; None where Spark cannot be asked.
    """
    total = total_slots(spark)
    if total is None:
        return None
    by_job: dict[int, int] = {}
    for job_id, tags, tasks in _running_tasks(spark):
        if own_tag not in tags and tasks:
            by_job[job_id] = by_job.get(job_id, 0) + tasks
    return Holders(total, by_job)


def tasks_running(spark: SparkSession, tag: str) -> int:
    """Count the running tasks of the jobs with a tag.

    Parameters
    ----------
    spark
        The session, not one of Spark Connect.
    tag
        The job tag.

    Returns
    -------
    int
        The tasks.
    """
    return sum(tasks for _, tags, tasks in _running_tasks(spark) if tag in tags)


def _running_tasks(spark: SparkSession) -> Iterator[tuple[int, list[str], int]]:
    """Ask the scheduler itself for each task set's job, job tags and number of running tasks.

    Spark's status tracker would be the public way; what it tells may be ten seconds old.
    """
    waiting = [spark.sparkContext._jsc.sc().taskScheduler().rootPool()]
    while waiting:
        schedulable = waiting.pop()
        members = schedulable.schedulableQueue()
        if members is not None:  # a pool
            waiting.extend(members.toArray())
            continue
        tags = schedulable.taskSet().properties().getProperty("spark.job.tags") or ""
        yield int(schedulable.priority()), tags.split(","), int(schedulable.runningTasks())


def require_slots(spark: SparkSession, np: int, start_timeout: float, console: Console) -> int:
    """Check np against the cluster's slots before anything is launched; wait where more may come.

    Parameters
    ----------
    spark
        The session.
    np
        Number of ranks asked for; 0 for all slots.
    start_timeout
        Most seconds to wait for executors that are still to register.
    console
        Shows what is waited for.

    Returns
    -------
    int
        Number of ranks to start.

    Raises
    ------
    ConfigurationError
        If dynamic allocation is on, which barrier stages do not support (SPARK-24942).
    ClusterCapacityError
        If there are fewer slots than np and no more will come, or none for np=0.
    StartTimeoutError
        If they might have come and did not within `start_timeout`.
    """
    if spark.conf.get("spark.dynamicAllocation.enabled", "false") == "true":
        raise ConfigurationError(
            "spark.dynamicAllocation.enabled is true, and Spark runs no barrier stage with "
            "dynamic allocation (SPARK-24942): start the session with "
            "spark.dynamicAllocation.enabled=false and a fixed number of executors"
        )
    slots = total_slots(spark)
    if slots is None:
        if np == 0:
            raise ConfigurationError(
                "np=0 (all slots) does not work over Spark Connect, which does not tell how many "
                "slots there are: give the number of ranks"
            )
        return np
    expected = _expected_slots(spark)
    wanted = np or expected or 1
    if slots < wanted and expected is not None and wanted > expected:
        raise _too_few_slots(spark, np, expected)
    if slots < wanted:
        slots = _wait_for_slots(spark, wanted, expected, start_timeout, console)
    if slots < wanted and expected is not None:
        raise StartTimeoutError(
            f"{wanted} task slots were asked for, {expected} are to come "
            f"({_facts(spark)}), and after {start_timeout:g} s there are {slots}: executors cannot "
            "be started (see the cluster manager), or raise start_timeout"
        )
    if slots < wanted:
        raise _too_few_slots(spark, np, slots)
    return np or slots


def _wait_for_slots(
    spark: SparkSession, wanted: int, expected: int | None, start_timeout: float, console: Console
) -> int:
    """Wait until executors have registered; Spark tells Python of them only when asked."""
    began = changed = noted = time.monotonic()
    slots = 0
    while time.monotonic() - began < start_timeout:
        now, before, slots = time.monotonic(), slots, total_slots(spark) or 0
        if slots >= wanted:
            break
        if slots != before:
            changed = now
        if expected is None and now - changed >= QUIET_SECONDS:
            break
        if now - noted >= NOTE_SECONDS:
            noted = now
            console.note(f"waiting for {wanted} slots, {slots} have registered so far")
        console.show(0)
        time.sleep(CHECK_SECONDS)
    return slots


def _expected_slots(spark: SparkSession) -> int | None:
    """Count the slots that the master string or the settings promise, where they do."""
    master = spark.sparkContext.master
    if match := re.fullmatch(r"local-cluster\[\s*(\d+)\s*,\s*(\d+)\s*,.*\]", master):
        workers, cores = int(match[1]), int(match[2])
        own_cores = int(spark.conf.get("spark.executor.cores", None) or cores)
        return workers * (cores // own_cores) * _slots_per_executor(spark, own_cores)
    if master.startswith("local"):
        return total_slots(spark)
    instances = spark.conf.get("spark.executor.instances", None)
    cores_of_executor = spark.conf.get("spark.executor.cores", None)
    if instances is None or cores_of_executor is None:
        return None
    return int(instances) * _slots_per_executor(spark, int(cores_of_executor))


def _slots_per_executor(spark: SparkSession, cores: int) -> int:
    slots = cores // int(spark.conf.get("spark.task.cpus", "1") or 1)
    per_task = float(spark.conf.get("spark.task.resource.gpu.amount", "0") or 0)
    if per_task:
        per_executor = float(spark.conf.get("spark.executor.resource.gpu.amount", "0") or 0)
        slots = min(slots, int(per_executor / per_task))
    return slots


def _facts(spark: SparkSession) -> str:
    confs = [
        f"{name}={value}"
        for name in _DECIDING_CONFS
        if (value := spark.conf.get(name, None)) is not None
    ]
    return "; ".join([spark.sparkContext.master, *([", ".join(confs)] if confs else [])])


def _too_few_slots(spark: SparkSession, np: int, slots: int) -> ClusterCapacityError:
    asked = f"np={np}" if np else "np=0 (all slots)"
    return ClusterCapacityError(
        f"{asked} needs {np or 'at least 1'} task slot{'s' if np > 1 else ''}, and the cluster "
        f"({_facts(spark)}) has {slots}: ask for fewer ranks, add executors or cores, or use a "
        "negative np to run on the driver"
    )
