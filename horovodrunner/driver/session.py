"""What is asked of the SparkSession before a run: slots and limits. Runs in: the driver."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from typing import TYPE_CHECKING

from horovodrunner.errors import ClusterCapacityError, ConfigurationError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = [
    "find_session",
    "is_connect",
    "max_result_bytes",
    "require_slots",
    "shares_terminal",
    "total_slots",
]

SLOTS_SECONDS = 30.0
"""How long executors may take to register, where Spark does not say how many will come."""

SLOTS_CHECK_SECONDS = 0.1


def find_session() -> SparkSession:
    """Give the active SparkSession, or create one.

    Returns
    -------
    SparkSession
        The session to run on.

    Raises
    ------
    ConfigurationError
        If pyspark is not installed.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise ConfigurationError(
            f"np > 0 needs pyspark, which {sys.executable} cannot import ({error}): install it "
            "with `pip install 'pyspark>=3.5' pyarrow pandas`, or use a negative np"
        ) from error
    from pyspark.errors import PySparkException

    with contextlib.suppress(PySparkException):  # there is none
        return SparkSession.active()  # or the default one, as in a thread of the user's
    session = SparkSession.builder.appName("horovodrunner").getOrCreate()
    if not is_connect(session) and "PYSPARK_PYTHON" not in os.environ:
        context = session.sparkContext
        if context.master.startswith("local"):
            # Executors on this machine should have this Python and its packages; PySpark would
            # take the first python3 on the PATH.
            context.pythonExec = sys.executable
    return session


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


def require_slots(spark: SparkSession, np: int, patience: float = SLOTS_SECONDS) -> int:
    """Check np against the cluster's slots before anything is launched.

    Parameters
    ----------
    spark
        The session.
    np
        Number of ranks asked for; 0 for all slots.
    patience
        Seconds that executors may take to register.

    Returns
    -------
    int
        Number of ranks to start.

    Raises
    ------
    ConfigurationError
        If dynamic allocation is on, which barrier stages do not support (SPARK-24942).
    ClusterCapacityError
        If there are fewer slots than np, or none for np=0.
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
    deadline = time.monotonic() + (0.0 if expected is not None and wanted > expected else patience)
    while slots < wanted and time.monotonic() < deadline:
        time.sleep(SLOTS_CHECK_SECONDS)  # Spark tells Python of new executors only when asked
        slots = total_slots(spark) or 0
    if slots < wanted:
        may_come = expected if expected is not None and wanted > expected else slots
        raise _too_few_slots(spark, np, may_come)
    return np or slots


def _expected_slots(spark: SparkSession) -> int | None:
    """Count the slots the master string promises, where it does."""
    master = spark.sparkContext.master
    cpus = int(spark.conf.get("spark.task.cpus", "1") or 1)
    if match := re.fullmatch(r"local-cluster\[\s*(\d+)\s*,\s*(\d+)\s*,.*\]", master):
        if spark.conf.get("spark.task.resource.gpu.amount", None) is not None:
            return None
        return int(match[1]) * (int(match[2]) // cpus)
    if master.startswith("local"):
        return total_slots(spark)
    return None


def _too_few_slots(spark: SparkSession, np: int, slots: int) -> ClusterCapacityError:
    facts = ", ".join(
        f"{name}={value}"
        for name in (
            "spark.executor.instances",
            "spark.executor.cores",
            "spark.task.cpus",
            "spark.task.resource.gpu.amount",
            "spark.cores.max",
        )
        if (value := spark.conf.get(name, None)) is not None
    )
    asked = f"np={np}" if np else "np=0 (all slots)"
    return ClusterCapacityError(
        f"{asked} needs {np or 'at least 1'} task slot{'s' if np > 1 else ''}, and the cluster "
        f"({spark.sparkContext.master}{'; ' + facts if facts else ''}) has {slots}: ask for fewer "
        "ranks, add executors or cores, or use a negative np to run on the driver"
    )


def is_connect(spark: SparkSession) -> bool:
    """Tell whether a session is Spark Connect's, which has no SparkContext.

    Parameters
    ----------
    spark
        The session.

    Returns
    -------
    bool
        True over Spark Connect.
    """
    return type(spark).__module__.startswith("pyspark.sql.connect")


def shares_terminal(spark: SparkSession) -> bool:
    """Tell whether the executor is this process's own JVM, which writes to our standard error.

    Parameters
    ----------
    spark
        The session.

    Returns
    -------
    bool
        True for the masters ``local``, ``local[n]`` and the like.
    """
    if is_connect(spark):
        return False
    return bool(spark.sparkContext.master.split("[")[0] == "local")


def max_result_bytes(spark: SparkSession) -> int | None:
    """Read how much Spark takes back to the driver.

    Parameters
    ----------
    spark
        The session.

    Returns
    -------
    int or None
        ``spark.driver.maxResultSize`` in bytes, less room for the rows around it; None for no
        limit, or where it cannot be asked for.
    """
    if is_connect(spark):
        return None
    limit = int(
        spark.sparkContext._jsc.sc().conf().getSizeAsBytes("spark.driver.maxResultSize", "1g")
    )
    return int(limit * 0.98) - 1024 * 1024 if limit > 0 else None
