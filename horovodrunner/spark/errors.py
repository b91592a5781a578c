"""What is behind an error of Spark's, which is a screen of Java frames. Runs in: the driver."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator

from horovodrunner.formatting import cut, in_one_line

__all__ = ["CANCELLED", "describe_cause", "problem_of_executors_python", "told_as"]

CANCELLED = r"Job \d+ cancelled.*|\[OPERATION_CANCELED\].*"
"""What Spark says of a job that somebody has cancelled."""

_EXECUTORS_PYTHON = "PYSPARK_PYTHON (for spark-submit also spark.pyspark.python)"
_MAX_CAUSE = 600
_MEMORY = re.compile(
    r"\bexit(?:ed with)?(?: code)? 137\b|exited unexpectedly|OutOfMemory|MemoryError|SIGKILL"
    r"|can't start new thread|allocate memory|not enough memory|bad_alloc"
)
_AFTER_PYTHON = re.compile(r"\s+at |Driver stacktrace|Caused by|JVM stacktrace")
_MEMORY_SETTINGS = (
    "; a frequent cause is memory: give the executors more (spark.executor.memory for the JVM, "
    "spark.executor.memoryOverhead and spark.executor.pyspark.memory for Python), or use more "
    "partitions"
)


@contextlib.contextmanager
def told_as(kind: type[Exception], sentence: str, remedy: str = "") -> Iterator[None]:
    """Raise Spark's errors as one of ours, with the cause in the first line.

    `remedy` is left out where somebody has cancelled the job.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_spark(error):
            raise
        cause = describe_cause(error).rstrip(".")
        if re.search(CANCELLED, str(error)):
            remedy = ""
        raise kind(f"{sentence}: {cause}{remedy and f'. {remedy}'}") from error


def _is_of_spark(error: Exception) -> bool:
    package = type(error).__module__.partition(".")[0]
    return package in {"pyspark", "py4j", "grpc"} or isinstance(error, ConnectionError)


def describe_cause(error: Exception) -> str:
    """Extract the cause, in one line, from an error of PySpark, Py4J or Spark Connect."""
    text = str(error)
    if isinstance(error, ConnectionError) or "Py4JNetworkError" in type(error).__name__:
        return f"contact with Spark was lost ({in_one_line(error)})"
    if problem := problem_of_executors_python(text):
        return problem
    if cancelled := re.search(CANCELLED, text):
        return f"the Spark job was cancelled: {cancelled[0].strip()}"
    found = _raised_in_python(text) or _said_by_java(text)
    found = re.sub(r"\S*\$Lambda\S*", "(a function)", " ".join(found.split()))
    hint = _MEMORY_SETTINGS if _MEMORY.search(found) else ""
    return (cut(found, _MAX_CAUSE) or type(error).__name__) + hint


def _raised_in_python(text: str) -> str:
    """Return the last line of the last traceback: what the user's function has raised."""
    _, is_there, after = text.rpartition("Traceback (most recent call last):\n")
    lines = itertools.dropwhile(lambda line: not line or line[0].isspace(), after.splitlines())
    said = itertools.takewhile(lambda line: line and not _AFTER_PYTHON.match(line), lines)
    return " ".join(said) if is_there else ""


def _said_by_java(text: str) -> str:
    text = re.sub(r"^An error occurred while calling \S+\s*: ", "", text)
    head = text.strip().partition("\n")[0]
    if lost := re.search(r"failure: Lost task \S+ in stage \S+ \(TID \d+\) \((.*?)\): (.*)", text):
        head = f"{_without_class(lost[2])} ({lost[1]})"
    head = _without_class(head)
    roots = [_without_class(root) for root in re.findall(r"^Caused by: (.*)$", text, re.MULTILINE)]
    if roots and head.startswith("Exception thrown in awaitResult"):
        head = next((root for root in roots if root.startswith("[")), roots[-1])
    return f"{head} ({roots[-1]})" if roots and roots[-1] not in head else head


def _without_class(said: str) -> str:
    """Leave Java's packages out, and the names of classes that say nothing."""
    said = re.sub(r"^\(?[a-z]\w*(?:\.[\w$]+)*\.(\w+)\)?:? ", r"\1: ", said.strip())
    return re.sub(r"^(?:Spark|Spark\w+|Analysis|Runtime)Exception: ", "", said)


def problem_of_executors_python(text: str) -> str | None:
    """Explain why the Python of the executors cannot run tasks; None if it lies elsewhere.

    The same would happen again.
    """
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
