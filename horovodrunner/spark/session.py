"""The SparkSession and its settings, as far as a run depends on them. Runs in: the driver."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from horovodrunner.errors import BarrierStageError, ConfigurationError, HorovodRunnerError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = [
    "chosen_threads",
    "end_is_told",
    "find_session",
    "has_session",
    "is_connect",
    "max_result_bytes",
    "refuse_encrypted_cluster",
    "shares_terminal",
    "use_this_python",
    "was_stopped",
]

ENCRYPTION_CONFS = (
    "spark.ssl.enabled",
    "spark.network.crypto.enabled",
    "spark.io.encryption.enabled",
)
ALLOW_UNENCRYPTED_CONF = "spark.horovodrunner.allowUnencrypted"


def find_session() -> SparkSession:
    """Return the active SparkSession, or create one."""
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        from horovodrunner.prerequisites import INSTALL_SPARK

        raise ConfigurationError(
            f"np > 0 needs pyspark, which {sys.executable} cannot import ({error}): install it "
            f"with `{INSTALL_SPARK}`, or use a negative np"
        ) from error
    from pyspark.errors import PySparkException

    with contextlib.suppress(PySparkException):  # there is none
        return SparkSession.active()  # or the default one, as in a thread of the user's
    session = SparkSession.builder.appName("horovodrunner").getOrCreate()
    use_this_python(session)
    return session


def use_this_python(session: SparkSession) -> None:
    """Let executors on this machine have this Python and its packages.

    PySpark would take the first python3 on the PATH.
    """
    if not is_connect(session) and "PYSPARK_PYTHON" not in os.environ:
        context = session.sparkContext
        if context.master.startswith("local"):
            context.pythonExec = sys.executable


def has_session() -> bool:
    """Return whether there is a session, so that :func:`find_session` need not create one."""
    if "pyspark" not in sys.modules:
        return False
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    try:
        SparkSession.active()
    except PySparkException:
        return False
    return True


def refuse_encrypted_cluster(spark: SparkSession) -> None:
    """Refuse a run on a cluster that asks for encryption, unless the user allowed it by name.

    Horovod's rendezvous and Gloo send gradients in the clear, and so do our own connections send
    logs and checkpoints; they only prove to each other who they are.
    """
    asked = [name for name in ENCRYPTION_CONFS if spark.conf.get(name, "false") == "true"]
    if not asked or spark.conf.get(ALLOW_UNENCRYPTED_CONF, "false") == "true":
        return
    raise ConfigurationError(
        f"this cluster asks for encryption ({', '.join(f'{name}=true' for name in asked)}), and "
        "Horovod sends gradients between the ranks in the clear. If the network between the "
        f"executors is safe, allow it: spark.conf.set({ALLOW_UNENCRYPTED_CONF!r}, 'true')"
    )


def chosen_threads(spark: SparkSession) -> dict[str, str]:
    """Return OMP_NUM_THREADS if the user chose it for the executors' Python processes."""
    chosen = spark.conf.get("spark.executorEnv.OMP_NUM_THREADS", None)
    return {"OMP_NUM_THREADS": chosen} if chosen else {}


def is_connect(spark: SparkSession) -> bool:
    """Return whether a session is Spark Connect's, which has no SparkContext."""
    return type(spark).__module__.startswith("pyspark.sql.connect")


@contextlib.contextmanager
def end_is_told(spark: SparkSession) -> Iterator[None]:
    """Say so where the session ends meanwhile: what Spark raises then tells nobody anything."""
    try:
        yield
    except HorovodRunnerError:
        raise
    except Exception as error:
        if not was_stopped(spark, is_so_without_jvm=True):
            raise
        raise BarrierStageError(
            "the Spark session was stopped while the run waited for its slots: start the run again "
            "in a new session",
            was_cancelled=True,
        ) from error


def was_stopped(spark: SparkSession, *, is_so_without_jvm: bool = False) -> bool:
    """Return whether a session has ended; `is_so_without_jvm` also counts a JVM that is gone."""
    if is_connect(spark):
        return bool(spark.is_stopped)
    context = spark.sparkContext._jsc
    try:
        return context is None or bool(context.sc().isStopped())
    except Exception:  # noqa: BLE001 - py4j raises several
        return is_so_without_jvm


def shares_terminal(spark: SparkSession) -> bool:
    """Return whether the executor is this process's own JVM, which writes to our standard error."""
    master = spark.conf.get("spark.master", None) or ""
    is_ours = not is_connect(spark) or "SPARK_LOCAL_REMOTE" in os.environ
    return is_ours and master.split("[")[0] == "local"


def max_result_bytes(spark: SparkSession) -> int | None:
    """Return ``spark.driver.maxResultSize`` less room for the rows around it; None for no limit."""
    text = spark.conf.get("spark.driver.maxResultSize", None) or "1g"
    match = re.fullmatch(r"\s*(\d+)\s*([kmgt]?)i?b?\s*", text.lower())
    if match is None:
        return None  # Spark does not take it either
    limit = int(match[1]) * 1024 ** " kmgt".index(match[2] or " ")
    return max(int(limit * 0.98) - 1024 * 1024, limit // 2) if limit > 0 else None
