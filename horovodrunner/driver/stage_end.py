"""What Spark's error says about the end of a run's stage. Runs in: the driver."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from horovodrunner.core.words import ranks_in_words

__all__ = ["StageEnd", "stage_end"]


@dataclass(frozen=True)
class StageEnd:
    """Why a stage ended.

    Parameters
    ----------
    text
        A sentence or two.
    task_was_lost
        Whether a task or its executor was lost, rather than the job cancelled.
    """

    text: str
    task_was_lost: bool = False


def stage_end(error: Exception | None, placement: Sequence[tuple[int, int, str]]) -> StageEnd:
    """Pull the cause out of Spark's error, which is a screen of Java frames.

    Parameters
    ----------
    error
        What collecting the stage's rows raised, if it did.
    placement
        Partition, rank and host of every rank, as far as ranks were placed.

    Returns
    -------
    StageEnd
        The cause.
    """
    text = str(error) if error is not None else ""
    if missing := re.findall(r"^ModuleNotFoundError: .*$", text, re.MULTILINE):
        return StageEnd(
            f"an executor's Python said {missing[-1]}: it lacks the package, or is not the Python "
            "you mean; install the package there, or set spark.pyspark.python (PYSPARK_PYTHON) to "
            "a Python that has it"
        )
    if cancelled := re.search(r"Job \d+ cancelled.*", text):
        return StageEnd(f"the run's Spark job was cancelled: {cancelled[0].strip()}")
    if lost := re.search(r"Most recent failure reason: (.*)(?:\n(.*))?", text):
        reasons = " ".join(part.strip() for part in lost.groups() if part)
        return StageEnd(
            f"Spark lost {_what(reasons, placement)}, and so the whole stage: {reasons} The "
            "executor's log tells more; a frequent cause is memory "
            "(spark.executor.memoryOverhead)",
            task_was_lost=True,
        )
    if text:
        return StageEnd(f"Spark ended the run's stage: {text.splitlines()[0]}")
    return StageEnd("the run's tasks ended without an outcome; the executors' logs tell more")


def _what(reasons: str, placement: Sequence[tuple[int, int, str]]) -> str:
    """Name the executor and the ranks on it, as far as Spark's reasons tell."""
    partitions = {int(number) for number in re.findall(r"ResultTask\(\d+, (\d+)\)", reasons)}
    ranks = [rank for partition, rank, _ in placement if partition in partitions]
    hosts = sorted({host for partition, _, host in placement if partition in partitions})
    executor = re.search(r"[Ee]xecutor (\d+|driver)\b", reasons)
    what = f"executor {executor[1]}" if executor else "a task of the run"
    if not ranks:
        return what
    return f"{what}, which ran {ranks_in_words(ranks)} on {', '.join(hosts)}"
