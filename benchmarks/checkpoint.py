"""A checkpoint of a gibibyte from rank 0 to the driver, beside a raw copy of the same bytes.

- ``raw copy``: a process sends a file over a loopback socket, this one writes it, both with one
  buffer of a mebibyte and nothing else;
- ``stored``: from the end of ``with checkpoint.save()`` in main until the checkpoint is complete
  in ``checkpoint_dir``;
- ``held``: how long the end of the ``with`` block held main;
- ``write``: how long main took to write the file itself.

``BENCHMARK_DIRECTORY`` names a directory for all files, such as ``/dev/shm``.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.cluster import session
from benchmarks.report import Case, Figures
from horovodrunner import HorovodRunner

PIECE = 1024 * 1024
MEBIBYTES = 1024

SENDER = """
import hashlib, socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
buffer = memoryview(bytearray(1024 * 1024))
digest = hashlib.sha256()
with open(sys.argv[2], "rb") as file:
    while count := file.readinto(buffer):
        if sys.argv[3:]:
            digest.update(buffer[:count])
        connection.sendall(buffer[:count])
connection.close()
"""


def raw_copy(source: Path, target: Path, *, hashes: bool = False) -> float:
    """Receive a file over loopback and write it; seconds from the first byte to the last.

    `hashes` lets the sender compute the SHA-256 of what it sends, as it does of a checkpoint.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-S", "-c", SENDER, str(server.getsockname()[1]), str(source)]
        command += ["hashes"] * hashes
        with subprocess.Popen(command):
            connection, _ = server.accept()
            began = time.perf_counter()
            buffer = memoryview(bytearray(PIECE))
            with connection, target.open("wb") as file:
                while count := connection.recv_into(buffer):
                    file.write(buffer[:count])
            seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def saving() -> Callable[..., list[dict[str, float]]]:
    """Return a main that saves the file at every sign of the driver's; it travels by value."""

    def main(source: str, kept: str, repeat: int, signs: str) -> list[dict[str, float]]:
        import time
        from pathlib import Path

        from horovodrunner import checkpoint

        figures: list[dict[str, float]] = []
        for step in range(repeat):
            while not Path(signs, str(step)).exists():
                time.sleep(0.01)
            with checkpoint.save(step=step) as directory:
                began = time.perf_counter()
                shutil.copyfile(source, directory / "weights.bin")
                written = time.perf_counter()
            left = time.perf_counter()
            stored = Path(kept, f"step-{step:08d}")
            while not stored.exists():
                time.sleep(0.001)
            figures.append(
                {
                    "stored": time.perf_counter() - left,
                    "held": left - written,
                    "write": written - began,
                }
            )
            Path(signs, f"{step}.done").touch()
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
    source = directory / "source.bin"
    with source.open("wb") as file:
        for _ in range(MEBIBYTES):
            file.write(os.urandom(PIECE))
    kept, signs = directory / "kept", directory / "signs"
    signs.mkdir()
    raw: list[float] = []

    def interleave() -> None:
        for step in range(repeat):
            os.sync()  # what the disk still has to write slows whoever comes next
            raw.append(raw_copy(source, directory / "raw.bin"))
            os.sync()
            (signs / str(step)).touch()
            while not (signs / f"{step}.done").exists():
                time.sleep(0.01)

    other = threading.Thread(target=interleave, daemon=True)
    other.start()
    runner = HorovodRunner(np=1, checkpoint_dir=kept, keep_checkpoints=1)
    arguments = {"source": str(source), "kept": str(kept), "repeat": repeat, "signs": str(signs)}
    figures = runner.run(saving(), **arguments)
    other.join()
    return {"raw copy": raw, **{name: [each[name] for each in figures] for name in figures[0]}}


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
    spark = session(executors=1)
    with (
        tempfile.TemporaryDirectory(dir=folder) as directory,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        values = columns(rounds, Path(directory))
    spark.stop()
    lines = [Figures(name, "s", seconds, "raw copy") for name, seconds in values.items()]
    return Case("checkpoint", "a checkpoint of 1 GiB, from rank 0 to the driver", lines)
