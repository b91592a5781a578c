"""A run that is ended from the driver, and what follows its metrics there."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import (
    ArgumentTypeError,
    ArgumentValueError,
    HorovodRunner,
    RunStoppedError,
    WorkerFailedError,
    log_to_driver,
    metrics,
)
from tests.waiting import wait_until


def report(steps: int) -> str:
    for step in range(steps):
        metrics.report(step, loss=1 / (step + 1))
    return "value"


def report_and_wait() -> None:
    report(3)
    while True:
        time.sleep(0.02)


class PrunedError(Exception):
    """What a library raises in a callback."""


def points_seen(runner: HorovodRunner) -> bool:
    return len(runner.history) == 3


def stopped_by(act: Any, runner: HorovodRunner) -> RunStoppedError:
    """Run for ever until what another thread does after the first points stops it."""

    def wait_and_act() -> None:
        wait_until(lambda: points_seen(runner))
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    with pytest.raises(RunStoppedError) as caught:
        runner.run(report_and_wait)
    thread.join()
    return caught.value


def test_another_thread_ends_a_run_and_all_that_it_reported_stays(tmp_path: Path) -> None:
    answers: list[bool] = []
    runner = HorovodRunner(
        np=-2,
        max_restarts=3,
        restart_on=(Exception,),
        run_dir=tmp_path,
        checkpoint_dir=tmp_path / "saved",
    )

    def stop_twice() -> None:
        answers.extend([runner.stop("no progress"), runner.stop("again")])

    assert not runner.stop()  # there is none yet, and the next one is not affected
    error = stopped_by(stop_twice, runner)
    assert answers == [True, True]
    assert not runner.stop()
    where = re.escape(str(tmp_path / "saved"))
    assert re.fullmatch(
        rf"no progress: the run of 2 ranks was stopped; there is no checkpoint in {where}\S* yet",
        str(error),
    )
    assert error.reason == "no progress"
    assert error.attempts == ()
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.reason) == (str(error), error.reason)
    assert len(runner.history) == 3
    assert runner.record is not None
    assert json.loads(Path(runner.record, "run.json").read_text())["outcome"]["status"] == "stopped"
    assert "Stopped" in Path(runner.record, "report.html").read_text()
    assert runner.run(report, steps=1) == "value"


def test_a_handler_of_signals_ends_a_run() -> None:
    runner = HorovodRunner(np=-1)
    before = signal.signal(signal.SIGUSR1, lambda *_: runner.stop("SIGUSR1"))
    try:
        error = stopped_by(lambda: os.kill(os.getpid(), signal.SIGUSR1), runner)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert error.reason == "SIGUSR1"


def test_a_run_is_stopped_wherever_it_is() -> None:
    runner = HorovodRunner(np=-1)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            runner.run(report_and_wait)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(runner.stop)  # as soon as there is one: nothing has been launched yet
    thread.join()
    [error] = errors
    assert isinstance(error, RunStoppedError)
    assert str(error).startswith("the run of 1 rank was stopped; ")


def test_there_is_no_restart_of_a_run_that_is_stopped_when_a_rank_is_lost(tmp_path: Path) -> None:
    def main() -> None:
        (tmp_path / f"{len(list(tmp_path.iterdir()))}").touch()
        metrics.report(0, loss=1.0)
        os._exit(3)

    runner = HorovodRunner(np=-1, max_restarts=5, on_report=lambda point: runner.stop("lost"))
    with pytest.raises(RunStoppedError, match=r"^lost: "):
        runner.run(main)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_callback_raises_ends_the_run_and_is_raised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[tuple[int, float]] = []
    threads = set()
    error = PrunedError("hopeless")

    def on_report(point: Any) -> None:
        seen.append((point.step, point.values["loss"]))
        threads.add(threading.get_ident())
        if point.step == 2:
            raise error

    runner = HorovodRunner(
        np=-2,
        max_restarts=3,
        restart_on=(Exception,),
        profile_launch=True,
        on_report=on_report,
    )
    with pytest.raises(PrunedError) as caught:
        runner.run(report_and_wait)
    assert caught.value is error
    assert seen == [(0, 1.0), (1, 1 / 2), (2, 1 / 3)]
    assert threads == {threading.get_ident()}
    assert "where the time went:" in capsys.readouterr().out  # what comes after it is shown, too


@pytest.mark.parametrize("how", ["raises", "stops"])
def test_the_last_point_can_end_a_run_too(how: str) -> None:
    def on_report(point: Any) -> None:
        if point.step < 99:
            return
        if how == "raises":
            raise PrunedError
        assert runner.stop()

    runner = HorovodRunner(np=-1, on_report=on_report)
    with pytest.raises(PrunedError if how == "raises" else RunStoppedError):
        runner.run(report, steps=100)


def test_a_callback_gets_all_points_of_rank_0_before_the_value_comes() -> None:
    steps: list[int] = []
    runner = HorovodRunner(np=-2, on_report=lambda point: steps.append(point.step))
    assert runner.run(report, steps=5000) == "value"
    assert steps == list(range(5000))


def test_a_failure_stays_one_where_nobody_stops_the_run() -> None:
    steps: list[int] = []

    def main() -> None:
        metrics.report(0, loss=1.0)
        raise ValueError("no data")

    runner = HorovodRunner(np=-1, on_report=lambda point: steps.append(point.step))
    with pytest.raises(WorkerFailedError, match="no data"):
        runner.run(main)
    assert steps == [0]


def say(text: str) -> None:
    print(text)
    print("two\nlines")
    log_to_driver("a message\nof two")
    metrics.report(0, loss=1.0)


def test_a_name_is_before_all_that_a_run_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = HorovodRunner(np=-1, name="lr = 0.1", run_dir=tmp_path)
    runner.run(say, text="hello")
    lines = capsys.readouterr().out.splitlines()
    assert {line[:9] for line in lines} == {"lr = 0.1 "}
    assert "lr = 0.1 [0]<stdout>:hello" in lines
    assert "lr = 0.1 [0]<stdout>:lines" in lines
    assert "lr = 0.1 of two" in lines
    assert any(line.startswith("lr = 0.1 HorovodRunner: 1 rank on this") for line in lines)
    assert runner.record is not None
    assert re.search(r"-[0-9a-f]{8}-lr-0\.1$", runner.record)
    assert "<h1>lr = 0.1 · say</h1>" in Path(runner.record, "report.html").read_text()


def test_runs_without_a_name_are_told_apart_while_there_are_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(rank: str) -> None:
        (tmp_path / rank).touch()
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        print(f"both are there, says {rank}")

    threads = [
        threading.Thread(target=HorovodRunner(np=-1).run, args=(main,), kwargs={"rank": rank})
        for rank in ("a", "b")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shown = capsys.readouterr().out
    prefixes = [
        re.findall(rf"^([0-9a-f]{{8}}) \[0\]<stdout>:both are there, says {rank}$", shown, re.M)
        for rank in ("a", "b")
    ]
    [[one], [other]] = prefixes
    assert one != other
    HorovodRunner(np=-1).run(say, text="alone")
    assert "\n[0]<stdout>:alone\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"name": 3}, ArgumentTypeError, "name=3: it must be a str, got int"),
        ({"name": " "}, ArgumentValueError, "name=' ': it must not be empty"),
        ({"name": "a\nb"}, ArgumentValueError, r"name='a\nb': it must be printable, in one line"),
        ({"name": "x" * 101}, ArgumentValueError, "it has 101 characters, and 100 is the most"),
        ({"on_report": 3}, ArgumentTypeError, "on_report=3: it must be a function of a point"),
        ({"on_report": lambda: 0}, ArgumentTypeError, "on_report: it is called with a point that"),
    ],
)
def test_options_are_refused_before_anything_is_launched(
    options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        HorovodRunner(np=-1, **options)


def test_a_reason_of_several_lines_stands_in_one() -> None:
    runner = HorovodRunner(np=-1, on_report=lambda point: runner.stop("no\n progress"))

    def main() -> None:
        metrics.report(loss=1.0)

    with pytest.raises(RunStoppedError, match=r"^no progress: the run of 1 rank was") as caught:
        runner.run(main)
    assert caught.value.reason == "no\n progress"


def test_a_reason_is_a_text() -> None:
    with pytest.raises(ArgumentTypeError, match="reason=3: it must be a str, got int"):
        HorovodRunner(np=-1).stop(3)  # type: ignore[arg-type]
