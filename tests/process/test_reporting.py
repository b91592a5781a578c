"""Between the end of main and the safe outcome everything of main's may be broken."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import io
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from horovodrunner import (
    HorovodRunner,
    PayloadError,
    WorkerFailedError,
    checkpoint,
    log_to_driver,
)
from tests import processes
from tests.process import breaks


def run(main: Callable[..., Any], np: int = -1, **kwargs: Any) -> Any:
    return HorovodRunner(np=np).run(main, **kwargs)


def failure(main: Callable[..., Any], np: int = -1, **kwargs: Any) -> WorkerFailedError:
    with pytest.raises(WorkerFailedError) as caught:
        run(main, np, **kwargs)
    return caught.value


@pytest.mark.parametrize("what", breaks.BREAKS)
def test_whatever_main_breaks_its_value_and_its_exception_arrive(what: str, tmp_path: Path) -> None:
    directory = str(tmp_path)
    assert run(breaks.break_and_end, what=what, directory=directory, how="return") == "value"
    error = failure(breaks.break_and_end, what=what, directory=directory, how="raise")
    assert error.summary == "ValueError: told"
    assert isinstance(error.__cause__, ValueError) or what in {"no modules", "built-ins"}
    assert 'raise ValueError("told")' in error.traceback


def test_what_is_printed_around_a_redirected_stream_is_shown(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def main() -> None:
        sys.stdout.write("an unfinished line")
        contextlib.redirect_stdout(io.StringIO()).__enter__()

    run(main)
    assert "[0]<stdout>:an unfinished line\n" in capfd.readouterr().out


WITHOUT_STREAMS = """
from pathlib import Path
from horovodrunner import HorovodRunner

def main():
    print("shown nowhere")
    return "value"

def fails():
    raise ValueError("told")

said = [HorovodRunner(np=-2).run(main)]
try:
    HorovodRunner(np=-1).run(fails)
except Exception as error:
    said.append(error.summary)
Path("said").write_text(", ".join(said))
"""


def test_a_driver_whose_standard_streams_are_closed_can_run(tmp_path: Path) -> None:
    """The next descriptors that it opens are 0 to 2, which are its workers' streams."""
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    processes.run([*closed, sys.executable, "-c", WITHOUT_STREAMS], cwd=tmp_path, check=True)
    assert (tmp_path / "said").read_text() == "value, ValueError: told"


@pytest.mark.parametrize("by_spark", [True, False])
def test_running_out_of_memory_is_told_with_what_limits_it(by_spark: bool) -> None:
    def main() -> NoReturn:
        if by_spark:  # Spark's Python worker has both, the variable and the limit
            os.environ["PYSPARK_EXECUTOR_MEMORY_MB"] = "512"
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 30_000_000, used + 30_000_000))
        data: list[Any] = []
        while True:
            data.append(bytearray(100_000))

    error = failure(main)
    setting = r"spark\.executor\.pyspark\.memory" if by_spark else r"a limit \(ulimit -v"
    told = (
        rf"MemoryError: \(no message\) \({setting}.* allows .* [\d,]+ MiB of address space .*raise"
    )
    assert re.match(told, error.summary)
    assert "data.append" in error.traceback


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("lose", [os.closerange, breaks.cover])
def test_a_worker_that_cannot_report_says_why(
    lose: Callable[[int, int], object], at_once: bool
) -> None:
    """With all descriptors closed it cannot even see that its task is gone: it ends."""

    def main() -> None:
        lose(3, 5000)
        if not at_once:
            time.sleep(60)

    with pytest.raises(WorkerFailedError) as caught:
        HorovodRunner(np=-1, max_restarts=1).run(main)
    error = caught.value
    assert error.attempts == ()  # another one would end the same way
    assert error.summary.startswith("main closed the descriptors by which the worker process")
    assert "before main returned" not in str(error)
    assert "os.closerange?" in error.last_lines


class _LeavesWhenUnpickled:
    def __reduce__(self) -> Any:
        return os._exit, (5,)


class _LeavesWhenPickled:
    def __reduce__(self) -> NoReturn:
        os._exit(5)


class _RaisesWhenPickled:
    def __init__(self, problem: type[BaseException]) -> None:
        self.problem = problem

    def __reduce__(self) -> NoReturn:
        raise self.problem("told")


@pytest.mark.parametrize("problem", [SystemExit, KeyboardInterrupt])
def test_a_value_that_leaves_when_it_is_pickled_is_told(problem: type[BaseException]) -> None:
    with pytest.raises(PayloadError, match=f"the value that main returned .*{problem.__name__}"):
        run(lambda: _RaisesWhenPickled(problem))


class _IsPickled:
    def __init__(self) -> None:
        self.begun, self.interrupted = threading.Event(), threading.Event()

    def __reduce__(self) -> Any:
        self.begun.set()
        self.interrupted.wait()
        return str, ("value",)


def test_a_watchdog_of_main_does_not_interrupt_the_report() -> None:
    def main() -> object:
        value = _IsPickled()

        def interrupt() -> None:
            value.begun.wait()
            _thread.interrupt_main()
            value.interrupted.set()

        threading.Thread(target=interrupt).start()
        return value

    assert run(main) == "value"


def test_when_the_process_left_is_said_as_far_as_it_is_known() -> None:
    def summary(main: Callable[..., Any], **kwargs: Any) -> str:
        return failure(main, **kwargs).summary

    left = "the worker process left with exit code 5 "
    assert summary(lambda: os._exit(5)) == left + "before main returned (os._exit?)"
    unpickled = summary(lambda x: None, x=_LeavesWhenUnpickled())
    assert unpickled == left + "before main was called"
    ended = left + "after main had ended, before it could be reported how"
    assert summary(_LeavesWhenPickled) == ended

    def garbles() -> None:
        numbers = sorted(int(path.name) for path in Path("/proc/self/fd").iterdir())
        _, report, *_ = [number for number in numbers if number >= 900]
        os.write(report, b"\xff" * 100)
        os._exit(5)

    assert summary(garbles).startswith(left + "after a report that cannot be read (a header of ")


def test_an_exception_of_megabytes_arrives_from_every_rank() -> None:
    def main() -> NoReturn:
        raise ValueError("\U0001f600" * 350_000)

    error = failure(main, np=-2)
    assert error.summary.startswith("ValueError: \U0001f600")
    assert error.summary.endswith("...(truncated: 350,000 characters)")
    assert isinstance(error.__cause__, ValueError)
    assert len(str(error)) < 100_000


def test_an_exception_that_leaves_when_it_is_unpickled_is_told() -> None:
    class LeavingError(Exception):
        def __init__(self, *arguments: int) -> None:
            if len(arguments) != 2:
                sys.exit(3)
            super().__init__("told")

    def main() -> NoReturn:
        raise LeavingError(1, 2)

    error = failure(main)
    assert error.summary == "LeavingError: told"
    assert error.__cause__ is None


# A child of main.

FALLS_OUT: dict[str, tuple[Callable[[], object], int]] = {
    "returns": (lambda: None, 0),
    "sys.exit(0)": (lambda: sys.exit(0), 0),
    "sys.exit(7)": (lambda: sys.exit(7), 7),
    "sys.exit text": (lambda: sys.exit("the child's own text"), 1),
    "raises": (breaks.broken, 1),
}


def _child(act: Callable[[], object]) -> int:
    """Fork; the child acts and goes on as main does: out of it. Give its exit code."""
    if pid := os.fork():  # noqa: TID251 -- in a rank
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    act()
    return -1


@pytest.mark.parametrize("how", FALLS_OUT)
def test_a_child_that_falls_out_of_main_ends_as_one_of_a_script_does(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def main(directory: str) -> int:
        atexit.register(lambda: Path(directory, str(os.getpid())).touch())
        code = _child(lambda: [sys.stdout.write("unfinished"), FALLS_OUT[how][0]()])
        if code < 0:
            return -1
        assert len(list(Path(directory).iterdir())) == 1, "the child called no exit functions"
        return code

    assert run(main, directory=str(tmp_path)) == FALLS_OUT[how][1]
    assert len(list(tmp_path.iterdir())) == 2
    shown = capfd.readouterr().out
    assert shown.count("[0]<stdout>:unfinished\n") == 1
    assert ("RuntimeError: this is main's own" in shown) == (how == "raises")
    assert ("the child's own text" in shown) == (how == "sys.exit text")


def test_a_grandchild_and_a_child_of_a_thread_do_not_report() -> None:
    def main() -> list[int]:
        codes = [_child(lambda: sys.exit(_child(lambda: sys.exit(5))))]
        if codes[0] < 0:
            return []
        thread = threading.Thread(target=lambda: codes.append(_child(lambda: sys.exit(6))))
        thread.start()
        thread.join()
        return codes

    assert run(main)[0] == 5


def test_a_child_has_none_of_the_descriptors_and_its_task_waits_for_none(tmp_path: Path) -> None:
    def main() -> tuple[int, int]:
        open_here = len(list(Path("/proc/self/fd").iterdir()))
        read, write = os.pipe()
        if not (pid := os.fork()):  # noqa: TID251 -- in a rank
            os.setsid()  # so that nobody ends it
            os.write(write, str(len(list(Path("/proc/self/fd").iterdir()))).encode())
            os.close(1)
            os.close(2)
            time.sleep(60)
        open_there = int(os.read(read, 100))
        assert open_there == open_here + 2 - 5, f"{open_there} there, {open_here} here"
        return pid, open_there

    pid, _ = run(main)
    os.kill(pid, signal.SIGKILL)


def test_a_child_that_uses_the_run_leaves_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> str:
        with checkpoint.save(step=1) as directory:
            (directory / "state").write_text("whole")
            if _child(lambda: sys.exit(0)) < 0:
                return "not reached"
            if _child(lambda: None) < 0:
                return "the child's own value"
            (directory / "more").write_text("whole")

        def tell() -> None:
            log_to_driver("from the child")
            checkpoint.latest()

        if _child(tell) < 0:
            return "the child's own value"
        found = checkpoint.latest()
        return "" if found is None else " ".join(sorted(path.name for path in found.iterdir()))

    runner = HorovodRunner(np=-1, checkpoint_dir=tmp_path / "kept")
    runner.run(main)
    (saved,) = runner.checkpoints
    assert {"more", "state"} <= {path.name for path in Path(saved.path).iterdir()}
    assert "from the child" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_of_multiprocessing_do_not_report(method: str) -> None:
    def main() -> list[int]:
        import multiprocessing  # noqa: TID251 -- in a rank

        with multiprocessing.get_context(method).Pool(2) as pool:
            return pool.map(abs, [-1, -2])

    assert run(main) == [1, 2]


def test_names_in_mains_frames_may_be_any_object() -> None:
    """They are looked at once a second, by the thread that also watches for the task's end."""
    assert run(breaks.run_in_a_module_without_a_name) == "value"
