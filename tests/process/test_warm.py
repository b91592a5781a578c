"""Workers forked from a process that keeps the frameworks imported.

Every driver is a process of its own, because that process ends with its session.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

PRELUDE = """
    import os, signal, sys, time
    from horovodrunner import HorovodRunner, WorkerFailedError

    def run(main, np=-2, **kwargs):
        return HorovodRunner(np=np, keep_warm=True).run(main, **kwargs)

    def failure(main):
        try:
            run(main)
        except WorkerFailedError as error:
            return error
        raise AssertionError("it did not fail")

    def look():
        early = "torch" in sys.modules
        import numpy, torch
        leaked, torch.leaked = hasattr(torch, "leaked"), True
        place = os.getppid(), os.getpgrp() == os.getpid(), torch.__spec__ is not None
        return [early, leaked, float(numpy.random.rand()), *place, hash("x")]
"""


def drive(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **variables},
    )


def warm_parents() -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "--keep-warm" in (process.info["cmdline"] or [])
    ]


def gone_soon(pids: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not any(process.pid in pids for process in warm_parents()):
            return True
        time.sleep(0.05)
    return False


def test_runs_share_imports_and_nothing_else() -> None:
    done = drive("""
        first, second = run(look), run(look)
        assert first[:2] == second[:2] == [True, False], (first, second)
        assert first[2] != second[2], "numpy's random numbers are those of the run before"
        assert first[-1] == second[-1], "they hash differently"
        assert first[3] == second[3] != os.getpid(), "another process forked the second run's rank"
        assert first[4] and second[4], "the worker does not lead a process group"
        os.environ["OMP_NUM_THREADS"] = "3"  # OpenBLAS starts threads when it is loaded
        other = run(look)
        assert other[0] and other[3] != first[3], "its imports saw another environment"
        print(first[3], other[3])
    """)
    assert done.returncode == 0, done.stderr
    assert gone_soon([int(pid) for pid in done.stdout.splitlines()[-1].split()])


def test_failures_are_told_as_those_of_fresh_processes() -> None:
    done = drive("""
        def fail(how):
            def main():
                import torch
                if how == "raise":
                    raise ValueError("the learning rate is negative")
                if how == "exit":
                    os._exit(4)
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "kill the parent":
                    os.kill(os.getppid(), signal.SIGKILL)
                    time.sleep(600)
            return main

        raised, left = failure(fail("raise")), failure(fail("exit"))
        assert isinstance(raised.__cause__, ValueError), raised
        assert left.exit_code == 4, left
        assert failure(fail("kill")).signal == "SIGKILL"
        began = time.monotonic()
        assert failure(fail("kill the parent")).signal == "SIGKILL"
        assert run(look)[0]
        print(run(look)[3])
    """)
    assert done.returncode == 0, done.stderr
    assert gone_soon([int(done.stdout.split()[-1])])


def test_where_imports_start_threads_workers_are_fresh_processes(tmp_path: Path) -> None:
    tmp_path.joinpath("sitecustomize.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    done = drive(
        """
        first = run(look)
        assert not first[0] and first[4], first
        print("done", first[3])
        """,
        PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path[1:]]),
    )
    assert "done" in done.stdout, done.stderr
    assert gone_soon([int(done.stdout.split()[-1])])


@pytest.mark.slow
def test_executors_keep_their_own_until_the_session_ends() -> None:
    done = drive("""
        from pyspark.sql import SparkSession

        spark = SparkSession.builder.master("local-cluster[2,1,1024]").getOrCreate()
        first, second = run(look, np=2), run(look, np=2)
        assert first[:2] == second[:2] == [True, False]
        assert first[3] == second[3]
        spark.stop()
        print("done", first[3])
    """)
    assert "done" in done.stdout, done.stderr
    assert gone_soon([int(done.stdout.split()[-1])])
