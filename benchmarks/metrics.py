"""What metrics cost: a report, a training step that reports, and a run of a million points.

- ``report``: one call with three numbers, on one rank that does nothing else.
- ``step``: steps of 5 ms on two ranks at once; blocks of steps with five reports each (1,000 a
  second and rank) and without any take turns, and the ratio is that of neighbours.
- ``a million points``: how much more memory the driver's process holds after the run.
"""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Callable

import psutil

from benchmarks.report import Case, Figures
from horovodrunner import HorovodRunner

STEP_SECONDS = 0.005
REPORTS_A_STEP = 5
STEPS = 100
BLOCKS = 10
POINTS = 1_000_000


def reporting() -> Callable[[int], float]:
    """Return a main that measures a report in microseconds."""

    def main(reports: int) -> float:
        import time

        from horovodrunner import metrics

        loss, accuracy, rate = 0.25, 0.91, 0.001
        began = time.process_time()
        for step in range(reports):
            metrics.report(step=step, loss=loss, accuracy=accuracy, rate=rate)
        return (time.process_time() - began) / reports * 1e6

    return main


def stepping() -> Callable[[], tuple[list[float], list[float]]]:
    """Return a main that takes turns between steps with reports and without."""

    def main() -> tuple[list[float], list[float]]:
        import time

        from horovodrunner import metrics

        def work(cycles: int) -> float:
            total = 0.0
            for number in range(cycles):
                total += number * 0.5
            return total

        cycles = 1000
        while True:
            began = time.perf_counter()
            work(cycles)
            if (took := time.perf_counter() - began) >= STEP_SECONDS / 2:
                cycles = int(cycles * STEP_SECONDS / took)
                break
            cycles *= 2
        seconds: tuple[list[float], list[float]] = ([], [])
        number = 0
        for block in range(2 * BLOCKS):
            began = time.perf_counter()
            for _ in range(STEPS):
                loss = work(cycles)
                if block % 2:
                    for _ in range(REPORTS_A_STEP):
                        metrics.report(step=number, loss=loss, accuracy=0.5, rate=0.001)
                        number += 1
            seconds[block % 2].append((time.perf_counter() - began) / STEPS)
        return seconds

    return main


def measure(rounds: int) -> Case:
    """Measure what metrics cost.

    Parameters
    ----------
    rounds
        How many runs of each kind.

    Returns
    -------
    Case
        The table.
    """
    costs: list[float] = []
    plain: list[float] = []
    with_reports: list[float] = []
    grown: list[float] = []
    rates: list[float] = []
    own = psutil.Process()
    for _ in range(rounds):
        with contextlib.redirect_stdout(io.StringIO()):
            costs.append(HorovodRunner(np=-1).run(reporting(), reports=5_000))
            without, reported = HorovodRunner(np=-2).run(stepping())
            plain.append(statistics.median(without) * 1e3)
            with_reports.append(statistics.median(reported) * 1e3)
            before = own.memory_info().rss
            runner = HorovodRunner(np=-1)
            runner.run(reporting(), reports=POINTS)
            grown.append((own.memory_info().rss - before) / 2**20)
            (main,) = (phase for phase in runner.phases if phase.name == "main")
            rates.append(len(runner.history) / main.seconds)
            del runner
    lines = [
        Figures("report of three numbers", "µs", costs),
        Figures("step of 5 ms on two ranks", "ms", plain),
        Figures(
            "step that reports five times", "ms", with_reports, beside="step of 5 ms on two ranks"
        ),
        Figures("a million points: points kept", "points/s", rates),
        Figures("a million points: memory of the driver", "MiB", grown),
    ]
    return Case("metrics", "what metrics cost", lines)
