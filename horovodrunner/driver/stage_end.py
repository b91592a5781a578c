"""What Spark's error says about the end of a run's stage. Runs in: the driver."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from horovodrunner.core.words import ranks_in_words

__all__ = ["StageEnd", "data_problem", "stage_end"]

_EXECUTORS_PYTHON = "PYSPARK_PYTHON (for spark-submit also spark.pyspark.python)"


@dataclass(frozen=True)
class StageEnd:
    """Why a stage ended.

    Parameters
    ----------
    text
        A sentence or two.
    task_was_lost
        Whether a task or its executor was lost, rather than the job cancelled.
    was_cancelled
        Whether the job was cancelled.
    """

    text: str
    task_was_lost: bool = False
    was_cancelled: bool = False


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
    if problem := _problem_of_executors_python(text):
        return StageEnd(problem)
    if cancelled := re.search(r"Job \d+ cancelled.*|\[OPERATION_CANCELED\].*", text):
        text = f"the run's Spark job was cancelled: {cancelled[0].strip()}"
        return StageEnd(text, was_cancelled=True)
    text = re.sub(r"\S*PythonException: Traceback .*\n(?: .*\n)*", "", text)
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


def data_problem(error: Exception | None) -> str:
    """Pull out why the rows that the stage was to read could not be computed.

    Parameters
    ----------
    error
        What collecting the stage's rows raised, before any of its tasks was heard of.

    Returns
    -------
    str
        The cause; empty where it lies elsewhere, see :func:`stage_end`.
    """
    text = str(error) if error is not None else ""
    lies_elsewhere = r"Job \d+ cancelled|\[OPERATION_CANCELED\]|Most recent failure reason: "
    if _problem_of_executors_python(text) or re.search(lies_elsewhere, text):
        return ""
    if raised := re.search(r"^(?!org\.apache)[\w.]*(?:Error|Exception): .+", text, re.MULTILINE):
        return raised[0]
    return text.partition("\n")[0]


def _problem_of_executors_python(text: str) -> str | None:
    """Say why the Python of the executors cannot run tasks; the same would happen again."""
    # PySpark 3.5 writes "version (3, 11) than that in driver 3.10", later ones "version: 3.11 ...".
    if versions := re.search(
        r"Python in worker has different version:? \(?(\d+)[., ]+(\d+)\)? than that in driver:? "
        r"(\d+\.\d+)",
        text,
    ):
        there, here = f"{versions[1]}.{versions[2]}", versions[3]
        return (
            f"the executors run Python {there} and the driver runs Python {here}, and PySpark "
            f"needs the same minor version on both: let {_EXECUTORS_PYTHON} name a Python {here} "
            f"of the executors, or start the driver with Python {there}"
        )
    no_such_file_or_not_allowed = r'Cannot run program ".*": error=(?:2|13), .*'
    if command := re.search(no_such_file_or_not_allowed, text):
        return (
            f"an executor cannot start its Python: {command[0]}. {_EXECUTORS_PYTHON} must name "
            "one that exists there; a path such as ./environment/bin/python needs an archive that "
            "is unpacked under this name: spark.archives=environment.tar.gz#environment"
        )
    if lacking := re.search(
        r"^(?:Attribute|Import|ModuleNotFound)Error: .*'horovodrunner\..*$", text, re.MULTILINE
    ):
        return (
            "the executors have another release of horovodrunner than the driver: an executor's "
            f"Python said {lacking[0]}; install the same one on both"
        )
    if missing := re.findall(r"^\s*ModuleNotFoundError: (.*)$", text, re.MULTILINE):
        return (
            f"an executor's Python said ModuleNotFoundError: {missing[-1]}: it lacks the package, "
            "or is not the Python you mean; install the package there, or let "
            f"{_EXECUTORS_PYTHON} name a Python that has it"
        )
    if said := re.search(r"Error from python worker:\n((?: +.*\n)+)PYTHONPATH was:", text):
        last_line = said[1].strip().splitlines()[-1].strip()
        return (
            f"an executor's Python ended before it could take a task: {last_line}. It may be too "
            f"old for this PySpark; {_EXECUTORS_PYTHON} chooses another one"
        )
    return None


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
