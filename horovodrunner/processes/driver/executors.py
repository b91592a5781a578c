"""Executors that ended, why, and where their logs are. Runs in: the driver."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["describe_ended", "describe_log_location"]

_MOST_CHARS = 300


def describe_ended(spark: SparkSession, waited_for: int) -> str:
    """Describe how many executors have ended, and why the last one did; "" if none has.

    `waited_for` executors may be starting right now.
    """
    there, ended, reason = _known_to_spark(spark)
    # Spark tells nothing of those that end before they register, but their logs may be here.
    started = _logs_here(str(spark.sparkContext.applicationId))
    if len(started) - there - waited_for > ended:
        ended = len(started) - there - waited_for
        reason = next(filter(None, map(_last_words, reversed(started))), reason)
    if not ended:
        return ""
    count = "1 executor has" if ended == 1 else f"{ended} executors have"
    return f"{count} ended" + (f", the last one with: {reason}" if reason else "")


def describe_log_location(spark: SparkSession) -> str:
    """Return half a sentence: where the logs of executors are that cannot be started."""
    application = spark.sparkContext.applicationId
    master = str(spark.conf.get("spark.master", ""))
    if master.startswith(("spark:", "local-cluster")):
        where = f"work/{application} below SPARK_HOME on the workers, or below SPARK_WORKER_DIR"
    elif master.startswith("k8s:"):
        where = f"kubectl logs -l spark-app-selector={application}"
    elif master == "yarn":
        where = f"yarn logs -applicationId {application}"
    else:
        return "see the cluster manager"
    return f"their logs tell why: {where}"


def _known_to_spark(spark: SparkSession) -> tuple[int, int, str]:
    """Return how many executors are there, how many have ended, and why the last one did."""
    found: Any = spark.sparkContext._jsc.sc().statusStore().executorList(False)
    executors = [found.apply(index) for index in range(found.size())]
    gone = [each for each in executors if not each.isActive()]
    there = sum(1 for each in executors if each.isActive() and each.totalCores())
    reasons = [
        (each.removeTime().get().getTime(), str(each.removeReason().get()))
        for each in gone
        if each.removeTime().isDefined() and each.removeReason().isDefined()
    ]
    return there, len(gone), " ".join(max(reasons)[1].split())[:_MOST_CHARS] if reasons else ""


def _logs_here(application: str) -> list[Path]:
    """List the executors' standard errors, where a standalone cluster's worker is here."""
    from pyspark.find_spark_home import _find_spark_home

    work = os.environ.get("SPARK_WORKER_DIR") or Path(_find_spark_home(), "work")
    found = Path(work, application).glob("[0-9]*/stderr")
    return sorted(found, key=lambda each: int(each.parent.name))


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    said = [line for line in lines[1:] if line.strip("= ")]  # the first is the command
    return said[-1][:_MOST_CHARS] if said else ""
