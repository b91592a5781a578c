"""Scripts as they run from a shell, on ranks of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import (
    ArgumentTypeError,
    ArgumentValueError,
    ConfigurationError,
    HorovodRunner,
    WorkerFailedError,
)
from horovodrunner.flows.rundir.reading import read_run
from tests import processes
from tests.waiting import wait_for_line

FACTS = """
# -*- coding: latin-1 -*-
import inspect, json, multiprocessing, os, pickle, sys, threading
from pathlib import Path

import beside

class Net:
    "\xe4"

def double(number):
    return 2 * number

def facts():
    main = sys.modules["__main__"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        doubled = pool.map(double, [1])
    return {
        "argv": sys.argv,
        "orig_argv": sys.orig_argv[1:],
        "first": sys.path[0],
        "names": [__name__, __file__, __package__, repr(__spec__), __doc__, main.__file__],
        "loader": [type(__loader__).__name__, __loader__.name],
        "repr": repr(main),
        "source": inspect.getsource(Net),
        "pickled": type(pickle.loads(pickle.dumps(Net()))) is main.Net is Net,
        "doubled": doubled,
        "data": Path(__file__).with_name("data.txt").read_text(),
        "here": os.getcwd(),
        "beside": beside.__file__,
        "thread": threading.current_thread() is threading.main_thread(),
    }

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(facts()))
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A directory with a script and what it needs."""
    directory = tmp_path / "pröject"
    (directory / "pkg").mkdir(parents=True)
    (directory / "facts.py").write_text(FACTS.lstrip(), "latin-1")
    (directory / "beside.py").write_text("def fail():\n    raise ValueError('too large')\n")
    (directory / "data.txt").write_text("data")
    (directory / "pkg" / "__init__.py").write_text("print('the package')\n")
    (directory / "pkg" / "sub.py").write_text("value = 7\n")
    (directory / "pkg" / "__main__.py").write_text("from . import sub\nprint('main', sub.value)\n")
    (directory / "pkg" / "train.py").write_text(
        "import sys\nfrom .sub import value\nif __name__ == '__main__':\n"
        "    print(value, sys.argv, __package__, __spec__.name, sys.path[0])\n"
    )
    return directory


def test_a_script_finds_what_it_finds_from_a_shell(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(code.parent)
    script = f"{code.name}/facts.py"
    plain, here = code.parent / "plain", code.parent / "here"
    processes.run([sys.executable, script, str(plain), "3", "0.5"], check=True)
    result = HorovodRunner(np=-1).run_script(script, here, 3, 0.5)
    assert result is None
    texts = [path.read_text() for path in (plain, here)]
    expected, found = (json.loads(text.replace(str(plain), str(here))) for text in texts)
    assert found == expected
    assert found["names"][0] == "__main__"


def test_a_module_runs_as_python_m_does(
    code: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(code)
    printed = []
    for arguments in (("pkg.train", "-x"), ("pkg",)):
        done = processes.run([sys.executable, "-m", *arguments], capture_output=True, check=True)
        HorovodRunner(np=-1).run_script("-m", *arguments)
        lines = re.findall(r"\[0\]<stdout>:(.*)", capfd.readouterr().out)
        assert lines == done.stdout.splitlines()
        printed += lines
    assert printed[-1] == "main 7"


EXITS = """
import os, signal, sys
import beside
kind = sys.argv[1]
if kind == "raises":
    beside.fail()
elif kind == "text":
    sys.exit("no data")
elif kind == "code":
    sys.exit(3)
elif kind == "well":
    sys.exit(0)
elif kind == "gone":
    os._exit(5)
elif kind == "gone well":
    os._exit(0)
elif kind in ("again", "again and out") and "AGAIN" not in os.environ:
    os.environ["AGAIN"] = "1"
    os.execv(sys.executable, sys.orig_argv)
elif kind == "again and out":
    sys.exit(9)
elif kind == "killed":
    os.kill(os.getpid(), signal.SIGTERM)
elif kind == "usage":
    import argparse
    argparse.ArgumentParser().parse_args(["--no-such-option"])
"""


@pytest.mark.parametrize(
    ("kind", "code_of_command", "told"),
    [
        ("well", 0, ""),
        ("raises", 1, "failed: ValueError: too large"),
        ("text", 1, "exits.py called sys.exit: SystemExit: no data"),
        ("code", 3, "exits.py called sys.exit: SystemExit: 3"),
        ("gone", 5, "exit code 5"),
        ("gone well", 0, ""),
        ("again", 0, ""),
        ("again and out", 9, "exit code 9"),
        ("killed", 143, "ended by SIGTERM"),
        ("usage", 2, "(unrecognized arguments: --no-such-option)"),
    ],
)
def test_the_command_leaves_as_the_rank_does(
    kind: str, code_of_command: int, told: str, code: Path
) -> None:
    script = code / "exits.py"
    script.write_text(EXITS)
    done = run("-np", "-1", "--", str(script), kind)
    assert done.returncode == code_of_command
    last = done.stderr.splitlines()[-1:]
    assert last[:1] == ([] if not told else [last[0]])
    assert told in "".join(last)
    assert done.stderr.count("Traceback") == (kind == "raises")
    if kind == "raises":
        assert f'[0]<stderr>:  File "{script}", line 6, in <module>' in done.stderr
        assert "[0]<stderr>:    beside.fail()" in done.stderr
        assert "horovodrunner/" not in done.stderr
    if kind == "text":
        assert "[0]<stderr>:no data" in done.stderr


def test_the_error_has_the_scripts_frames_alone(code: Path) -> None:
    script = code / "exits.py"
    script.write_text(EXITS)
    with pytest.raises(WorkerFailedError) as caught:
        HorovodRunner(np=-1).run_script(script, "raises")
    frames = re.findall(r'File "(.*)", line', caught.value.traceback)
    assert frames == [str(script), str(code / "beside.py")]
    assert isinstance(caught.value.__cause__, ValueError)


def run(*words: str, **environ: str) -> processes.CompletedProcess[str]:
    return processes.run(command(*words), capture_output=True, env={**os.environ, **environ})


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "horovodrunner", "run", *words]


@pytest.mark.parametrize(
    ("script", "arguments", "kind", "told"),
    [
        ("missing.py", (), ArgumentValueError, "there is no such file in "),
        (
            "beside.py --epochs 3",
            (),
            ArgumentValueError,
            "run_script('beside.py', '--epochs', '3')",
        ),
        ("pkg/..", (), ArgumentValueError, "a directory without a __main__.py"),
        ("broken.py", (), ConfigurationError, "broken.py, line 2"),
        ("null.py", (), ConfigurationError, "null"),
        ("book.ipynb", (), ArgumentValueError, "jupyter nbconvert"),
        ("beside.py", (["--epochs", 3],), ArgumentTypeError, "a * before it"),
        ("beside.py", (True,), ArgumentTypeError, "'True'"),
        ("beside.py", (None,), ArgumentTypeError, "NoneType"),
        ("beside.py", (b"x",), ArgumentTypeError, "argument 1 of the script, b'x'"),
        ("beside.py", ("a\0",), ArgumentValueError, "null character"),
        ("x" * 5000, (), ArgumentValueError, "cannot be read: File name too long"),
        ("-m", (), ArgumentTypeError, "lacks the module"),
        ("-m", ("pkg.missing",), ArgumentValueError, "no such module"),
        ("-m", ("beside.missing",), ArgumentValueError, "no such module"),
        ("-m", ("pkg/train.py",), ArgumentValueError, "package.module"),
        (3, (), ArgumentTypeError, "script=3"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_launched(
    script: Any,
    arguments: tuple[Any, ...],
    kind: type[Exception],
    told: str,
    code: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(code)
    (code / "broken.py").write_text("x = 1\nprint(\n")
    (code / "null.py").write_bytes(b"x = 1\0\n")
    (code / "book.ipynb").write_text("{}")
    with pytest.raises(kind) as caught:
        HorovodRunner(np=-1).run_script(script, *arguments)
    assert told in str(caught.value)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("script", ["x" * 5000, "pkg/" + "x" * 5000, "/proc/self/mem"])
def test_a_name_that_cannot_be_read_is_refused_by_the_command(script: str) -> None:
    done = run("-np", "-1", "--", script)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_link_to_a_script_finds_what_is_beside_the_script(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "data.txt").write_text("beside the link")
    (tmp_path / "bin" / "train").symlink_to(Path("..", code.name, "imports.py"))
    (code / "imports.py").write_text(
        "import sys, beside\nfrom pathlib import Path\n"
        "print(sys.path[0], __file__, sys.argv, Path(__file__).with_name('data.txt').read_text())\n"
    )
    monkeypatch.chdir(tmp_path)
    plain = processes.run([sys.executable, "bin/train"], capture_output=True, check=True)
    HorovodRunner(np=-1).run_script("bin/train")
    assert re.findall(r"\[0\]<stdout>:(.*)", capfd.readouterr().out) == plain.stdout.splitlines()


def test_keywords_are_explained() -> None:
    runner: Any = HorovodRunner(np=-1)
    with pytest.raises(ArgumentTypeError, match=r"run_script\('train.py', '--batch-size', 8\)"):
        runner.run_script("train.py", batch_size=8)
    with pytest.raises(ArgumentTypeError, match="lacks the script"):
        runner.run_script()


def test_a_code_directory_must_have_the_script(code: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for directory in (other, other / "missing"):
        with pytest.raises(ArgumentValueError, match="code_dir="):
            HorovodRunner(np=-1).run_script(code / "beside.py", code_dir=directory)


def test_the_record_names_the_script_and_hides_secrets(code: Path, tmp_path: Path) -> None:
    runner = HorovodRunner(
        np=-1, run_dir=tmp_path / "runs", checkpoint_dir=tmp_path / "checkpoints"
    )
    words = ("in.csv", "--epochs", 3, "--api-key=Zx81-secret", "-v")
    runner.run_script(code / "beside.py", *words)
    facts = read_run(Path(str(runner.record))).facts
    assert facts["main"] == str(code / "beside.py")
    arguments = facts["arguments"]
    assert arguments["epochs"] == "'3'"
    assert arguments["v"] == "'given'"
    assert arguments["argument 1"] == "'in.csv'"
    assert "Zx81" not in json.dumps(facts)


RESTARTS = """
import os, signal
from horovodrunner import checkpoint
state = checkpoint.latest()
if state is None:
    with checkpoint.save(step=1) as directory:
        (directory / "state").write_text("saved")
print("attempt", checkpoint.attempt, state and (state / "state").read_text())
if checkpoint.attempt == 1:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_script_that_is_lost_goes_on_from_its_checkpoint(code: Path, tmp_path: Path) -> None:
    script = code / "restarts.py"
    script.write_text(RESTARTS)
    options = ["--max-restarts", "1", "--checkpoint-dir", str(tmp_path / "checkpoints")]
    done = run("-np", "-1", *options, str(script))
    assert done.returncode == 0, done.stderr
    assert "[0]<stdout>:attempt 2" in done.stdout
    assert "attempt 2 of 2, because rank 0" in done.stderr
    assert "going on from step 1" in done.stderr


STREAMS = """
import sys, os
print("out", os.environ["RANK"], os.environ.get("HOROVOD_CYCLE_TIME"))
print("err", file=sys.stderr)
"""


def test_streams_stay_apart_and_files_hold_what_each_rank_wrote(code: Path, tmp_path: Path) -> None:
    script, output = code / "streams.py", tmp_path / "output"
    script.write_text(STREAMS)
    (output / "rank.7").mkdir(parents=True)
    (output / "rank.x").mkdir()
    for _ in range(2):
        done = run("-np", "-2", "--output-filename", str(output), "python", str(script))
        assert done.returncode == 0
        lines = sorted(done.stdout.splitlines())
        assert lines == ["[0]<stdout>:out 0 None", "[1]<stdout>:out 1 None"]
        assert sorted(done.stderr.splitlines()) == ["[0]<stderr>:err", "[1]<stderr>:err"]
    files = {str(f.relative_to(output)): f.read_text() for f in output.rglob("*") if f.is_file()}
    assert files == {
        "rank.0/stdout": "out 0 None\n",
        "rank.0/stderr": "err\n",
        "rank.1/stdout": "out 1 None\n",
        "rank.1/stderr": "err\n",
    }
    assert (output / "rank.x").is_dir()


def test_files_that_cannot_be_written_are_a_wrong_command_line(code: Path, tmp_path: Path) -> None:
    (tmp_path / "rank.0").write_text("not a directory")
    script = str(code / "beside.py")
    assert run("-np", "-1", "--output-filename", str(tmp_path), script).returncode == 0
    assert (tmp_path / "rank.0" / "stdout").is_file()
    (tmp_path / "long").symlink_to("/proc/self")
    done = run("-np", "-1", "--output-filename", str(tmp_path / "long"), script)
    assert done.returncode == 2
    assert "what ranks print cannot be written there" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>&1"])
def test_streams_that_are_closed_or_full_end_nothing(closed: str, code: Path) -> None:
    script = code / "prints.py"
    script.write_text("import sys\nprint('out')\nprint('err', file=sys.stderr)\n")
    words = ["sh", "-c", f'exec "$@" {closed}', "sh", *command("-np", "-1", str(script))]
    done = processes.run(words, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_working_directory_that_is_gone_is_needed_by_relative_paths_alone(code: Path) -> None:
    words = ["sh", "-c", 'mkdir gone; cd gone; rmdir ../gone; exec "$@"', "sh"]
    for options in ([], ["--run-dir", "runs"], ["--output-filename", "output"]):
        line = [*words, *command("-np", "-1", *options, str(code / "beside.py"))]
        done = processes.run(line, capture_output=True, cwd=code)
        assert done.returncode == (2 if options else 0), done.stderr
        assert ("the working directory cannot be found" in done.stderr) == bool(options)
        assert "Traceback" not in done.stderr


def test_verbose_tells_each_step_on_standard_error(code: Path) -> None:
    done = run("-np", "-1", "--verbose", "--", str(code / "beside.py"))
    assert done.returncode == 0
    assert f"HorovodRunner: {code / 'beside.py'} and its arguments have, pickled, " in done.stderr
    assert done.stdout == ""


SLOW = """
import signal, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("begun")
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_every_rank(number: signal.Signals, code: Path, tmp_path: Path) -> None:
    """What is left behind fails the test: tests/processes.py looks for it."""
    script, log = code / "slow.py", tmp_path / "log"
    script.write_text(SLOW)
    words = ["env", f"--default-signal={number.name[3:]}"]  # nohup, say, has SIGHUP ignored
    words += command("-np", "-2", str(script), "stubborn")
    with (
        log.open("wb") as output,
        processes.started(words, stdout=output, stderr=processes.STDOUT) as process,
    ):
        wait_for_line("begun(?s:.*)begun", log)
        process.send_signal(number)
        process.send_signal(number)  # a terminal's group and a scheduler send several
        process.wait()
    assert process.returncode == 128 + number
    assert f"error: {number.name}: the run of 2 ranks was stopped; there is no" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_signal_that_comes_again_ends_it_in_any_case(code: Path, tmp_path: Path) -> None:
    script, log = code / "slow.py", tmp_path / "log"
    script.write_text(SLOW)
    with (
        log.open("wb") as output,
        processes.started(
            command("-np", "-2", str(script), "stubborn"), stdout=output, stderr=processes.STDOUT
        ) as process,
    ):
        wait_for_line("begun(?s:.*)begun", log)
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(processes.TimeoutExpired):
                process.wait(0.05)
    assert process.returncode == 130


SAVES = """
import time
from horovodrunner import checkpoint
assert not checkpoint.should_save_now()
print("begun")
while not checkpoint.should_save_now():
    time.sleep(0.01)
with checkpoint.save(step=7) as directory:
    (directory / "state").write_text("state")
"""


def test_sigterm_lets_a_script_save_if_the_command_says_so(code: Path, tmp_path: Path) -> None:
    script, log = code / "saves.py", tmp_path / "log"
    script.write_text(SAVES)
    options = ("--sigterm-grace", "600", "--checkpoint-dir", str(tmp_path / "saved"))
    with (
        log.open("wb") as output,
        processes.started(
            command("-np", "-2", *options, str(script)), stdout=output, stderr=processes.STDOUT
        ) as process,
    ):
        wait_for_line("begun(?s:.*)begun", log)
        process.send_signal(signal.SIGTERM)
        process.wait()
    assert process.returncode == 128 + signal.SIGTERM
    told = "error: SIGTERM: the run of 2 ranks was stopped; the latest checkpoint is that of step 7"
    assert told in log.read_text()


def test_a_reader_that_goes_away_ends_nothing(code: Path, tmp_path: Path) -> None:
    script, done = code / "talks.py", tmp_path / "done"
    script.write_text(
        "import sys\nfor number in range(20_000):\n    print(number)\n"
        f"open({str(done)!r}, 'w').close()\n"
    )
    words = command("-np", "-1", str(script))
    with processes.started(words, stdout=processes.PIPE, stderr=processes.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "[0]<stdout>:0\n"
        process.stdout.close()
        errors = process.stderr.read()
        process.wait()
    assert process.returncode == 0
    assert done.exists()
    assert "Traceback" not in errors


def test_run_by_its_path_the_packages_modules_hide_nothing(code: Path) -> None:
    """As spark-submit runs it."""
    import horovodrunner

    script = code / "imports.py"
    script.write_text(
        "import sys\nassert not [each for each in sys.path if each.endswith('/horovodrunner')]\n"
        "try:\n    import errors\nexcept ModuleNotFoundError:\n    print('not there')\n"
    )
    main = Path(horovodrunner.__file__).with_name("__main__.py")
    words = [sys.executable, str(main), "run", "-np", "-1", "--", str(script)]
    done = processes.run(words, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0]<stdout>:not there\n", done.stderr


def test_the_working_directory_is_no_place_for_imports(code: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "hidden.py").touch()
    script = code / "imports.py"
    script.write_text("try:\n    import hidden\nexcept ImportError:\n    print('not there')\n")
    done = processes.run(
        command("-np", "-1", str(script)), capture_output=True, cwd=tmp_path / "elsewhere"
    )
    assert done.stdout == "[0]<stdout>:not there\n", done.stderr
