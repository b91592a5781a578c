"""From the end of main to the return of run() for arrays that rank 0 returns.

- ``baseline``: pickle, a loopback socket, unpickle, between two processes that do nothing else.
- ``np=1``: HorovodRunner on an executor of a warm session, from the moment main returns.
- ``less the stage``: the same without what a result of a few bytes takes, which is the worker's
  leaving and the end of Spark's stage.

Memory is each process's own peak (VmHWM). The file that the worker writes is nobody's: it is as
large as the result, and gone at the end of the run.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cluster import session
from benchmarks.report import Case, Figures

MIB = 1024 * 1024
SIZES = {"1 MiB": MIB, "256 MiB": 256 * MIB, "1 GiB": 1024 * MIB, "5 GiB": 5 * 1024 * MIB}
FEW_BYTES = 4
LARGE = 2 * 1024 * MIB
"""A larger array is measured once, and where there is memory for it."""

_HEAD = struct.Struct(">dQ")


def _array_of(size: int) -> Any:
    import numpy as np

    return np.ones(size // 4, np.float32)


def baseline(size: int) -> float:
    """Take an array from another process in the plainest way.

    Parameters
    ----------
    size
        Bytes of it.

    Returns
    -------
    float
        Seconds from when the other process has it until it is here.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-m", "benchmarks.result"]
        command += [str(size), str(server.getsockname()[1])]
        process = subprocess.Popen(command)
        connection, _ = server.accept()
        with connection:
            began, pickled = _HEAD.unpack(_receive(connection, _HEAD.size))
            array = pickle.loads(_receive(connection, pickled))
            seconds = time.time() - began
    assert process.wait() == 0
    assert array.nbytes == size
    return float(seconds)


def _receive(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        view = view[connection.recv_into(view) :]
    return data


def _send(size: int, port: int) -> None:
    array = _array_of(size)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        began = time.time()
        data = pickle.dumps(array, pickle.HIGHEST_PROTOCOL)
        connection.sendall(_HEAD.pack(began, len(data)))
        connection.sendall(data)


def returning(size: int, pids: str) -> Callable[[], tuple[float, Any]]:
    """Return a main that returns an array, and when it did; it travels by value.

    Parameters
    ----------
    size
        Bytes of the array.
    pids
        A file for the ids of the worker's and the task's process.
    """

    def main() -> tuple[float, Any]:
        import os
        import time
        from pathlib import Path

        import numpy as np

        array = np.ones(size // 4, np.float32)
        Path(pids).write_text(f"{os.getpid()} {os.getppid()}")
        return time.time(), array

    return main


def of_run(size: int) -> tuple[float, dict[str, float]]:
    """Run HorovodRunner once.

    Parameters
    ----------
    size
        Bytes of the array that rank 0 returns.

    Returns
    -------
    tuple of float and dict
        Seconds from the end of main, and GiB of memory of each process at its peak.
    """
    from horovodrunner import HorovodRunner

    with tempfile.TemporaryDirectory() as directory, _Peaks(Path(directory, "pids")) as peaks:
        with contextlib.redirect_stdout(io.StringIO()):
            ended, array = HorovodRunner(np=1).run(returning(size, str(peaks.pids)))
        seconds = time.time() - ended
        assert array.nbytes == size
        array[:1] = 2  # it can be written to
    return seconds, peaks.gib


class _Peaks:
    """Looks at the processes' peak memory until they leave."""

    def __init__(self, pids: Path) -> None:
        self.pids = pids
        self.gib: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> _Peaks:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        seen: dict[str, str] = {"driver": "self"}
        while True:
            is_last = self._ended.wait(0.01)
            with contextlib.suppress(OSError, ValueError):
                if len(seen) == 1:
                    worker, task = self.pids.read_text().split()
                    seen |= {"task": task, "worker": worker}
            for name, pid in seen.items():
                with contextlib.suppress(OSError, IndexError):  # it has left
                    status = Path(f"/proc/{pid}/status").read_text()
                    self.gib[name] = int(status.split("VmHWM:")[1].split()[0]) / MIB
            if is_last:
                return


def measure(rounds: int) -> Case:
    """Measure all sizes in turn.

    Parameters
    ----------
    rounds
        How often each is measured.

    Returns
    -------
    Case
        The table.
    """
    spark = session(executors=1)
    of_run(FEW_BYTES)
    values: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}

    def note(where: dict[str, list[float]], name: str, value: float) -> None:
        where.setdefault(name, []).append(value)

    for index in range(rounds):
        note(values, "few bytes, np=1", of_run(FEW_BYTES)[0])
        for name, size in _sizes(index):
            if psutil.virtual_memory().available > 4.2 * size:
                note(values, f"{name}, baseline", baseline(size))
            stage = values["few bytes, np=1"][-1]
            seconds, peaks = of_run(size)
            note(values, f"{name}, np=1", seconds)
            note(values, f"{name}, less the stage", max(0.0, seconds - stage))
            for process, gib in peaks.items():
                note(memory, f"{name}, memory of the {process}", gib)
    spark.stop()
    lines = []
    for name, each in values.items():
        base = name.split(",")[0] + ", baseline"
        lines.append(Figures(name, "s", each, "" if name == base else base))
    lines += [Figures(name, "GiB", each) for name, each in memory.items()]
    return Case("result", "an array that rank 0 returns, from the end of main", lines)


def _sizes(index: int) -> Iterator[tuple[str, int]]:
    for name, size in SIZES.items():
        if size <= LARGE or (index == 0 and psutil.virtual_memory().available > 3.3 * size):
            yield name, size


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _send(int(sys.argv[1]), int(sys.argv[2]))
