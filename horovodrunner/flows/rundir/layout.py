"""What is where in the directory of a run. Runs in: the driver and the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "ARTIFACTS",
    "FORMAT",
    "HISTORY",
    "OUTPUT",
    "RANKS",
    "REPORT",
    "RUN",
    "RUN_LOG",
    "TIMELINES",
    "USAGE",
    "append",
    "is_unfinished",
    "output_of",
    "read_json",
    "read_lines",
    "replace_file",
    "stacks_of",
    "write_json",
]

FORMAT = 1

RUN = "run.json"
"""What is known of the run, and its outcome."""

HISTORY = "history.jsonl"
"""A line for each point that is kept, and for each step of several ranks."""

USAGE = "usage.jsonl"
"""A line for each rank every ten seconds."""

RANKS = "ranks.json"
"""What is known of each rank now."""

OUTPUT = "output"
RUN_LOG = f"{OUTPUT}/run.log"
TIMELINES = "horovod"
ARTIFACTS = "artifacts"
REPORT = "report.html"

_UNFINISHED = ".new"


def output_of(rank: int) -> str:
    """Return the name of the file with what a rank printed."""
    return f"{OUTPUT}/rank-{rank}.log"


def stacks_of(rank: int) -> str:
    """Return the name of the file that says where a rank's time went."""
    return f"stacks-rank-{rank}.speedscope.json"


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there: nobody sees half of it."""
    beside = path.with_name(f".{path.name}{_UNFINISHED}")
    beside.write_bytes(content)
    beside.replace(path)


def is_unfinished(path: Path) -> bool:
    """Return whether a file is one that :func:`replace_file` writes."""
    return path.name.endswith(_UNFINISHED)


def write_json(path: Path, content: Any) -> None:
    replace_file(path, json.dumps(content, indent=1).encode())


def read_json(path: Path) -> Any:
    """Read a file of JSON; None if it is not there, or torn."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def read_lines(path: Path) -> Iterator[Any]:
    """Read lines of JSON; the last one may be torn, as a killed process leaves it."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        for line in file:
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                continue


def append(path: Path, content: bytes) -> None:
    """Add to a file, without keeping it open: there may be more ranks than descriptors."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)
