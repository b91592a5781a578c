"""The small cluster that the cases share: one session of two executors with a core each."""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["session"]


def session(executors: int = 2, cores: int = 1, memory: int = 1024, **confs: str) -> Any:
    """Start a cluster on this machine.

    Parameters
    ----------
    executors, cores
        How many, and how many slots each has.
    memory
        MiB of each executor's JVM.
    **confs
        Spark settings, with ``__`` for each point of their names.

    Returns
    -------
    pyspark.sql.SparkSession
        The session, which the caller stops.
    """
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.master(f"local-cluster[{executors},{cores},{memory}]")
    settings = {
        "spark.ui.enabled": "false",
        "spark.log.level": "ERROR",
        "spark.ui.showConsoleProgress": "false",
        **{name.replace("__", "."): value for name, value in confs.items()},
    }
    for name, value in settings.items():
        builder = builder.config(name, value)
    return builder.getOrCreate()
