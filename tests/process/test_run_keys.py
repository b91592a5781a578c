"""Runs under a key with real ranks: done once, gone on with, taken over."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sparkdl

from horovodrunner import (
    ArgumentTypeError,
    ArgumentValueError,
    ConfigurationError,
    HorovodRunner,
    PayloadError,
    StartTimeoutError,
    WorkerFailedError,
    checkpoint,
    metrics,
)
from tests import processes
from tests.waiting import wait_for_line, wait_until


def train(log: str, epochs: int, wait_in: int = -1, fail_file: str = "") -> dict[str, Any]:
    """Save a checkpoint after each epoch, and note each; wait for a file, or fail, in one."""
    latest = checkpoint.latest()
    start = 0 if latest is None else latest.step + 1
    for epoch in range(start, epochs):
        if epoch == wait_in:
            wait_until(Path(f"{log}.go").exists)
        if epoch == wait_in + 1 and Path(fail_file).is_file():
            raise ValueError("no luck")
        with checkpoint.save(step=epoch) as directory:
            (directory / "epoch.txt").write_text(str(epoch))
        with Path(log).open("a") as file:
            file.write(f"epoch {epoch}\n")
    return {"start": start, "weights": np.arange(100_000), "epochs": epochs}


def epochs_in(log: Path) -> list[int]:
    return [int(each) for each in re.findall("epoch (.*)", log.read_text())]


def runner_in(directory: Path, **options: Any) -> HorovodRunner:
    options = {"np": -1, "progress": False, "checkpoint_dir": directory / "checkpoints", **options}
    return HorovodRunner(run_dir=directory / "runs", **options)


def key_files(directory: Path) -> list[Path]:
    return sorted((directory / "runs" / "keys").glob("*/*"))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_a_run_that_was_done_is_not_done_again(
    tmp_path: Path, log: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runner = runner_in(tmp_path)
    first = runner.run(train, run_key="nightly/1", log=str(log), epochs=2)
    record, saved = runner.record, runner.checkpoints
    assert record is not None
    capfd.readouterr()
    again = runner_in(tmp_path)
    second = again.run(train, run_key="nightly/1", log=str(log), epochs=2)
    assert second.keys() == first.keys()
    assert (second["weights"] == first["weights"]).all()
    assert epochs_in(log) == [0, 1]
    said = capfd.readouterr().out
    assert re.fullmatch(
        r"HorovodRunner: the run 'nightly/1' has ended on .* UTC: nothing is launched, and its "
        rf"value is from the record {Path(record).name}\n",
        said,
    )
    assert (again.record, again.checkpoints) == (record, saved)
    assert saved[-1].step == 1  # the newest one wins
    # another key has nothing of it
    assert runner.run(train, run_key="nightly/2", log=str(log), epochs=1)["start"] == 0
    # and a run without one neither
    assert runner.run(train, log=str(log), epochs=1)["start"] == 0
    assert [Path(each.path).parent for each in runner.checkpoints] == [tmp_path / "checkpoints"]


def test_a_run_that_failed_goes_on(tmp_path: Path, log: Path) -> None:
    bad = tmp_path / "bad"
    bad.touch()
    arguments: dict[str, Any] = {"log": str(log), "epochs": 4, "wait_in": 1, "fail_file": str(bad)}
    Path(f"{log}.go").touch()
    with pytest.raises(WorkerFailedError, match="no luck"):
        runner_in(tmp_path).run(train, run_key="k", **arguments)
    bad.unlink()
    assert runner_in(tmp_path, np=-2).run(train, run_key="k", **arguments)["start"] == 2
    (ended,) = [each for each in key_files(tmp_path) if each.name.startswith("ended")]
    assert json.loads(ended.read_text())["how"] == "WorkerFailedError"  # and not with what text
    assert [each.name for each in key_files(tmp_path) if each.name.startswith("beat")] == [
        "beat-000002"
    ]


def test_another_call_under_a_key_is_refused(tmp_path: Path, log: Path) -> None:
    runner = runner_in(tmp_path)
    runner.run(train, run_key="k", log=str(log), epochs=1)
    with pytest.raises(ArgumentValueError, match=r"run_key='k' .*: epochs was 1, is 2\. Use"):
        runner.run(train, run_key="k", log=str(log), epochs=2)

    def another(log: str, epochs: int) -> None: ...

    with pytest.raises(ArgumentValueError, match=r"main was train, is .*another"):
        runner.run(another, run_key="k", log=str(log), epochs=1)
    assert epochs_in(log) == [0]
    found = runner.run(train, run_key="k", on_change="rerun", log=str(log), epochs=2)
    assert found["start"] == 0
    with pytest.raises(ArgumentValueError, match="epochs was 2, is 1"):
        runner.run(train, run_key="k", log=str(log), epochs=1)
    # unchanged: there is nothing to do again
    again = runner.run(train, run_key="k", on_change="rerun", log=str(log), epochs=2)
    assert again["epochs"] == 2
    assert epochs_in(log) == [0, 0, 1]


def test_what_every_rank_returned_is_kept_if_it_is_wanted(tmp_path: Path) -> None:
    def main() -> Any:
        rank = int(os.environ["RANK"])
        return {"rank": rank, "weights": np.full(100_000, rank)}

    runner = runner_in(tmp_path, np=-3, results="all")
    runner.run(main, run_key="k")
    again = runner_in(tmp_path, np=-3, results="all")
    assert again.run(main, run_key="k")["rank"] == 0
    assert [each["rank"] for each in again.results] == [0, 1, 2]
    assert again.results[2]["weights"].tolist() == [2] * 100_000
    (stored,) = [each for each in key_files(tmp_path) if each.name.endswith("rank-1.bin")]
    stored.write_bytes(b"x" * stored.stat().st_size)
    last = runner_in(tmp_path, np=-3, results="all")
    last.run(main, run_key="k")
    assert last.results[2]["rank"] == 2
    with pytest.raises(PayloadError, match=r"rank-1\.bin does not have the content .*Delete"):
        last.results[1]
    # of a run that kept rank 0's value alone
    runner_in(tmp_path, np=-3).run(main, run_key="one")
    last.run(main, run_key="one")
    with pytest.raises(IndexError, match="rank 0's value"):
        last.results[1]


def test_a_script_is_not_run_again_unless_its_code_is_another(tmp_path: Path, log: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "helper.py").write_text("text = 'first'")
    script = code / "train.py"
    script.write_text(
        f"import sys, helper\nopen({str(log)!r}, 'a').write(helper.text + sys.argv[1] + ' ')\n"
    )
    runner = runner_in(tmp_path)
    for _ in range(2):
        runner.run_script(script, "-x", run_key="k")
    assert log.read_text() == "first-x "
    with pytest.raises(ArgumentValueError, match=r"run_key='k'.*y is new"):
        runner.run_script(script, "-y", run_key="k")
    for words in (["-x", "given"], ["-x", ""]):
        with pytest.raises(ArgumentValueError, match=r"run_key='k'.*x was True, is"):
            runner.run_script(script, *words, run_key="k")
    (code / "helper.py").write_text("text = 'second'")
    with pytest.raises(ArgumentValueError, match=r"the code of helper\.py has changed"):
        runner.run_script(script, "-x", run_key="k")
    runner.run_script(script, "-x", run_key="k", on_change="rerun")
    command = [sys.executable, "-m", "horovodrunner", "run", "-np", "-1"]
    command += ["--run-dir", str(tmp_path / "runs"), "--run-key", "k", "--", str(script), "-x"]
    done = processes.run(command, capture_output=True, text=True)
    assert (done.returncode, log.read_text()) == (0, "first-x second-x "), done.stderr
    assert "nothing is launched" in done.stdout + done.stderr


def test_words_of_a_script_are_compared_one_by_one(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    runner_in(tmp_path).run_script(script, "--names", "a", "b", run_key="k")
    with pytest.raises(ArgumentValueError, match="names was 'a b', is"):
        runner_in(tmp_path).run_script(script, "--names", "a b", run_key="k")


def test_the_files_of_a_run_that_was_done_stay(tmp_path: Path) -> None:
    script, output = tmp_path / "code" / "train.py", tmp_path / "output"
    script.parent.mkdir()
    script.write_text("print('done')")
    command = [sys.executable, "-m", "horovodrunner", "run", "-np", "-1", "--run-key", "k"]
    command += ["--run-dir", str(tmp_path / "runs"), "--output-filename", str(output), str(script)]
    for _ in range(2):
        assert processes.run(command, capture_output=True).returncode == 0
        assert (output / "rank.0" / "stdout").read_text() == "done\n"


def test_no_secret_is_kept_of_a_failed_run(tmp_path: Path) -> None:
    def main(password: str) -> None:
        raise ValueError(os.environ["MY_TOKEN"] + password)

    runner = runner_in(tmp_path, environment={"MY_TOKEN": "Zx81"})
    with pytest.raises(WorkerFailedError):
        runner.run(main, run_key="k", password="Yw72")
    kept = b"".join(each.read_bytes() for each in key_files(tmp_path))
    assert b"WorkerFailedError" in kept
    assert b"Zx81" not in kept
    assert b"Yw72" not in kept


def test_a_run_that_on_report_ends_has_no_value(tmp_path: Path) -> None:
    def main() -> int:
        metrics.report(loss=float("nan"))
        return 1

    def refuse(point: Any) -> None:
        raise ArithmeticError("no number")

    for _ in range(2):
        with pytest.raises(ArithmeticError):
            runner_in(tmp_path, on_report=refuse).run(main, run_key="k")
    assert not [each for each in key_files(tmp_path) if each.name.startswith("value")]


def test_a_damaged_value_is_made_again(
    tmp_path: Path, log: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runner = runner_in(tmp_path)
    runner.run(train, run_key="k", log=str(log), epochs=2)
    (value,) = [each for each in key_files(tmp_path) if each.suffix == ".bin"]
    value.write_bytes(value.read_bytes()[:-1] + b"?")
    assert runner.run(train, run_key="k", log=str(log), epochs=2)["start"] == 2
    assert f"{value}, does not have the content that was stored" in capfd.readouterr().out
    assert runner.run(train, run_key="k", log=str(log), epochs=2)["start"] == 2
    assert epochs_in(log) == [0, 1]


def test_a_value_that_does_not_pickle_is_no_value(tmp_path: Path) -> None:
    def main() -> Any:
        checkpoint.save(step=1)
        return threading.Lock()

    for _ in range(2):
        with pytest.raises(PayloadError, match="lock"):
            runner_in(tmp_path).run(main, run_key="k")
    assert not [each for each in key_files(tmp_path) if each.name.startswith("value")]


def test_what_cannot_work_is_refused_before(tmp_path: Path, log: Path) -> None:
    runner = runner_in(tmp_path)
    for key in ("", " ", "a\nb", "x" * 201):
        with pytest.raises(ArgumentValueError, match="run_key="):
            runner.run(train, run_key=key, log=str(log), epochs=1)
    with pytest.raises(ArgumentTypeError, match="run_key=3: it must be a str"):
        runner.run(train, run_key=3, log=str(log), epochs=1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentValueError, match="run_key='k' needs run_dir"):
        HorovodRunner(np=-1).run(train, run_key="k", log=str(log), epochs=1)
    with pytest.raises(ArgumentValueError, match="needs a run_key"):
        runner.run(train, on_change="rerun", log=str(log), epochs=1)
    with pytest.raises(ArgumentValueError, match="it must be 'refuse' or 'rerun'"):
        runner.run(train, run_key="k", on_change="yes", log=str(log), epochs=1)

    def main(run_key: str) -> None: ...

    with pytest.raises(ArgumentTypeError, match="parameter 'run_key', which is run"):
        runner.run(main, run_key="k")
    assert not log.exists()
    assert not key_files(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"run_key='k': .* cannot be read or written"):
        HorovodRunner(np=-1, run_dir=tmp_path / "file").run(print, run_key="k")


def test_the_drop_in_passes_these_names_on() -> None:
    def main(run_key: str, on_change: int) -> tuple[str, int]:
        return run_key, on_change

    assert sparkdl.HorovodRunner(np=-1).run(main, run_key="a", on_change=1) == ("a", 1)


def test_the_second_one_waits_for_the_first(
    tmp_path: Path, log: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments: dict[str, Any] = {"log": str(log), "epochs": 2, "wait_in": 1}
    found = []

    def run() -> None:
        found.append(runner_in(tmp_path).run(train, run_key="k", **arguments))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(log.exists)
    with pytest.raises(StartTimeoutError, match=rf"held by pid {os.getpid()} on .*, which has"):
        runner_in(tmp_path, start_timeout=0.1).run(train, run_key="k", **arguments)
    # another key does not wait
    other = tmp_path / "other"
    assert runner_in(tmp_path).run(train, run_key="other", log=str(other), epochs=1)["epochs"] == 1
    Path(f"{log}.go").touch()
    for thread in threads:
        thread.join()
    assert [each["epochs"] for each in found] == [2, 2]
    assert epochs_in(log) == [0, 1]
    assert f"held by pid {os.getpid()} on" in capfd.readouterr().out


DRIVER = """
import sys
from pathlib import Path
from horovodrunner import HorovodRunner
from horovodrunner.flows.runkeys import driver, place
from tests.process.test_run_keys import runner_in, train
driver.BEAT_SECONDS, driver.SILENT_SECONDS = 0.2, 3.0
{first}
directory = Path(sys.argv[1])
log = str(directory / "log")
try:
    found = runner_in(directory).run(train, run_key="k", log=log, epochs=4, wait_in=2)
    print("value", found["start"], found["epochs"], flush=True)
except Exception as error:
    print("error", type(error).__name__, error, flush=True)
"""


@contextlib.contextmanager
def driver_in(directory: Path, name: str, first: str = "") -> Iterator[processes.Process]:
    """Start a driver of its own that does the run; NAME.out is what it says."""
    script = directory / f"{name}.py"
    script.write_text(DRIVER.format(first=first))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command: list[str | Path] = [sys.executable, script, directory]
    with (
        (directory / f"{name}.out").open("w") as output,
        processes.started(
            command, stdout=output, stderr=processes.STDOUT, env=environment
        ) as process,
    ):
        yield process


def test_a_driver_that_was_killed_is_followed(tmp_path: Path, log: Path) -> None:
    with driver_in(tmp_path, "first") as first:
        wait_until(lambda: log.exists() and 1 in epochs_in(log))
        wait_until(lambda: [*tmp_path.glob("checkpoints/key-*/*/epoch-000001/step-00000001")])
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    Path(f"{log}.go").touch()
    found = runner_in(tmp_path).run(train, run_key="k", log=str(log), epochs=4, wait_in=2)
    assert found["start"] == 2
    assert epochs_in(log) == [0, 1, 2, 3]
    assert [each.name for each in tmp_path.glob("checkpoints/key-*/*/*")] == ["epoch-000002"]


DIE_BEFORE_THE_JSON = """
import os, signal
place.KeyPlace.confirm = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_driver_that_was_killed_before_the_value_counts(tmp_path: Path, log: Path) -> None:
    Path(f"{log}.go").touch()
    with driver_in(tmp_path, "first", DIE_BEFORE_THE_JSON) as first:
        assert first.wait() == -signal.SIGKILL
    assert [each.name for each in key_files(tmp_path) if each.suffix == ".bin"] == [
        "value-000001.bin"
    ]
    found = runner_in(tmp_path).run(train, run_key="k", log=str(log), epochs=4, wait_in=2)
    assert (found["start"], epochs_in(log)) == (4, [0, 1, 2, 3])


def test_a_driver_that_was_stopped_for_long_is_superseded(tmp_path: Path, log: Path) -> None:
    with driver_in(tmp_path, "first") as first:
        wait_until(lambda: log.exists() and 1 in epochs_in(log))
        wait_until(lambda: [*tmp_path.glob("checkpoints/key-*/*/epoch-000001/step-00000001")])
        os.kill(first.pid, signal.SIGSTOP)
        with driver_in(tmp_path, "second") as successor:
            wait_until(lambda: [*tmp_path.glob("runs/keys/*/epoch-000002.json")])
            wait_until(lambda: [*tmp_path.glob("checkpoints/key-*/*/*/step-00000001")])
            os.kill(first.pid, signal.SIGCONT)
            wait_for_line("error RunSupersededError .*", tmp_path / "first.out")
            Path(f"{log}.go").touch()
            wait_for_line("value 2 4", tmp_path / "second.out")
            assert successor.wait() == 0
        assert first.wait() == 0
    said = (tmp_path / "first.out").read_text()
    assert re.search(
        rf"another driver, pid {successor.pid} on .*, has taken over the run 'k' on .* UTC", said
    )
    assert "value" not in re.findall("^value", said, re.MULTILINE)
    assert (
        runner_in(tmp_path).run(train, run_key="k", log=str(log), epochs=4, wait_in=2) is not None
    )
