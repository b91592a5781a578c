"""A checkpoint of four ranks, 256 MiB each, beside raw copies of the same bytes at the same time.

- ``raw copies``: four processes send a file each over loopback sockets, this one writes them in
  four threads (benchmarks/checkpoint.py);
- ``hashed copies``: the same, and the senders compute the SHA-256 of what they send;
- ``stored``: from the moment at which the last rank has left ``with checkpoint.save(ranks="all")``
  until the checkpoint is complete in ``checkpoint_dir``;
- ``held``: how long the end of the ``with`` block held main, on the rank that it held longest.

``BENCHMARK_DIRECTORY`` names a directory for all files, such as ``/dev/shm``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import io
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import PIECE, raw_copy
from benchmarks.cluster import session
from benchmarks.report import Case, Figures
from horovodrunner import HorovodRunner

RANKS = 4
MEBIBYTES = 256


def saving() -> Callable[..., list[dict[str, float]]]:
    """Return a main that saves its file at every sign of the driver's; it travels by value."""

    def main(sources: list[str], repeat: int, signs: str) -> list[dict[str, float]]:
        import os
        import shutil
        import time
        from pathlib import Path

        from horovodrunner import checkpoint

        rank = int(os.environ["RANK"])
        figures = []
        for step in range(repeat):
            while not Path(signs, str(step)).exists():
                time.sleep(0.01)
            with checkpoint.save(step, ranks="all") as directory:
                shutil.copyfile(sources[rank], directory / "shard.bin")
                written = time.perf_counter()
            left = time.perf_counter()
            figures.append({"left": left, "held": left - written})
            while not Path(signs, f"{step}.done").exists():
                time.sleep(0.01)
        return figures

    return main


def columns(repeat: int, directory: Path) -> dict[str, list[float]]:
    """Measure all of it in one run.

    Parameters
    ----------
    repeat
        How many checkpoints.
    directory
        Where all files are.

    Returns
    -------
    dict of list of float
        Seconds, by name.
    """
    sources = [directory / f"source-{rank}.bin" for rank in range(RANKS)]
    for source in sources:
        with source.open("wb") as file:
            for _ in range(MEBIBYTES):
                file.write(os.urandom(PIECE))
    kept, signs = directory / "kept", directory / "signs"
    signs.mkdir()
    copied: dict[bool, list[float]] = {False: [], True: []}
    complete: list[float] = []

    def copy_all(hashes: bool) -> None:
        os.sync()  # what the disk still has to write slows whoever comes next
        copy = functools.partial(raw_copy, hashes=hashes)
        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(RANKS) as pool:
            list(pool.map(copy, sources, [directory / f"raw-{rank}.bin" for rank in range(RANKS)]))
        copied[hashes].append(time.perf_counter() - began)

    def interleave() -> None:
        for step in range(repeat):
            for hashes in copied:
                copy_all(hashes)
            os.sync()
            (signs / str(step)).touch()
            while not (kept / f"step-{step:08d}").exists():
                time.sleep(0.001)
            complete.append(time.perf_counter())
            (signs / f"{step}.done").touch()

    other = threading.Thread(target=interleave, daemon=True)
    other.start()
    runner = HorovodRunner(np=RANKS, checkpoint_dir=kept, keep_checkpoints=1, results="all")
    arguments: dict[str, Any] = {"sources": list(map(str, sources)), "repeat": repeat}
    runner.run(saving(), **arguments, signs=str(signs))
    other.join()
    ranks = list(runner.results)
    # one machine, one monotonic clock
    last = [max(figures[step]["left"] for figures in ranks) for step in range(repeat)]
    return {
        "raw copies": copied[False],
        "hashed copies": copied[True],
        "stored": [there - left for there, left in zip(complete, last, strict=True)],
        "held": [max(figures[step]["held"] for figures in ranks) for step in range(repeat)],
    }


def measure(rounds: int) -> Case:
    """Measure checkpoints beside raw copies, in turn.

    Parameters
    ----------
    rounds
        How many checkpoints.

    Returns
    -------
    Case
        The table.
    """
    folder = os.environ.get("BENCHMARK_DIRECTORY")
    if folder:
        os.environ["SPARK_LOCAL_DIRS"] = folder
    spark = session(executors=RANKS)
    with (
        tempfile.TemporaryDirectory(dir=folder) as directory,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        values = columns(rounds, Path(directory))
    spark.stop()
    lines = [Figures(name, "s", seconds, "raw copies") for name, seconds in values.items()]
    return Case("parts", f"a checkpoint of {RANKS} ranks, {MEBIBYTES} MiB each", lines)
