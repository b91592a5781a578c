"""Executors of a run that Spark decommissions: its ranks save before they go. Runs in: the driver.

Spark announces it nowhere, so its scheduler is asked once a second, where decommissioning is on.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from horovodrunner.formatting import ranks_in_words
from horovodrunner.spark.jobs import SparkJob, start_thread
from horovodrunner.wire.events import SaveWanted

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["decommissions_noticed"]

LOOK_SECONDS = 1.0
END_SECONDS = 5.0

_IS_ON = "spark.decommission.enabled"

_logger = logging.getLogger(__name__)

_Placement = Sequence[tuple[int, int, str]]


@contextlib.contextmanager
def decommissions_noticed(
    spark: SparkSession,
    job: SparkJob,
    placement: Callable[[], _Placement],
    want_save: Callable[[SaveWanted], object],
) -> Iterator[None]:
    """Want a checkpoint whenever an executor of the job is decommissioned.

    `placement` returns partition, rank and host of every rank, as soon as they are placed.
    """
    if not job.tells_executors or spark.conf.get(_IS_ON, "false") != "true":
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        executors: Mapping[int, str] = {}
        gone: set[str] = set()
        while not ended.wait(LOOK_SECONDS):
            if not placement():
                continue
            try:
                executors = executors or job.executors()
                for executor in sorted({*executors.values()} - gone):
                    if job.is_decommissioned(executor):
                        gone.add(executor)
                        want_save(SaveWanted(_describe(executor, executors, placement()), True))
            except Exception as error:  # noqa: BLE001 - the session has ended, in whatever way
                _logger.debug("executors are no longer looked at: %s", error)
                return

    thread = start_thread(spark, "horovodrunner-decommissions", watch)
    try:
        yield
    finally:
        ended.set()
        thread.join(END_SECONDS)


def _describe(executor: str, executors: Mapping[int, str], placement: _Placement) -> str:
    """Describe what is decommissioned.

    >>> _describe("1", {0: "0", 1: "1"}, [(0, 0, "a"), (0, 1, "a"), (1, 2, "b"), (1, 3, "b")])
    'executor 1 on b, with ranks 2 and 3, is being decommissioned'
    """
    there = [(rank, host) for task, rank, host in placement if executors.get(task) == executor]
    ranks = ranks_in_words(rank for rank, _ in there)
    return f"executor {executor} on {there[0][1]}, with {ranks}, is being decommissioned"
