"""The first run of a new session, beside the first barrier job of one and the same processes.

Each is measured in a process and a session of its own, without the session's own start.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.cluster import session
from benchmarks.launch import SIZE, bare_processes, barrier_job, horovod_runner
from benchmarks.report import Case, Figures, interleaved


def first_in_session(way: str) -> float:
    """Measure the first job of a new session, in a process of its own.

    Parameters
    ----------
    way
        ``"job"``: a barrier job that does nothing; ``"run"``: HorovodRunner.

    Returns
    -------
    float
        Seconds, without the session's own start.
    """
    command = [sys.executable, "-m", "benchmarks.first", way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def measure(rounds: int) -> Case:
    """Measure both in turn.

    Parameters
    ----------
    rounds
        How often each is measured.

    Returns
    -------
    Case
        The table.
    """
    ways = {
        "floor of the first run": lambda: first_in_session("job") + bare_processes(),
        "first run of a session": lambda: first_in_session("run"),
    }
    values = interleaved(ways, rounds)
    lines = [Figures(name, "s", values[name], "floor of the first run") for name in ways]
    return Case("first", "the first run of a session, on two ranks", lines)


if __name__ == "__main__":
    spark = session()
    print(barrier_job(spark) if sys.argv[1] == "job" else horovod_runner(SIZE))
    spark.stop()
