"""The PySpark that is meant is the one that runs everywhere: see scripts/other_spark.py."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

import pytest

from horovodrunner import HorovodRunner

pytestmark = pytest.mark.spark

MEANT = os.environ.get("TESTED_PYSPARK") or importlib.metadata.version("pyspark")


# PySpark 4.2 and 4.3 would warn of pandas 3, which a run does not use.
@pytest.mark.filterwarnings("error:PySpark does not yet fully support pandas")
def test_the_driver_the_executors_and_the_ranks_run_the_pyspark_that_is_meant(spark: Any) -> None:
    import pyspark

    def version() -> str:
        import pyspark

        return str(pyspark.__version__)

    java = spark.sparkContext._jsc.sc()
    [task] = spark.sparkContext.parallelize([0], 1).map(lambda _: version()).collect()
    assert [pyspark.__version__, java.version(), task] == [MEANT] * 3
    assert HorovodRunner(np=1).run(version) == MEANT
