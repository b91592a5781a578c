"""np < 0: real processes on this machine, no Spark."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import horovodrunner
from horovodrunner import ConfigurationError, HorovodRunner, PayloadError, WorkerFailedError
from tests import processes
from tests.process import mains


def run(main: Any, np: int = -2, **kwargs: Any) -> Any:
    return HorovodRunner(np=np).run(main, **kwargs)


def failure(main: Any, np: int = -2, **kwargs: Any) -> WorkerFailedError:
    with pytest.raises(WorkerFailedError) as caught:
        run(main, np, **kwargs)
    return caught.value


def test_rank_0s_value_comes_back_and_every_rank_knows_its_place() -> None:
    def main(offset: int) -> tuple[int, dict[str, str]]:
        names = ["HOROVOD_RANK", "HOROVOD_SIZE", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK"]
        return offset + int(os.environ["RANK"]), {name: os.environ[name] for name in names}

    value, places = run(main, np=-3, offset=40)
    assert value == 40
    assert places == {
        "HOROVOD_RANK": "0",
        "HOROVOD_SIZE": "3",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "3",
        "GROUP_RANK": "0",
    }


def test_the_phases_of_a_run_are_known_and_shown_on_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runner = HorovodRunner(np=-2, profile_launch=True)
    assert not list(runner.phases)
    runner.run(lambda: time.sleep(0.3))
    phases = {phase.name: phase for phase in runner.phases}
    names = ["pickle", "stage start", "worker spawn", "imports", "gather", "rendezvous"]
    names += ["unpickle", "main", "outcome back"]
    assert list(phases) == sorted(names, key=lambda name: phases[name].began)
    assert all(phase.seconds >= 0 for phase in runner.phases)
    assert phases["main"].seconds >= 0.3
    assert phases["worker spawn"].began <= phases["main"].began
    shown = capsys.readouterr().out.partition("HorovodRunner: where the time went:\n")[2]
    assert [line[:14].strip() for line in shown.splitlines()] == ["phase", *phases]


def test_no_spark_is_imported_and_no_jvm_started() -> None:
    script = """
        import sys
        from horovodrunner import HorovodRunner
        print(HorovodRunner(np=-1).run(lambda: "pyspark" in sys.modules))
        import psutil
        assert "pyspark" not in sys.modules, "pyspark was imported on the driver"
        assert not [p for p in psutil.Process().children(recursive=True)]
    """
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def python(script: str, **kwargs: Any) -> processes.CompletedProcess[str]:
    """Run a script as a driver of its own."""
    return processes.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        **kwargs,
    )


@pytest.mark.parametrize("on_rank", [0, 1])
@pytest.mark.parametrize(
    ("how", "summary", "exit_code", "signal_name"),
    [
        ("exception", "ValueError: the learning rate is negative", None, None),
        ("sys.exit", "main called sys.exit: SystemExit: 3", 3, None),
        ("sys.exit text", "main called sys.exit: SystemExit: no data", 1, None),
        ("os._exit", "left with exit code 4", 4, None),
        ("SIGKILL", "ended by SIGKILL, most likely", None, "SIGKILL"),
        ("SIGSEGV", "ended by SIGSEGV", None, "SIGSEGV"),
        ("SIGTERM", "ended by SIGTERM", None, "SIGTERM"),
    ],
)
def test_a_failing_rank_ends_the_run_with_its_own_cause(
    on_rank: int, how: str, summary: str, exit_code: int | None, signal_name: str | None
) -> None:
    error = failure(mains.fail, how=how, on_rank=on_rank)
    assert summary in error.summary
    assert (error.rank, error.exit_code, error.signal) == (on_rank, exit_code, signal_name)
    assert error.host
    assert error.consequences == ()


def test_the_last_words_of_a_process_that_aborts_are_in_the_error() -> None:
    def main() -> None:
        if mains.rank() == 0:
            mains.wait_for_ever()
        lines = "".join(f"line {number} {'x' * 500}\n" for number in range(40))
        os.write(2, lines.encode() + b"terminate called: no memory for the tensor\n")
        os.abort()

    error = failure(main)
    assert error.signal == "SIGABRT"
    last = error.last_lines.splitlines()
    assert last[-1] == "terminate called: no memory for the tensor"
    assert 1 < len(last) <= 10
    assert all(line.startswith("line ") for line in last[:-1])
    assert str(error).endswith(f"What it wrote last to standard error:\n{error.last_lines}")


def test_of_two_processes_that_abort_the_one_that_blames_no_peer_is_the_cause(
    tmp_path: Path,
) -> None:
    """A rank may be seen to have ended before the one whose end it died of."""

    def main(directory: str) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        first, second = Path(directory, "first"), Path(directory, "second")
        if mains.rank() == 0:
            while not second.exists():
                time.sleep(0.01)
            os.write(2, b"  what():  [pair.cc:617] Connection closed by peer [10.0.0.4]:57596\n")
            first.touch()
        else:
            second.touch()
            while not first.exists():
                time.sleep(0.01)
            time.sleep(0.3)
            os.write(2, b"  what():  [pair.cc:144] connect to [10.0.0.3]: No route to host\n")
        os.abort()

    error = failure(main, directory=str(tmp_path))
    assert error.rank == 1
    assert "No route to host" in error.last_lines
    (consequence,) = error.consequences
    assert consequence.startswith("rank 0 ")


def test_the_ranks_own_exception_is_the_cause_and_its_traceback_the_users() -> None:
    error = failure(mains.fail, how="exception", on_rank=1)
    assert isinstance(error.__cause__, ValueError)
    assert "in fail" in error.traceback
    assert "mains.py" in error.traceback
    assert "horovodrunner/processes/worker" not in error.traceback


def test_an_exception_that_does_not_unpickle_is_still_told() -> None:
    class StrangeError(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("strange")

    def main() -> None:
        raise StrangeError(1, 2)

    error = failure(main, np=-1)
    assert "StrangeError: strange" in error.summary
    assert error.__cause__ is None


def test_leaving_with_code_0_is_returning_nothing() -> None:
    assert run(lambda: sys.exit(0), np=-1) is None
    assert failure(lambda: os._exit(0), np=-1).exit_code == 0


def test_workers_that_ignore_sigterm_and_their_children_are_gone(tmp_path: Path) -> None:
    pid_file = str(tmp_path / "pids")
    error = failure(mains.ignore_sigterm_with_children, pid_file=pid_file, on_rank=0)
    assert "failed with children" in error.summary
    pids = [int(pid) for path in tmp_path.iterdir() for pid in path.read_text().split()]
    assert len(pids) == 4
    assert [pid for pid in pids if is_running(pid)] == []


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_child_that_a_successful_main_left_behind_is_ended() -> None:
    assert not is_running(run(mains.leave_a_child, np=-1))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_go_when_the_driver_goes(tmp_path: Path, number: signal.Signals) -> None:
    script = f"""
        from horovodrunner import HorovodRunner
        from tests.process import mains
        HorovodRunner(np=-2).run(
            mains.ignore_sigterm_with_children, pid_file={str(tmp_path / "pids")!r}, on_rank=-1
        )
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with processes.started(command, stdout=processes.DEVNULL, stderr=processes.PIPE) as driver:
        pids: list[int] = []
        while len(pids) < 4:
            time.sleep(0.02)
            pids = [int(pid) for path in tmp_path.iterdir() for pid in path.read_text().split()]
        driver.send_signal(number)
        _, errors = driver.communicate()
    # Whoever had stayed would have failed the block.
    assert not any(is_running(pid) for pid in pids)
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors


def test_all_output_arrives_whole_and_prefixed(capfd: pytest.CaptureFixture[str]) -> None:
    run(mains.print_a_lot, lines=3000, width=200)
    shown = capfd.readouterr().out.splitlines()
    for rank in (0, 1):
        expected = [f"[{rank}]<stdout>:{rank}:{i}:" + "x" * 200 for i in range(3000)]
        assert [line for line in shown if line.startswith(f"[{rank}]<stdout>:")] == expected
        assert f"[{rank}]<stderr>:{rank} done" in shown
        bar = mains.shown_of_a_bar(shown, rank)
        assert bar[-1] == "3000/3000"
        assert len(bar) < 300


@pytest.mark.parametrize("end", ["\n", "\r", ""])
def test_output_is_shown_while_it_happens(end: str, tmp_path: Path) -> None:
    """The driver sees a line that main waits to have been seen."""

    class Watch:
        def __init__(self) -> None:
            self.text = ""

        def write(self, text: str) -> None:
            self.text += text
            if "<stdout>:first line\n" in self.text:
                (tmp_path / "seen").touch()

        def flush(self) -> None:
            pass

    def main(seen: str, end: str) -> bool:
        print("\rother line" * (end != "\n") + "\rfirst line", end=end)
        deadline = time.monotonic() + 30
        while not Path(seen).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return Path(seen).exists()

    import contextlib

    with contextlib.redirect_stdout(Watch()):  # type: ignore[type-var]
        assert run(main, np=-1, seen=str(tmp_path / "seen"), end=end)


def test_the_start_lines_say_the_mode_and_the_size(capsys: pytest.CaptureFixture[str]) -> None:
    run(lambda: None, np=-1)
    lines = capsys.readouterr().out.splitlines()
    assert "1 rank on this machine" in lines[0]
    assert lines[1].startswith("HorovodRunner: the pickled main and its arguments have ")


def test_log_to_driver_from_every_rank_cut_at_4000(capsys: pytest.CaptureFixture[str]) -> None:
    run(mains.log_things)
    lines = capsys.readouterr().out.splitlines()
    assert {"from rank 0", "from rank 1"} <= set(lines)
    long = [line for line in lines if line.startswith("long ")]
    assert long == ["long " + "y" * 3995 + "...(truncated)"] * 2


def test_log_to_driver_outside_a_run_prints_here(capsys: pytest.CaptureFixture[str]) -> None:
    horovodrunner.log_to_driver("here")
    assert capsys.readouterr().out == "here\n"
    with pytest.raises(TypeError, match=r"str\(value\)"):
        horovodrunner.log_to_driver(3)  # type: ignore[arg-type]


def test_the_documented_variables_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "2.5")

    def main() -> list[str | None]:
        return [os.environ.get(n) for n in ("MLFLOW_RUN_ID", "HOROVOD_CYCLE_TIME")]

    assert run(main, np=-1) == ["abc", "2.5"]


@pytest.mark.parametrize("seed", ["", "7", "random"])
def test_all_ranks_and_all_runs_hash_alike(
    seed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", seed)
    facts, others = run(mains.surroundings), run(mains.surroundings, np=-1)
    shown = [line for line in capsys.readouterr().out.splitlines() if "surroundings" in line]
    assert len(shown) == 3
    assert set(shown) == {f"surroundings: {facts}"}
    assert facts == others
    assert facts["hash"] == facts["hash in a child"]
    if seed != "random":
        assert facts["PYTHONHASHSEED"] == seed or "0"


def test_a_hash_seed_with_which_no_python_starts_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "4294967296")
    with pytest.raises(ConfigurationError, match="PYTHONHASHSEED='4294967296' lets no Python"):
        run(mains.surroundings)


@pytest.mark.parametrize("name", ["wheel", "numpy", "code"])
def test_a_module_of_the_users_that_hides_another_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    tmp_path.joinpath(f"{name}.py").touch()
    assert run(mains.own_module, np=-1, name=name) == str(tmp_path / f"{name}.py")


def test_modules_in_the_working_directory_do_not_get_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("queue", "argparse", "cloudpickle", "runpy", "_queue"):
        tmp_path.joinpath(f"{name}.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.syspath_prepend(tmp_path)  # after this process has imported them
    assert run(os.getcwd, np=-1) == str(tmp_path)


def test_every_run_has_fresh_processes() -> None:
    def main() -> tuple[int, bool]:
        import builtins

        seen = hasattr(builtins, "left_over")
        builtins.left_over = True  # type: ignore[attr-defined]
        return os.getpid(), seen

    first, second = run(main, np=-1), run(main, np=-1)
    assert first[0] != second[0]
    assert not first[1]
    assert not second[1]


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "KERAS_BACKEND"])
def test_what_main_sets_before_it_imports_is_seen_by_the_import(variable: str) -> None:
    def main(name: str) -> bool:
        import sys

        early = "torch" in sys.modules
        os.environ[name] = "1"
        import torch  # noqa: F401

        return early

    assert run(main, np=-1, name=variable) is False


def test_what_main_imports_is_imported_while_it_waits() -> None:
    def main() -> bool:
        early = "numpy" in sys.modules
        import numpy  # noqa: F401

        return early

    assert run(main, np=-1) is True


def test_modules_beside_the_driver_script_are_found(tmp_path: Path) -> None:
    (tmp_path / "my_training.py").write_text("def main():\n    return 'found'\n")
    script = f"""
        import sys
        sys.path.append({str(tmp_path)!r})
        import my_training
        from horovodrunner import HorovodRunner
        assert HorovodRunner(np=-1).run(my_training.main) == "found"
    """
    done = python(script)
    assert done.returncode == 0, done.stderr


def test_without_horovod_the_command_that_builds_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").write_text("raise ImportError('not built')")
    script = """
        from horovodrunner import ConfigurationError, HorovodRunner
        try:
            HorovodRunner(np=-2).run(lambda: None)
        except ConfigurationError as error:
            print(error)
    """
    done = python(script, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "not built" in done.stdout
    assert "-m horovodrunner build-horovod" in done.stdout


def test_a_task_that_fails_itself_ends_the_run_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from horovodrunner.placement import rendezvous as horovodrun

    def refuse(*_: Any) -> None:
        raise OSError("no port left")

    monkeypatch.setattr(horovodrun, "Rendezvous", refuse)
    error = failure(lambda: None)
    assert error.rank is None
    assert "its task failed: OSError: no port left" in error.summary
    assert "_lead" in error.traceback


def test_a_result_that_does_not_pickle_is_named() -> None:
    def main() -> Any:
        return {"loss": 0.1, "lock": threading.Lock()}

    with pytest.raises(PayloadError, match=r"main returned\['lock'\] \(_thread.lock\)"):
        run(main, np=-1)


def test_what_leaves_while_it_is_pickled_ends_no_worker() -> None:
    def main() -> Any:
        class Leaves:
            def __reduce__(self) -> Any:
                sys.exit(3)

        return {"x": [Leaves()]}

    with pytest.raises(PayloadError, match=r"main returned\['x'\]\[0\] .*SystemExit: 3"):
        run(main, np=-1)


def test_classes_of_the_notebook_come_back_as_they_are_there(tmp_path: Path) -> None:
    script = tmp_path / "notebook.py"
    script.write_text("""if True:
        import collections, dataclasses, enum, functools, typing
        from horovodrunner import HorovodRunner

        T = typing.TypeVar("T")
        UserId = typing.NewType("UserId", int)

        class Plain:
            __slots__ = ("a", "__hidden")
            def __init__(self): self.a, self.__hidden = 1, 2

        class OneName:
            __slots__ = "a"
            def __init__(self): self.a = 1

        class Child(Plain):
            __slots__ = {"b": "a comment"}
            def __init__(self): super().__init__(); self.b = 3

        class WithDict(Plain):
            __slots__ = ("__dict__", "__weakref__")
            def __init__(self): super().__init__(); self.c = 4

        class Listed(list):
            __slots__ = ("a",)
            def __init__(self): super().__init__([1]); self.a = 1

        class Generic(typing.Generic[T]):
            __slots__ = ("a",)
            def __init__(self): self.a = 1

        class Outer:
            class Inner(Plain):
                __slots__ = ()

        class Row(typing.NamedTuple):
            a: int = 1

        class Colour(enum.Enum):
            RED = 1

        class Remembers:
            @functools.cached_property
            def cached(self): return 1
            @functools.lru_cache
            def a(self): return 1

        Data = dataclasses.make_dataclass("Data", [("a", int, 1)], slots=True)
        Frozen = dataclasses.make_dataclass("Frozen", [("a", int, 1)], slots=True, frozen=True)
        Data.__module__ = Frozen.__module__ = "__main__"

        @functools.lru_cache
        def fibonacci(n: UserId): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

        KINDS = [Plain, OneName, Child, WithDict, Listed, Generic, Outer.Inner, Row,
                 lambda: Colour.RED, Remembers, Data, Frozen]

        def main(sent):
            made = [kind() for kind in KINDS]
            assert not hasattr(made[0], "__dict__")
            assert [type(each) for each in made] == [type(each) for each in sent]
            return made, sent, fibonacci(30), UserId

        made, sent, number, _ = HorovodRunner(np=-1).run(main, sent=[kind() for kind in KINDS])
        assert number == 832040
        for values in made, sent:
            for value, kind in zip(values, KINDS):
                assert type(value) is type(kind()), (value, kind)
                assert getattr(value, "a", 1) == 1 or value.a() == 1
        assert values[2].b + values[3].c + values[2]._Plain__hidden == 9
        print("all of them")
    """)
    done = processes.run([sys.executable, str(script)], capture_output=True)
    assert "all of them" in done.stdout, done.stdout + done.stderr


def test_only_rank_0s_result_has_to_pickle() -> None:
    def main() -> Any:
        return "fine" if mains.rank() == 0 else threading.Lock()

    assert run(main) == "fine"


def test_a_large_result_comes_back_whole_and_its_file_is_gone() -> None:
    def main() -> Any:
        import numpy as np

        array = np.arange(10_000_000)
        return {"array": array, "every other": array[::2], "bytes": os.urandom(1) * 80_000_000}

    def open_files() -> set[str]:
        return {link for fd in FDS.iterdir() if (link := _target(fd))}

    before = open_files()
    value = run(main, np=-1)
    assert value["bytes"] == value["bytes"][:1] * 80_000_000
    array = value["array"]
    assert (array[::100_000] == range(0, 10_000_000, 100_000)).all()
    array[5] = value["every other"][3] = 0
    assert array.sum() == 10_000_000 * 9_999_999 // 2 - 5
    assert not [name for name in open_files() - before if "horovodrunner-result" in name]


FDS = Path("/proc/self/fd")


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:  # that of the listing itself
        return ""


def test_a_result_that_rank_0s_host_has_no_room_for_is_refused() -> None:
    def main() -> bytearray:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        return bytearray(2_000_000)

    expected = r"main returned cannot be kept .*\[Errno 27\] File too large\. .* return less"
    with pytest.raises(PayloadError, match=expected):
        run(main, np=-1)


def test_a_large_argument_arrives_whole() -> None:
    blob = os.urandom(1000) * 20_000
    with pytest.warns(UserWarning, match="the argument 'blob'"):
        assert (
            run(lambda blob: hash(blob) == hash(bytes(blob)) and len(blob), np=-1, blob=blob)
            == 20_000_000
        )


def test_a_worker_that_does_not_leave_is_stopped_and_its_result_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from horovodrunner.processes.task import supervisor

    monkeypatch.setattr(supervisor, "TEARDOWN_SECONDS", 0.5)
    assert run(mains.leave_a_thread, np=-1) == "result"
    assert "still there 0.5 s after main returned" in capsys.readouterr().out


def test_main_may_read_stdin_and_close_its_output() -> None:
    def main() -> str:
        text = sys.stdin.read()
        sys.stdout.close()
        sys.stderr.close()
        return text

    assert run(main, np=-1) == ""


def test_runs_from_two_threads_do_not_disturb_each_other() -> None:
    results: dict[str, Any] = {}

    def one(name: str) -> None:
        results[name] = run(lambda name: (name, os.environ["WORLD_SIZE"]), name=name)

    threads = [threading.Thread(target=one, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"a": ("a", "2"), "b": ("b", "2")}


def test_no_secret_is_on_a_command_line() -> None:
    def main() -> list[str]:
        return psutil.Process().cmdline() + psutil.Process(os.getppid()).cmdline()

    words = " ".join(run(main, np=-1))
    assert "horovodrunner.processes.worker" in words
    assert "token" not in words.lower()
    assert max(len(word) for word in words.split()) < 300


def test_output_of_a_descendant_that_outlives_the_group_does_not_hang_the_run() -> None:
    pid = run(mains.leave_a_child, np=-1, start_new_session=True)
    assert is_running(pid)  # it left our group on purpose: a daemon of the user's
    os.kill(pid, signal.SIGKILL)


def test_a_failure_after_success_elsewhere_still_fails_the_run() -> None:
    def main() -> str:
        if mains.rank() == 1:
            time.sleep(1)
            raise RuntimeError("late")
        return "early"

    assert "late" in failure(main).summary


@pytest.mark.parametrize("quiet", ["", "0", "1"])
def test_what_is_as_it_should_be_can_be_left_out(
    quiet: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOROVODRUNNER_QUIET", quiet)

    def main() -> None:
        print("hello")
        horovodrunner.log_to_driver("message")

    run(main, np=-1)
    shown = capsys.readouterr().out.splitlines()
    assert {"[0]<stdout>:hello", "message"} <= set(shown)
    assert len(shown) == (2 if quiet == "1" else 6)
