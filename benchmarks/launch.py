"""From run() to its value for a main that does the least, init and rank, and for one that trains.

- ``floor``: a barrier job that does nothing, and then two processes that import torch and Horovod,
  init and leave. Nobody who starts a job and then processes can be faster; its two parts are
  shown, too.
- ``np=2``: HorovodRunner on two executors of a session that has run jobs; ``np=-2``: on the driver.
  ``warm``: with ``keep_warm=True``, after a first run.
- ``train``: the same for a main of a module that makes one step with an optimizer, for which torch
  imports as much again, beside a floor whose processes do that, too.
- ``horovodrun``, ``TorchDistributor``, ``horovod.spark.run``: the peers, with the same work.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.cluster import session
from benchmarks.report import Case, Figures, interleaved

SIZE = 2
_BARE = "import torch, horovod.torch as hvd; hvd.init(); assert hvd.size() == {size}; hvd.rank()"
_BARE_TRAINING = "from benchmarks.mains import train; train()"


def least() -> Callable[[], int]:
    """Return a main that does the least, and that travels as a notebook's cell does: by value."""

    def main() -> int:
        import horovod.torch as hvd
        import torch  # noqa: F401 - as everybody's training code

        hvd.init()
        return int(hvd.rank())

    return main


def _least_of_torch() -> Callable[[], int]:
    def main() -> int:
        import torch.distributed

        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        torch.distributed.destroy_process_group()
        return int(rank)

    return main


def bare_processes(size: int = SIZE, code: str = _BARE) -> float:
    """Start processes as horovodrun would, without anything around them.

    Parameters
    ----------
    size
        How many.
    code
        What they run.

    Returns
    -------
    float
        Seconds until all have left.
    """
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
    from horovod.runner.http.http_server import RendezvousServer

    began = time.perf_counter()
    server = RendezvousServer(0)
    port = server.start()
    plan = get_host_assignments([HostInfo("localhost", size)], size)
    server.init(plan)
    processes = []
    for slot in plan:
        variables = {
            "HOROVOD_RANK": slot.rank,
            "HOROVOD_SIZE": slot.size,
            "HOROVOD_LOCAL_RANK": slot.local_rank,
            "HOROVOD_LOCAL_SIZE": slot.local_size,
            "HOROVOD_CROSS_RANK": slot.cross_rank,
            "HOROVOD_CROSS_SIZE": slot.cross_size,
            "HOROVOD_HOSTNAME": "localhost",
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
            "HOROVOD_GLOO_IFACE": "lo",
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            "OMP_NUM_THREADS": 1,
        }
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        command = [sys.executable, "-c", code.format(size=size)]
        processes.append(subprocess.Popen(command, env=environment))
    assert [process.wait() for process in processes] == [0] * size
    seconds = time.perf_counter() - began
    server.stop()
    return seconds


def barrier_job(spark: Any, size: int = SIZE) -> float:
    """Run a barrier stage whose tasks do nothing.

    Parameters
    ----------
    spark
        The session.
    size
        How many tasks.

    Returns
    -------
    float
        Seconds.
    """

    def nothing(batches: Iterator[Any]) -> Iterator[Any]:
        yield from batches

    began = time.perf_counter()
    rows = spark.range(0, size, 1, size).mapInArrow(nothing, "id bigint", barrier=True)
    assert len(rows.collect()) == size
    return time.perf_counter() - began


def horovod_runner(
    np: int, keep_warm: bool = False, main: Callable[[], int] | None = None
) -> float:
    """Run HorovodRunner once.

    Parameters
    ----------
    np
        As it takes it.
    keep_warm
        As it takes it.
    main
        What it runs; without it, what does the least.

    Returns
    -------
    float
        Seconds.
    """
    from horovodrunner import HorovodRunner

    with _quiet():
        began = time.perf_counter()
        assert HorovodRunner(np=np, keep_warm=keep_warm).run(main or least()) == 0
        return time.perf_counter() - began


def _horovodrun() -> float:
    command = [str(Path(sys.executable).with_name("horovodrun")), "-np", str(SIZE), "--gloo"]
    command += [sys.executable, "-c", _BARE.format(size=SIZE)]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def _torch_distributor() -> float:
    from pyspark.ml.torch.distributor import TorchDistributor

    began = time.perf_counter()
    with _quiet():
        distributor = TorchDistributor(num_processes=SIZE, local_mode=False, use_gpu=False)
        assert distributor.run(_least_of_torch()) == 0
    return time.perf_counter() - began


def _horovod_spark() -> float:
    import horovod.spark

    began = time.perf_counter()
    with _quiet():
        results = horovod.spark.run(least(), num_proc=SIZE, use_gloo=True, verbose=0)
    assert results == [0, 1]
    return time.perf_counter() - began


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


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
    from benchmarks.mains import train

    spark = session()
    barrier_job(spark)
    for np in (SIZE, -SIZE):
        for main in (least(), train):
            horovod_runner(np, main=main)
            horovod_runner(np, keep_warm=True, main=main)
    bare, bare_training = "bare processes", "bare processes, train"
    parts: dict[str, list[float]] = {"barrier job": [], bare: [], bare_training: []}

    def floor() -> float:
        parts["barrier job"].append(barrier_job(spark))
        parts[bare].append(bare_processes())
        return parts["barrier job"][-1] + parts[bare][-1]

    def floor_of_training() -> float:
        parts[bare_training].append(bare_processes(code=_BARE_TRAINING))
        return barrier_job(spark) + parts[bare_training][-1]

    ways: dict[str, Callable[[], float]] = {
        "floor": floor,
        "np=2": lambda: horovod_runner(SIZE),
        "np=-2": lambda: horovod_runner(-SIZE),
        "np=2, warm": lambda: horovod_runner(SIZE, keep_warm=True),
        "np=-2, warm": lambda: horovod_runner(-SIZE, keep_warm=True),
        "floor, train": floor_of_training,
        "np=2, train": lambda: horovod_runner(SIZE, main=train),
        "np=-2, train": lambda: horovod_runner(-SIZE, main=train),
        "np=2, train, warm": lambda: horovod_runner(SIZE, keep_warm=True, main=train),
        "np=-2, train, warm": lambda: horovod_runner(-SIZE, keep_warm=True, main=train),
        "horovodrun": _horovodrun,
        "TorchDistributor": _torch_distributor,
        "horovod.spark.run": _horovod_spark,
    }
    values = {**interleaved(ways, rounds), **parts}
    spark.stop()
    beside = {
        **dict.fromkeys(("np=-2", "np=-2, warm", bare_training), bare),
        **dict.fromkeys(("np=2, train", "np=2, train, warm"), "floor, train"),
        **dict.fromkeys(("np=-2, train", "np=-2, train, warm"), bare_training),
    }
    order = ["floor", "barrier job", bare, *(name for name in ways if name != "floor")]
    order.insert(order.index("floor, train") + 1, bare_training)
    lines = [Figures(name, "s", values[name], beside.get(name, "floor")) for name in order]
    return Case("launch", "a main that does the least, and one that trains, on two ranks", lines)
