"""Task slots: how many there are, how many may come, and who holds them. Runs in: the driver."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from horovodrunner.errors import ClusterCapacityError, ConfigurationError, StartTimeoutError
from horovodrunner.flows.logs.driver import Console
from horovodrunner.processes.driver.executors import describe_ended, describe_log_location
from horovodrunner.processes.driver.resources import TaskRequest
from horovodrunner.spark.jobs import SparkJob
from horovodrunner.spark.session import is_connect

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["Holders", "require_slots", "slot_holders", "total_slots"]

QUIET_SECONDS = 30.0
"""How long to wait for one more executor where Spark does not say how many will come."""

CHECK_SECONDS = 0.1
NOTE_SECONDS = 15.0
"""How often, at most, the user is told what is waited for."""

_DECIDING_CONFS = (
    "spark.executor.instances",
    "spark.executor.cores",
    "spark.executor.resource.gpu.amount",
    "spark.cores.max",
)


@dataclass(frozen=True)
class Holders:
    """How many slots the registered executors have, and how many each Spark job holds."""

    total: int
    by_job: dict[int, int]

    @property
    def free(self) -> int:
        return max(0, self.total - sum(self.by_job.values()))

    def describe(self) -> str:
        """Describe how many are free, and which jobs hold the others.

        >>> Holders(4, {17: 2}).describe()
        '2 free, 2 held by job 17'
        """
        held = [f"{count} held by job {job}" for job, count in sorted(self.by_job.items())]
        return ", ".join([f"{self.free} free", *held])


def total_slots(spark: SparkSession, request: TaskRequest | None = None) -> int | None:
    """Return how many barrier tasks the registered executors can run at once.

    Spark's own figure, against which it checks barrier stages; None over Spark Connect, which does
    not tell.
    """
    if is_connect(spark):
        return None
    context = spark.sparkContext._jsc.sc()
    if request is not None and request.profile is not None:
        profile = request.profile._java_resource_profile
    else:
        profile = context.resourceProfileManager().defaultResourceProfile()
    return int(context.maxNumConcurrentTasks(profile))


def slot_holders(spark: SparkSession, request: TaskRequest, own: SparkJob) -> Holders | None:
    """Return who holds the cluster's slots beside the run's own job, where Spark tells."""
    total, by_job = total_slots(spark, request), own.slots_by_other_job()
    return None if total is None or by_job is None else Holders(total, by_job)


def require_slots(
    spark: SparkSession, np: int, request: TaskRequest, start_timeout: float, console: Console
) -> int:
    """Return the number of ranks to start, or raise when the cluster cannot have the slots.

    Waits up to `start_timeout` seconds for executors that are still to register.
    """
    if spark.conf.get("spark.dynamicAllocation.enabled", "false") == "true":
        raise ConfigurationError(
            "spark.dynamicAllocation.enabled is true, and Spark runs no barrier stage with "
            "dynamic allocation (SPARK-24942): start the session with "
            "spark.dynamicAllocation.enabled=false and a fixed number of executors"
        )
    slots, expected = total_slots(spark, request), _expected_slots(spark, request)
    if np == 0 and slots is None and expected is None:
        raise ConfigurationError(
            "np=0 (all slots): this Spark Connect server does not tell how many slots its "
            "cluster has. Give the number of ranks"
        )
    wanted = request.tasks(np) or expected or 1
    if expected is not None and wanted > expected and (slots is None or slots < wanted):
        raise _too_few_slots(spark, np, expected, request)
    if slots is None:
        return np or wanted * request.ranks
    if slots < wanted:
        slots = _wait_for_slots(
            spark, wanted, request, expected=expected, start_timeout=start_timeout, console=console
        )
    if slots >= wanted:
        return np or slots * request.ranks
    if expected is None:
        raise _too_few_slots(spark, np, slots, request)
    raise StartTimeoutError(
        f"{wanted} task slots were asked for, {expected} are to come "
        f"({_facts(spark, request)}), and after {start_timeout:g} s there are {slots}: "
        f"{describe_ended(spark, wanted) or 'executors cannot be started'}; "
        f"{describe_log_location(spark)}; if they are only slow, raise start_timeout"
    )


def _wait_for_slots(
    spark: SparkSession,
    wanted: int,
    request: TaskRequest,
    *,
    expected: int | None,
    start_timeout: float,
    console: Console,
) -> int:
    """Wait until executors have registered; Spark tells Python of them only when asked."""
    began = changed = noted = time.monotonic()
    slots, told = 0, None
    while time.monotonic() - began < start_timeout:
        now, before, slots = time.monotonic(), slots, total_slots(spark, request) or 0
        if slots >= wanted:
            break
        if slots != before:
            changed = now
        if expected is None and now - changed >= QUIET_SECONDS:
            break
        if now - noted >= NOTE_SECONDS:
            noted, ended = now, describe_ended(spark, wanted)
            if (slots, ended) != told:
                told = slots, ended
                console.note(
                    f"waiting for {wanted} slots, {slots} have registered so far"
                    + (f"; {ended}; {describe_log_location(spark)}" if ended else "")
                )
        console.show(0)
        time.sleep(CHECK_SECONDS)
    return slots


def _expected_slots(spark: SparkSession, request: TaskRequest) -> int | None:
    """Return how many slots the master string or the settings promise, where they do."""
    master = _master(spark)
    gpus = float(spark.conf.get("spark.executor.resource.gpu.amount", None) or 0)
    if match := re.fullmatch(r"local-cluster\[\s*(\d+)\s*,\s*(\d+)\s*,.*\]", master):
        workers, cores = int(match[1]), int(match[2])
        own_cores = int(spark.conf.get("spark.executor.cores", None) or cores)
        return workers * (cores // own_cores) * request.slots(own_cores, gpus)
    if match := re.fullmatch(r"local(?:\[\s*(\d+)\s*(?:,.*)?\])?", master):
        return request.slots(int(match[1] or 1), 0)
    if master.startswith("local"):  # local[*]: the cores of the driver's machine
        return total_slots(spark, request)
    instances = spark.conf.get("spark.executor.instances", None)
    cores_of_executor = spark.conf.get("spark.executor.cores", None)
    if instances is None or cores_of_executor is None:
        return None
    return int(instances) * request.slots(int(cores_of_executor), gpus)


def _master(spark: SparkSession) -> str:
    return spark.conf.get("spark.master", None) or ""


def _facts(spark: SparkSession, request: TaskRequest) -> str:
    confs = [
        f"{name}={value}"
        for name in _DECIDING_CONFS
        if (value := spark.conf.get(name, None)) is not None
    ]
    facts = [_master(spark), ", ".join(confs), _describe_executors(spark, request)]
    runs = f" and runs {request.ranks} ranks" if request.ranks > 1 else ""
    facts.append(f"a task takes {request.description}{runs}")
    return "; ".join(fact for fact in facts if fact)


def _describe_executors(spark: SparkSession, request: TaskRequest) -> str:
    """Describe the registered executors: "2 executors with 4 cores and 1 GPU: 1 slot each"."""
    if is_connect(spark):
        return ""
    kinds: Counter[tuple[int, int]] = Counter()
    executors = spark.sparkContext._jsc.sc().statusStore().executorList(True)
    for index in range(executors.size()):
        executor = executors.apply(index)
        if executor.totalCores():  # the driver of a cluster is listed, too
            gpu = executor.resources().get("gpu")
            gpus = len(gpu.get().addresses()) if gpu.isDefined() else 0
            kinds[executor.totalCores(), gpus] += 1
    words = []
    for (cores, gpus), count in kinds.items():
        has = _counted(cores, "core") + (f" and {_counted(gpus, 'GPU')}" if gpus else "")
        slots = _counted(request.slots(cores, gpus), "slot")
        words.append(f"{_counted(count, 'executor')} with {has}: {slots}" + " each" * (count > 1))
    return ", ".join(words)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _too_few_slots(
    spark: SparkSession, np: int, slots: int, request: TaskRequest
) -> ClusterCapacityError:
    asked = f"np={np}" if np else "np=0 (all slots)"
    needed = _counted(request.tasks(np), "task slot") if np else "at least 1 task slot"
    if request.ranks > 1:
        needed += f" of {request.ranks} ranks each" if np > request.ranks else ""
    return ClusterCapacityError(
        f"{asked} needs {needed}, and the "
        f"cluster has {slots} ({_facts(spark, request)}): ask for fewer ranks, add executors or "
        "cores, or use a negative np to run on the driver"
    )
