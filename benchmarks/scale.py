"""What each further rank costs: workers that do nothing but report, 2 to 64 of them.

- ``launch``: from run() until the console says that all ranks run main; ``teardown``: from then
  until run() returns. main returns at once and imports nothing.
- ``python -c pass``: so many bare interpreters at once; ``spawn``: the same with the imports of
  a worker. Whoever starts a process for each rank pays for those.
- ``barrier job``: a barrier stage of so many tasks that do nothing, in the same session.
- ``beyond``: what a run takes beyond spawn (and, on Spark, beyond the barrier job), for each rank.

Sixty-four ranks share the cores of this machine, so every process that is started costs its whole
processor time divided by the cores.
"""

from __future__ import annotations

import contextlib
import io
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks.cluster import session
from benchmarks.launch import barrier_job
from benchmarks.report import Case, Figures
from horovodrunner import HorovodRunner

SIZES = (2, 8, 32, 64)
CORES = 32
_SPAWN = "import horovodrunner.processes.worker.__main__"


class _Console(io.StringIO):
    """Takes what the run prints, and notes when all ranks run main."""

    running_at = 0.0

    def write(self, text: str) -> int:
        if "running main" in text:
            self.running_at = time.perf_counter()
        return super().write(text)


def _nothing() -> Callable[[], None]:
    def main() -> None:
        return

    return main


def run(np: int) -> dict[str, float]:
    """Run workers that do nothing.

    Parameters
    ----------
    np
        As HorovodRunner takes it.

    Returns
    -------
    dict of float
        Seconds of launch and teardown; without Spark also the processor time of all processes.
    """
    console = _Console()
    began, spent = time.perf_counter(), _cpu_seconds()
    with contextlib.redirect_stdout(console), contextlib.redirect_stderr(console):
        HorovodRunner(np=np).run(_nothing())
    ended = time.perf_counter()
    assert console.running_at, console.getvalue()
    found = {"launch": console.running_at - began, "teardown": ended - console.running_at}
    if np < 0:
        found["CPU"] = _cpu_seconds() - spent
    return found


def _cpu_seconds() -> float:
    """Processor time of this process and of those it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def processes(size: int, code: str) -> float:
    """Start so many interpreters at once.

    Parameters
    ----------
    size
        How many.
    code
        What each runs.

    Returns
    -------
    float
        Seconds until all have left.
    """
    began = time.perf_counter()
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(size)]
    assert [process.wait() for process in running] == [0] * size
    return time.perf_counter() - began


def measure(rounds: int, sizes: Sequence[int] = SIZES) -> Case:
    """Measure all sizes in turn.

    Parameters
    ----------
    rounds
        How often each is measured.
    sizes
        Numbers of ranks.

    Returns
    -------
    Case
        The table.
    """
    spark = session(executors=2, cores=CORES, memory=2048)
    barrier_job(spark, max(sizes))
    run(max(sizes))  # Spark's Python workers keep what they have imported
    values: dict[str, list[float]] = {}
    for _ in range(rounds):
        for size in sizes:
            found = {"python -c pass": processes(size, "pass")}
            before = _cpu_seconds()
            found["spawn"] = processes(size, _SPAWN)
            found["spawn CPU"] = _cpu_seconds() - before
            found["barrier job"] = barrier_job(spark, size)
            spawn, job = found["spawn"], found["barrier job"]
            for sign, floor in (("", spawn + job), ("-", spawn)):
                seconds = run(int(f"{sign}{size}"))
                found |= {f"np={sign}{size} {name}": value for name, value in seconds.items()}
                beyond = seconds["launch"] + seconds["teardown"] - floor
                found[f"np={sign}{size} beyond, a rank"] = 1e3 * beyond / size
            beyond = found[f"np=-{size} CPU"] - found["spawn CPU"]
            found[f"np=-{size} CPU beyond, a rank"] = 1e3 * beyond / size
            for name, value in found.items():
                values.setdefault(f"{size}: {name}", []).append(value)
    spark.stop()
    order = sorted(values, key=lambda name: int(name.partition(":")[0]))
    lines = [Figures(name, "ms" if "beyond" in name else "s", values[name]) for name in order]
    return Case("scale", "workers that do nothing but report, and what each costs", lines)
