"""What Spark's error says about the end of a run's stage. Runs in: the driver."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from horovodrunner.formatting import ranks_in_words
from horovodrunner.spark.errors import (
    CANCELLED,
    describe_cause,
    problem_of_executors_python,
)

__all__ = ["StageEnd", "data_problem", "stage_end"]


@dataclass(frozen=True)
class StageEnd:
    """Why a stage ended; it may be that a task or its executor was lost."""

    text: str
    task_was_lost: bool = False
    was_cancelled: bool = False


def stage_end(error: Exception | None, placement: Sequence[tuple[int, int, str]]) -> StageEnd:
    """Extract the cause from Spark's error, which is a screen of Java frames.

    `placement` has partition, rank and host of every rank that was placed.
    """
    text = str(error) if error is not None else ""
    if problem := problem_of_executors_python(text):
        return StageEnd(problem)
    if cancelled := re.search(CANCELLED, text):
        text = f"the run's Spark job was cancelled: {cancelled[0].strip()}"
        return StageEnd(text, was_cancelled=True)
    text = re.sub(r"\S*PythonException: Traceback .*\n(?: .*\n)*", "", text)
    if lost := re.search(r"Most recent failure reason: (.*)(?:\n(.*))?", text):
        reasons = " ".join(part.strip() for part in lost.groups() if part)
        return StageEnd(
            f"Spark lost {_what(reasons, placement)}, and so the whole stage: {reasons} The "
            "executor's log tells more; a frequent cause is memory "
            "(spark.executor.memoryOverhead, spark.executor.pyspark.memory)",
            task_was_lost=True,
        )
    if error is not None and text:
        return StageEnd(f"Spark ended the run's stage: {describe_cause(error)}")
    return StageEnd("the run's tasks ended without an outcome; the executors' logs tell more")


def data_problem(error: Exception | None) -> str:
    """Return why the rows that the stage was to read could not be computed.

    Empty where the cause lies elsewhere: :func:`stage_end` finds it.
    """
    text = str(error) if error is not None else ""
    lies_elsewhere = rf"{CANCELLED}|Most recent failure reason: "
    if error is None or problem_of_executors_python(text) or re.search(lies_elsewhere, text):
        return ""
    return describe_cause(error)


def _what(reasons: str, placement: Sequence[tuple[int, int, str]]) -> str:
    """Name the executor and the ranks on it, as far as Spark's reasons do."""
    partitions = {int(number) for number in re.findall(r"ResultTask\(\d+, (\d+)\)", reasons)}
    ranks = [rank for partition, rank, _ in placement if partition in partitions]
    hosts = sorted({host for partition, _, host in placement if partition in partitions})
    executor = re.search(r"[Ee]xecutor (\d+|driver)\b", reasons)
    what = f"executor {executor[1]}" if executor else "a task of the run"
    if not ranks:
        return what
    return f"{what}, which ran {ranks_in_words(ranks)} on {', '.join(hosts)}"
