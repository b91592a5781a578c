"""Data sets without shared storage: how their rows get to the ranks. Runs in: the driver."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovodrunner.errors import ConfigurationError
from horovodrunner.flows.logs.driver import Console
from horovodrunner.processes.task.scratch import Scratch
from horovodrunner.spark.arrow import close_sockets
from horovodrunner.spark.column_names import map_by_name

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from horovodrunner.data.unshared import UnsharedDataSet

__all__ = ["StoredRows", "stage_input", "stored_here"]

BATCH_CONF = "spark.sql.execution.arrow.maxRecordsPerBatch"
BATCH_BYTES = 32 * 2**20
"""About so much Spark hands to a task's Python at once."""

CANDIDATES = 64
"""So many numbers for each target are tried; that a task gets too few is beyond all chance."""


def stage_input(
    spark: SparkSession, workers: Sequence[int], data: Sequence[UnsharedDataSet]
) -> DataFrame:
    """Return what the barrier stage's tasks read: partition p has exactly the rows of task p.

    `workers` says how many each task has; every one of them is a target of its own.
    """
    tasks = len(workers)
    if not data:
        return spark.range(0, tasks, 1, tasks)
    from horovodrunner.data.distribution import (
        CONTROL,
        PIECE_SCHEMA,
        Distribution,
        distribute_rows,
    )

    places, piece_bytes = _places(spark, workers), _piece_bytes(spark)
    # Every worker gets a row that says for whom it is: no place is empty, and none is mistaken.
    rows = spark.createDataFrame(
        [
            (place, CONTROL, target, 0, 0, bytearray(json.dumps({"target": target}).encode()))
            for target, place in enumerate(places)
        ],
        PIECE_SCHEMA,
    )
    for number, each in enumerate(data):
        job = Distribution(number, each.columns, places, piece_bytes, each.nulls)
        source: Any = each.source
        distributed = map_by_name(source, functools.partial(distribute_rows, job), PIECE_SCHEMA)
        rows = rows.union(distributed)
    order = ("dataset", "place", "part", "number")
    return rows.repartition(tasks, "place").sortWithinPartitions(*order)


def _places(spark: SparkSession, workers: Sequence[int]) -> tuple[int, ...]:
    """Find numbers that Spark's hash partitioning brings to each partition: one for each worker."""
    close_sockets()
    tasks, targets = len(workers), sum(workers)
    rows = (
        spark.range(0, CANDIDATES * targets, 1, 1)
        .selectExpr("cast(id AS int) AS place", f"pmod(hash(cast(id AS int)), {tasks}) AS task")
        .collect()
    )
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(row["task"], []).append(row["place"])
    return tuple(found[task].pop() for task, count in enumerate(workers) for _ in range(count))


def _piece_bytes(spark: SparkSession) -> int:
    """Choose pieces so small that as many as Spark hands to Python at once fit into memory."""
    most = int(spark.conf.get(BATCH_CONF, None) or 10_000)
    if most <= 0:
        raise ConfigurationError(
            f"{BATCH_CONF}={most} makes Spark hand all rows of a task to Python at once, which no "
            "memory is large enough for: with data.from_dataframe(..., shared=False) it has to be "
            "a positive number (10000 is Spark's default)"
        )
    return max(1024, BATCH_BYTES // most)


@contextlib.contextmanager
def stored_here(
    data: Sequence[UnsharedDataSet], run_id: str, console: Console
) -> Iterator[StoredRows | None]:
    """Store data sets in a temporary directory of this machine, for a run with np < 0."""
    if not data:
        yield None
        return
    from horovodrunner.data.create import store_here

    scratch = Scratch(f"{run_id}-data", None)
    try:
        console.note("computing the data sets that travel with the run", routine=True)
        for each in data:
            store_here(each, scratch.path)
        yield StoredRows(scratch.path)
    finally:
        scratch.delete()


class StoredRows:
    """Data sets that are on this machine already."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def take(self, scratch: Path) -> tuple[str, ...]:
        return ()

    def finish(self, told: Sequence[str]) -> list[Path]:
        return [self._directory]
