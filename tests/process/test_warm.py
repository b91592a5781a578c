"""Workers forked from a process that keeps the frameworks imported.

Every driver is a process of its own, because that process ends with its session.
"""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from tests import processes
from tests.process.notebooks import run_notebook
from tests.waiting import wait_until

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


def drive(script: str, **variables: str) -> processes.CompletedProcess[str]:
    return processes.run(
        [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(script)],
        capture_output=True,
        env={**os.environ, **variables},
    )


def warm_parents() -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "--keep-warm" in (process.info["cmdline"] or [])
    ]


def wait_until_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(process.pid in pids for process in warm_parents()))


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
    wait_until_gone([int(pid) for pid in done.stdout.splitlines()[-1].split()])


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
        assert failure(fail("kill the parent")).signal == "SIGKILL"
        assert run(look)[0]
        print(run(look)[3])
    """)
    assert done.returncode == 0, done.stderr
    wait_until_gone([int(done.stdout.split()[-1])])


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
    wait_until_gone([int(done.stdout.split()[-1])])


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
    wait_until_gone([int(done.stdout.split()[-1])])


LOOKS = """
    import os, sys
    early = "numpy" in sys.modules
    import numpy

    def look():
        return {version}, early, os.getppid()
"""


def test_an_edited_module_is_imported_anew_and_scripts_are_not_kept_warm(tmp_path: Path) -> None:
    module = tmp_path / "mymodule.py"
    module.write_text(textwrap.dedent(LOOKS).format(version=1))
    done = drive(
        f"""
        from pathlib import Path
        sys.path.insert(0, {str(tmp_path)!r})
        import mymodule

        def parent_of_default(**options):
            return HorovodRunner(np=-2, **options).run(mymodule.look)[2]

        assert parent_of_default() == os.getpid(), "a script's workers are forks"
        first = run(mymodule.look, np=-2)
        module = Path({str(module)!r})
        module.write_text(module.read_text().replace("return 1,", "return 22,"))
        second = run(mymodule.look, np=-2)
        assert first[:2] == (1, True) and second[:2] == (22, True), (first, second)
        assert first[2] == second[2] != os.getpid()
        sys.ps1 = ">>> "  # as at a prompt
        assert parent_of_default() == first[2]
        assert parent_of_default(keep_warm=False) == os.getpid()
        print(first[2])
        """
    )
    assert done.returncode == 0, done.stderr
    wait_until_gone([int(done.stdout.split()[-1])])


def test_a_session_keeps_two_processes_at_most() -> None:
    done = drive("""
        import psutil

        def parent_with(number):
            os.environ["OMP_NUM_THREADS"] = number
            return run(lambda: (numpy.__name__, os.getppid()), np=-1)[1]

        import numpy
        oldest, older = parent_with("1"), parent_with("2")
        assert parent_with("1") == oldest, "two may stay"
        newest = parent_with("3")
        psutil.Process(oldest).wait(60) if psutil.pid_exists(oldest) else None
        assert parent_with("2") == older and parent_with("3") == newest
        print(older, newest)
    """)
    assert done.returncode == 0, done.stderr
    wait_until_gone([int(pid) for pid in done.stdout.splitlines()[-1].split()])


def test_what_the_first_optimizer_imports_is_there_for_a_main_of_a_module(tmp_path: Path) -> None:
    tmp_path.joinpath("mytraining.py").write_text(
        textwrap.dedent("""
        import sys
        early = {"torch._dynamo", "horovod.torch"} & sys.modules.keys()
        import torch
        import horovod.torch as hvd

        def fit():
            model = torch.nn.Linear(2, 1)
            torch.optim.SGD(model.parameters(), lr=0.1)
            return sorted(early)
        """)
    )
    done = drive(
        """
        from mytraining import fit
        assert run(fit) == ["horovod.torch", "torch._dynamo"]
        """,
        PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path[1:]]),
    )
    assert done.returncode == 0, done.stderr


def test_a_notebooks_second_run_is_warm(tmp_path: Path) -> None:
    cell = """
        import os
        from horovodrunner import HorovodRunner

        def main():
            import sys
            early = "numpy" in sys.modules
            import numpy
            return early, os.getppid()

        first, second = (HorovodRunner(np=-2).run(main) for _ in range(2))
        assert first == second and first[0] and first[1] != os.getpid(), (first, second)
        assert HorovodRunner(np=-1, keep_warm=False).run(main)[1] == os.getpid()
        first[1]
    """
    outputs = run_notebook(tmp_path, cell)
    wait_until_gone([int(outputs[-1].data["text/plain"])])


def test_who_has_connected_is_served_before_a_process_ends() -> None:
    done = drive("""
        import socket, threading
        from pathlib import Path
        import numpy

        def connections():
            names = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
            return [name for name in names if f"-{os.getpid()}-" in name]

        def parent():
            return run(lambda: (numpy.__name__, os.getppid()), np=-1)[1]

        first = parent()
        while len(connections()) > 1:
            time.sleep(0.01)  # it has forgotten its worker
        os.kill(first, signal.SIGSTOP)
        told_to_end = socket.socket(socket.AF_UNIX)
        told_to_end.connect("\\0" + connections()[0].removeprefix("@"))
        told_to_end.sendall(b"r")
        found = []
        thread = threading.Thread(target=lambda: found.append(parent()))
        thread.start()
        while len(connections()) < 3:
            time.sleep(0.01)  # the run's worker is asked for
        os.kill(first, signal.SIGCONT)
        thread.join()
        assert found == [first], (found, first)
        print(first)
    """)
    assert done.returncode == 0, done.stderr
    wait_until_gone([int(done.stdout.split()[-1])])


def test_a_process_that_holds_a_users_module_does_not_fork(tmp_path: Path) -> None:
    tmp_path.joinpath("sitecustomize.py").write_text("import of_the_user\n")
    tmp_path.joinpath("of_the_user.py").write_text("VERSION = 1\n")
    done = drive(
        """
        def look():
            import numpy, of_the_user
            return of_the_user.VERSION, os.getppid()

        first = run(look, np=-1)
        with open(sys.modules["of_the_user"].__file__, "w") as file:
            file.write("VERSION = 22\\n")
        second = run(look, np=-1)
        assert (first[0], second[0]) == (1, 22), (first, second)
        assert first[1] == second[1] != os.getpid()
        memory = open(f"/proc/{first[1]}/maps").read()
        assert "numpy" not in memory, "what it cannot give on it holds all the same"
        print(first[1])
        """,
        PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path[1:]]),
    )
    assert done.returncode == 0, done.stderr
    wait_until_gone([int(done.stdout.split()[-1])])
