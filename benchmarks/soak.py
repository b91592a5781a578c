"""Many short runs with random faults: nothing may be left, and every cause must be named.

Each run trains for a moment on two ranks, on executors or on this machine, and meets one fault on
a random rank while the other rank computes or waits in a collective. After each run this process
must have no worker, no port, no thread and no file more than before, and the session must work.

Prints one line a run, and at the end how many runs there were of each fault, how long after the
fault the driver raised, and what was left behind. Run it with
``.venv/bin/python -m benchmarks.soak --runs 100 --seed 1``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from pyspark.sql import SparkSession

from horovodrunner import HorovodRunner
from horovodrunner.processes.driver.slots import total_slots
from tests import processes
from tests.conftest import (
    TEMPORARY,
    listening_sockets,
    marked_processes,
    own_threads,
    temporary_files,
)

LEAVING_SECONDS = 5.0

INSIDE = {
    "none": "",
    "exception": "ValueError",
    "sys.exit": "SystemExit",
    "os._exit": "exit code 4",
    "SIGKILL": "SIGKILL",
    "SIGSEGV": "SIGSEGV",
    "SIGTERM": "SIGTERM",
    "return early": "returned from main while",
    "SIGSTOP": "has not answered",
    "stay away": "missing: rank",
    "children that ignore SIGTERM": "failed with children",
    "restart": "",
}
"""Faults that main brings about itself, and what the error has to say; "" for none."""

OUTSIDE = {
    "kill the task's process": "lost",
    "kill the executor": "lost executor",
    "cancel the job": "cancelled",
    "interrupt": "KeyboardInterrupt",
}
"""Faults from outside, only on executors; each needs the time of a replaced executor."""


def main(fault: str, on_rank: int, waiting: bool, signs: str) -> str:
    """Train for a moment and meet the fault."""
    import subprocess

    import horovod.torch as hvd
    import torch

    from horovodrunner import checkpoint

    hvd.init()
    checkpoint.latest()
    hvd.allreduce(torch.ones(1), name="first")
    with checkpoint.save(step=1) as directory:
        (directory / "state").write_bytes(os.urandom(100_000))
    Path(signs, f"rank{hvd.rank()}-{os.getpid()}").touch()
    if fault == "none" or (fault == "restart" and checkpoint.attempt == 2):
        return "done"
    if hvd.rank() != on_rank:
        while not waiting and fault not in {"stay away", "return early"}:
            sum(range(1000))
        hvd.allreduce(torch.ones(1), name="second")
        return "done"
    time.sleep(0.2)
    Path(signs, "fault").write_text(repr(time.time()))
    if fault == "exception":
        raise ValueError("on purpose")
    if fault == "sys.exit":
        sys.exit(3)
    if fault == "os._exit":
        os._exit(4)
    if fault == "return early":
        return "done"
    if fault == "children that ignore SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"
        subprocess.Popen([sys.executable, "-c", code])
        raise RuntimeError("failed with children")
    if fault == "restart":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[fault])
    time.sleep(600)
    return "never"


def from_outside(fault: str, on_rank: int, signs: Path, spark: SparkSession) -> None:
    """Bring a fault about as soon as both ranks are in main."""
    deadline = time.monotonic() + 60
    while len(list(signs.glob("rank*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    [sign] = signs.glob(f"rank{on_rank}-*")
    worker = psutil.Process(int(sign.name.split("-")[1]))
    (signs / "fault").write_text(repr(time.time()))
    if fault == "kill the task's process":
        psutil.Process(worker.ppid()).kill()
    elif fault == "kill the executor":
        next(p for p in worker.parents() if p.name() == "java").kill()
    elif fault == "cancel the job":
        spark.sparkContext.cancelAllJobs()
    else:
        os.kill(os.getpid(), signal.SIGINT)


def one_run(
    fault: str, on_rank: int, waiting: bool, np: int, spark: SparkSession
) -> tuple[str, float]:
    """Make one run; return what it raised, and how long after the fault."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        signs = Path(folder, "signs")
        signs.mkdir()
        helper: threading.Thread | None = None
        if fault in OUTSIDE:
            arguments = (fault, on_rank, signs, spark)
            helper = threading.Thread(target=from_outside, args=arguments)
            helper.start()
        runner = HorovodRunner(
            np=np,
            checkpoint_dir=Path(folder, "kept"),
            max_restarts=1 if fault == "restart" else 0,
            stall_timeout=2 if fault in {"SIGSTOP", "stay away"} else None,
        )
        raised = ""
        try:
            runner.run(main, fault=fault, on_rank=on_rank, waiting=waiting, signs=str(signs))
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - looked at by the caller
            raised = f"{type(error).__name__}: {error}"
        ended = time.time()
        if helper is not None:
            helper.join()
        began = signs / "fault"
        return raised, ended - float(began.read_text()) if began.exists() else 0.0


def present() -> set[str]:
    """List what may not become more."""
    return {*marked_processes(), *own_threads(), *listening_sockets(), *temporary_files()}


def left_behind(before: set[str]) -> set[str]:
    """Wait a moment for what is just leaving, and list the rest."""
    deadline = time.monotonic() + LEAVING_SECONDS
    while (left := present() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def soak(runs: int, seed: int, spark: SparkSession) -> list[dict[str, Any]]:
    """Make all runs."""
    dice = random.Random(seed)
    records: list[dict[str, Any]] = []
    expected = {**INSIDE, **OUTSIDE}
    for number in range(runs):
        fault = dice.choice([*INSIDE, *INSIDE, *OUTSIDE])
        on_rank, waiting = dice.randrange(2), dice.random() < 0.5
        np = 2 if fault in OUTSIDE or dice.random() < 0.7 else -2
        wait_for_two_slots(spark)
        before = present()
        raised, seconds = one_run(fault, on_rank, waiting, np, spark)
        is_right = expected[fault] in raised if expected[fault] else not raised
        record = {
            "fault": fault,
            "np": np,
            "rank": on_rank,
            "waiting": waiting,
            "seconds": round(seconds, 2),
            "right": is_right,
            "left": sorted(left_behind(before)),
        }
        records.append(record)
        problem = "" if is_right and not record["left"] else f"  PROBLEM {record} {raised[:2000]}"
        print(
            f"{number + 1:4} np={np:2} rank {on_rank} {fault:30} {seconds:6.2f} s{problem}",
            flush=True,
        )
    return records


def wait_for_two_slots(spark: SparkSession) -> None:
    """Wait until Spark has replaced a lost executor, a minute at most."""
    deadline = time.monotonic() + 60
    while (total_slots(spark) or 0) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)


def report(records: list[dict[str, Any]]) -> None:
    """Print how many runs there were of each fault, and how quickly it was reported."""
    print(
        f"\n{'fault':30} {'runs':>5} {'median':>8} {'longest':>8}   from the fault to run()'s end"
    )
    for fault in [*INSIDE, *OUTSIDE]:
        seconds = [record["seconds"] for record in records if record["fault"] == fault]
        if seconds:
            middle, longest = statistics.median(seconds), max(seconds)
            print(f"{fault:30} {len(seconds):5} {middle:7.2f}s {longest:7.2f}s")
    wrong = [record for record in records if not record["right"]]
    left = [record for record in records if record["left"]]
    print(
        f"{len(records)} runs: {len(wrong)} with a wrong cause, {len(left)} left something behind"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write the records to")
    options = parser.parse_args()
    os.environ["PYSPARK_PYTHON"] = sys.executable
    processes.guard(TEMPORARY)
    session = (
        SparkSession.builder.master("local-cluster[2,1,1024]")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.log.level", "OFF")
        # Executors are killed on purpose; none may be left out for it.
        .config("spark.deploy.maxExecutorRetries", "-1")
        .getOrCreate()
    )
    HorovodRunner(np=2).run(lambda: None)
    found = soak(options.runs, options.seed, session)
    report(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    session.stop()
    sys.exit(any(record["left"] or not record["right"] for record in found))
