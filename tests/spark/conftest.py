"""One real two-executor cluster for this rung."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """A session on two executor JVMs with one core each."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    from pyspark.sql import SparkSession

    session = (
        SparkSession.builder.master("local-cluster[2,1,1024]")
        .appName("horovodrunner tests")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )
    yield session
    logs = _work_directory(session)
    session.stop()
    shutil.rmtree(logs, ignore_errors=True)


@pytest.fixture
def executor_logs(spark: Any) -> Path:
    """The directory in which the executors of local-cluster write their logs."""
    return _work_directory(spark)


def _work_directory(session: Any) -> Path:
    import pyspark

    return Path(pyspark.__file__).parent / "work" / str(session.sparkContext.applicationId)
