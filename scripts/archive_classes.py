"""Archive the classes that Spark's JVMs load. Runs in: the command line.

``.venv/bin/python scripts/archive_classes.py`` writes ``build/spark.jsa``, unless that is newer
than .venv. A JVM that is given it (tests/conftest.py does so) finds there what it would have to
read from the jars and verify. One that it does not fit, because Java or the jars are others, leaves
it alone.
"""
# ruff: noqa: T201

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pyspark import SparkContext
from pyspark.sql import SparkSession, functions

from horovodrunner import HorovodRunner

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = ROOT / "build" / "spark.jsa"
SET_UP = ROOT / ".venv" / "set-up-for"
JVM_SECONDS = 300


def main() -> None:
    """Use Spark in a JVM that keeps its classes when it ends: the driver's, master and worker."""
    if ARCHIVE.exists() and ARCHIVE.stat().st_mtime > SET_UP.stat().st_mtime:
        return
    print("Archiving the classes of Spark's JVMs for the tests: up to a minute.", flush=True)
    ARCHIVE.parent.mkdir(exist_ok=True)
    unfinished = ARCHIVE.with_suffix(".unfinished")
    options = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xlog:disable"
    os.environ["PYSPARK_PYTHON"] = sys.executable
    spark = (
        SparkSession.builder.master("local-cluster[1,1,1024]")
        .config("spark.driver.extraJavaOptions", f"{options} -XX:ArchiveClassesAtExit={unfinished}")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )
    with contextlib.redirect_stdout(io.StringIO()):
        HorovodRunner(np=1).run(lambda: None)
    use_dataframes(spark)
    spark.stop()
    gateway = SparkContext._gateway
    gateway.shutdown()
    jvm: subprocess.Popen[bytes] = gateway.proc
    if jvm.stdin is not None:
        jvm.stdin.close()  # it ends then
    jvm.wait(JVM_SECONDS)
    if unfinished.exists():
        unfinished.replace(ARCHIVE)
    else:
        print("Java wrote no archive of classes: the tests take longer without", file=sys.stderr)


def use_dataframes(spark: SparkSession) -> None:
    """Load the classes that the tests' DataFrames need."""
    spark.sparkContext.parallelize([1], 1).count()
    rows = spark.range(8).withColumn("x", functions.array(functions.col("id").cast("double")))
    with tempfile.TemporaryDirectory() as folder:
        rows.write.parquet(f"{folder}/rows")
        read = spark.read.parquet(f"{folder}/rows").repartition(2)
        read.mapInArrow(lambda batches: batches, read.schema).toPandas()
    spark.createDataFrame([(1, "a")], "id long, name string").groupBy("name").count().collect()


if __name__ == "__main__":
    main()
