"""A checkpoint from rank 0 to the driver, beside a raw copy of the same bytes over a socket.

Prints, for each repetition, interleaved:

- ``raw``: a process sends a file over a loopback socket, this one writes it, both with one
  buffer of a mebibyte and nothing else;
- ``stored``: from the end of ``with checkpoint.save()`` in main until the checkpoint is complete
  in ``checkpoint_dir``;
- ``held``: how long the end of the ``with`` block held main;
- ``write``: how long main took to write the file itself.

Run it with ``.venv/bin/python benchmarks/checkpoint.py --mebibytes 1024 --repeat 5``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from horovodrunner import HorovodRunner

PIECE = 1024 * 1024

SENDER = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
buffer = memoryview(bytearray(1024 * 1024))
with open(sys.argv[2], "rb") as file:
    while count := file.readinto(buffer):
        connection.sendall(buffer[:count])
connection.close()
"""


def raw_copy(source: Path, target: Path) -> float:
    """Receive a file over loopback and write it; seconds from the first byte to the last."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-S", "-c", SENDER, str(server.getsockname()[1]), str(source)]
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


def main(source: str, kept: str, repeat: int, signs: str) -> list[dict[str, float]]:
    """Save the file as a checkpoint, once for every sign that the driver gives."""
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


def measure(mebibytes: int, repeat: int, directory: Path) -> dict[str, Any]:
    """Measure all of it in one run."""
    source = directory / "source.bin"
    with source.open("wb") as file:
        for _ in range(mebibytes):
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
    figures = runner.run(main, **arguments)
    other.join()
    columns = {name: [figure[name] for figure in figures] for name in figures[0]}
    return {"raw": raw, **columns}


def report(columns: dict[str, list[float]], mebibytes: int) -> dict[str, Any]:
    """Print a table, and give what goes into the JSON file."""
    medians = {name: statistics.median(values) for name, values in columns.items()}
    for name, values in columns.items():
        each = "  ".join(f"{value:7.3f}" for value in values)
        print(f"{name:>7}: median {medians[name]:7.3f} s   {each}")
    ratios = [raw / stored for raw, stored in zip(columns["raw"], columns["stored"], strict=True)]
    print(f"speed beside the raw copy: median {statistics.median(ratios):.2f}")
    return {
        "mebibytes": mebibytes,
        "seconds": columns,
        "medians": medians,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where all files are, such as /dev/shm")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if options.directory:
        os.environ["SPARK_LOCAL_DIRS"] = str(options.directory)
    spark = (
        SparkSession.builder.master("local-cluster[1,1,1024]")
        .config("spark.ui.enabled", "false")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        columns = measure(options.mebibytes, options.repeat, Path(folder))
    result = report(columns, options.mebibytes)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    spark.stop()
