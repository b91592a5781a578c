"""Where the time of a launch goes: the phases that every run records.

Phases overlap: the workers' imports go on while the tasks meet. ``worker spawn`` of a warm worker
is a fork. Seconds from the first rank's begin to the last rank's end.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

from benchmarks.cluster import session
from benchmarks.launch import SIZE, barrier_job, least
from benchmarks.report import Case, Figures
from horovodrunner import HorovodRunner

_ORDER = (
    "pickle",
    "stage start",
    "worker spawn",
    "imports",
    "gather",
    "rendezvous",
    "unpickle",
    "init",
    "main",
    "outcome back",
)


def measure(rounds: int) -> Case:
    """Measure the phases of runs on a warm session and on the driver.

    Parameters
    ----------
    rounds
        How many runs of each kind.

    Returns
    -------
    Case
        The table.
    """
    spark = session()
    barrier_job(spark)
    ways: dict[str, dict[str, Any]] = {
        "np=2": {"np": SIZE},
        "np=2, warm": {"np": SIZE, "keep_warm": True},
        "np=-2": {"np": -SIZE},
    }
    values: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for way, options in ways.items():
            runner = HorovodRunner(**options)
            with contextlib.redirect_stdout(io.StringIO()):
                runner.run(least())
            if number:  # the first one of each kind starts processes that stay
                for phase in runner.phases:
                    values.setdefault(f"{way}: {phase.name}", []).append(phase.seconds)
    spark.stop()
    names = [f"{way}: {name}" for way in ways for name in _ORDER]
    lines = [Figures(name, "s", values[name]) for name in names if name in values]
    return Case("phases", "the phases of a launch", lines)
