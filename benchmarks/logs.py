"""The way of the ranks' output to the driver's standard output, and what it costs a training step.

The driver is a process of its own whose standard output is a pipe that is read here. So only what
arrived is counted; lines that were dropped on the way are taken from the marks that say so.

- ``lines``: both ranks print lines of 100 bytes as fast as they can. From the first ``print`` to
  the arrival of the last line; beside ``cat``, which is two plain processes that print the same
  into a pipe each, with a ``cat`` between it and the reader.
- ``step``: a training step of some milliseconds on each rank, which prints 10,000 lines a second
  in one block of steps and nothing in the next one. The block's own prints are part of its steps.
- ``step, driver stopped``: the same, while nobody reads the driver's standard output.

The lines per second are those that arrived.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cluster import session
from benchmarks.report import Case, Figures

RANKS = 2
FLOOD_LINES = 200_000
"""Of each rank; 20 MB each, which is more than all buffers on the way hold."""

LINES_PER_SECOND = 10_000
BLOCKS = 6
BLOCK_SECONDS = 1.0
_PRINTED = re.compile(rb"x{80}\n")
_MARK = re.compile(rb"HorovodRunner: (\d+) lines are missing here")
_BEGIN = re.compile(rb"begin ([\d.]+)\n")


def flood() -> Callable[[int, str], None]:
    """Return a main that prints as fast as it can."""

    def main(lines: int, directory: str) -> None:
        import os
        import time
        from pathlib import Path

        import psutil

        task = psutil.Process(os.getppid())
        used = sum(task.cpu_times()[:2])
        own = time.process_time()
        print(f"begin {time.monotonic()}")
        began = time.monotonic()
        for index in range(lines):
            print(f"{index:019} " + "x" * 79)
        seconds = time.monotonic() - began
        own = time.process_time() - own
        time.sleep(2.0)  # what is on its way costs the task, too
        used = sum(task.cpu_times()[:2]) - used
        figures = {"seconds": seconds, "rank": own, "task": used, "task pid": task.pid}
        Path(directory, f"rank{os.environ['RANK']}").write_text(json.dumps(figures))

    import json

    return main


def train() -> Callable[[str, int, float, int], None]:
    """Return a main that trains, and prints in every second block of its steps."""

    def main(directory: str, blocks: int, block_seconds: float, lines_per_second: int) -> None:
        import json
        import os
        import time
        from pathlib import Path

        import torch

        torch.set_num_threads(1)
        model = torch.nn.Sequential(
            torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        inputs, labels = torch.randn(64, 512), torch.randint(10, (64,))
        steps: dict[str, list[float]] = {"quiet": [], "printing": []}
        printed = 0
        print(f"begin {time.monotonic()}")
        for block in range(2 * blocks):
            way = "printing" if block % 2 else "quiet"
            end = time.perf_counter() + block_seconds
            owed = 0.0
            last = time.perf_counter()
            while last < end:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                for _ in range(int(owed)):
                    print(f"{printed:019} " + "x" * 79)
                    printed += 1
                now = time.perf_counter()
                steps[way].append(now - last)
                owed -= int(owed)
                if way == "printing":
                    owed += (now - last) * lines_per_second
                last = now
        figures = {"steps": steps, "printed": printed}
        Path(directory, f"rank{os.environ['RANK']}").write_text(json.dumps(figures))

    return main


@dataclass
class Arrived:
    """What came out of the driver's standard output.

    Parameters
    ----------
    lines
        Whole lines of the ranks.
    missing
        Lines that the marks count.
    begin
        When the first rank began to print (monotonic clock).
    end
        When the last line arrived.
    driver
        CPU seconds of the driver in between.
    ranks
        What each rank wrote down.
    memory
        Most bytes that the driver held.
    """

    lines: int = 0
    missing: int = 0
    begin: float = 0.0
    end: float = 0.0
    driver: float = 0.0
    memory: int = 0
    ranks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Lines that arrived, in a second."""
        return self.lines / (self.end - self.begin)

    def cpu_of_tasks(self) -> float:
        """CPU seconds of the tasks."""
        return sum({each["task pid"]: each["task"] for each in self.ranks}.values())


def read(command: list[str], stopped_until: Callable[[Path], bool] | None = None) -> Arrived:
    """Start a driver and read what it shows.

    Parameters
    ----------
    command
        The driver; the directory for the ranks' files is added.
    stopped_until
        Once the ranks have begun nothing is read until this is true.

    Returns
    -------
    Arrived
        The figures.
    """
    arrived = Arrived()
    with tempfile.TemporaryDirectory(prefix="horovodrunner-logs-") as directory:
        with Path(directory, "stderr").open("wb") as errors:
            driver = subprocess.Popen([*command, directory], stdout=subprocess.PIPE, stderr=errors)
        assert driver.stdout is not None
        process, used, rest = psutil.Process(driver.pid), 0.0, b""
        with _peak_memory(process) as peak:
            while data := os.read(driver.stdout.fileno(), 1 << 20):
                now = time.monotonic()
                whole, newline, rest = (rest + data).rpartition(b"\n")
                text = whole + newline
                if begun := _BEGIN.findall(text):
                    arrived.begin = min([*map(float, begun), arrived.begin or now])
                    used = used or sum(process.cpu_times()[:2])
                    while stopped_until is not None and not stopped_until(Path(directory)):
                        time.sleep(0.05)
                if lines := text.count(b"x" * 79 + b"\n"):
                    arrived.lines += lines
                    arrived.end = now
                    arrived.driver = sum(process.cpu_times()[:2]) - used
                arrived.missing += sum(map(int, _MARK.findall(text)))
        driver.stdout.close()
        if driver.wait():
            raise RuntimeError(Path(directory, "stderr").read_text())
        arrived.memory = max(peak)
        arrived.ranks = [
            json.loads(Path(directory, f"rank{rank}").read_text()) for rank in range(RANKS)
        ]
    return arrived


@contextlib.contextmanager
def _peak_memory(process: psutil.Process) -> Iterator[list[int]]:
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            with contextlib.suppress(psutil.Error):
                peak.append(process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _driver(way: str, np: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.logs", way, str(np)]


def _all_ranks_are_done(directory: Path) -> bool:
    return len(list(directory.glob("rank*"))) == RANKS


def _check(arrived: Arrived, printed: int) -> None:
    if arrived.lines + arrived.missing != printed:
        raise RuntimeError(f"{printed} lines printed, and {arrived} arrived")


def measure(rounds: int) -> Case:
    """Measure all ways in turn.

    Parameters
    ----------
    rounds
        How often each is measured.

    Returns
    -------
    Case
        The table.
    """
    values: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        values.setdefault(name, []).append(value)

    for _ in range(rounds):
        for way, np in (("cat", 0), ("np=2", RANKS), ("np=-2", -RANKS)):
            arrived = read(_driver("flood", np))
            if np:  # the two cats tear each other's lines
                _check(arrived, FLOOD_LINES * RANKS)
            millions = (arrived.lines + arrived.missing) / 1e6
            note(f"lines, {way}", arrived.rate)
            note(f"of them missing, {way}", arrived.missing)
            note(f"CPU of the driver, {way}", arrived.driver / millions)
            note(f"CPU of the tasks, {way}", arrived.cpu_of_tasks() / millions)
            note(f"CPU of the ranks, {way}", sum(e["rank"] for e in arrived.ranks) / millions)
        for way, np in (("cat", 0), ("np=2", RANKS), ("np=-2", -RANKS)):
            for title, stopped in (("step", None), ("step, stopped", _all_ranks_are_done)):
                if way == "cat" and stopped:
                    continue
                arrived = read(_driver("train", np), stopped)
                if np:
                    _check(arrived, sum(each["printed"] for each in arrived.ranks))
                steps = {
                    kind: [step for each in arrived.ranks for step in each["steps"][kind]]
                    for kind in ("quiet", "printing")
                }
                quiet, printing = (statistics.median(steps[k]) for k in ("quiet", "printing"))
                note(f"{title}, {way}, quiet", quiet * 1000)
                note(f"{title}, {way}, printing", printing * 1000)
                note(f"{title}, {way}, missing", arrived.missing)
                note(f"{title}, {way}, memory", arrived.memory / 2**20)
    lines = []
    for name, each in values.items():
        unit = "lines/s" if name.startswith("lines") else "ms"
        unit = "s/million lines" if name.startswith("CPU") else unit
        unit = "lines" if "missing" in name else "MiB" if name.endswith("memory") else unit
        beside = f"{name.removesuffix('printing')}quiet" if name.endswith("printing") else ""
        beside = "lines, cat" if name.startswith("lines, np") else beside
        lines.append(Figures(name, unit, each, beside))
    return Case("logs", "two ranks that print, to the driver's standard output", lines)


def _cat(way: str, directory: str) -> None:
    """Run two plain processes, each with a pipe to a ``cat``."""
    processes = []
    for rank in range(RANKS):
        environment = {**os.environ, "RANK": str(rank)}
        command = [sys.executable, "-m", "benchmarks.logs", f"{way}-plain", "0", directory]
        rank_process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        processes += [rank_process, subprocess.Popen(["cat"], stdin=rank_process.stdout)]
    assert not any(process.wait() for process in processes)


def main(way: str, np: int, directory: str) -> None:
    """Be the driver of one measurement, or with ``-plain`` a rank without one."""
    way, _, plain = way.partition("-")
    functions: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
        "flood": (flood(), {"lines": FLOOD_LINES}),
        "train": (
            train(),
            {
                "blocks": BLOCKS,
                "block_seconds": BLOCK_SECONDS,
                "lines_per_second": LINES_PER_SECOND,
            },
        ),
    }
    function, kwargs = functions[way]
    if plain:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        function(**kwargs, directory=directory)
    elif np == 0:
        _cat(way, directory)
    else:
        from horovodrunner import HorovodRunner

        spark = session() if np > 0 else None
        HorovodRunner(np=np, driver_log_verbosity="all").run(
            function, **kwargs, directory=directory
        )
        if spark is not None:
            spark.stop()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
