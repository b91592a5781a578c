"""checkpoint.should_save_now() in real runs on this machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import (
    ConfigurationError,
    HorovodRunner,
    RunStoppedError,
    WorkerFailedError,
    checkpoint,
    metrics,
)
from horovodrunner.processes.driver import grace
from horovodrunner.processes.task import leader
from horovodrunner.processes.task.process import WorkerProcess
from tests.process import mains
from tests.waiting import wait_until


def step_until(saves: int, directory: str = "") -> list[int]:
    """Return at which calls this rank was told to save; it goes at a pace of its own."""
    calls, found = 0, list[int]()
    while len(found) < saves:
        if calls == mains.rank() * 40:
            if directory:
                mains.count_run(directory)
            metrics.report(calls, begun=1.0)
        calls += 1
        if checkpoint.should_save_now():
            found.append(calls)
            metrics.report(calls, saves=len(found))
        time.sleep(0.001 * (1 + mains.rank()))
    return found


def results_of(runner: HorovodRunner, main: Any, **kwargs: Any) -> list[Any]:
    runner.run(main, **kwargs)
    return list(runner.results)


def pid_of(directory: Path, rank: int) -> int:
    """Wait until a rank has left its process id as mains.count_run does."""
    wait_until(lambda: list(directory.glob(f"rank{rank}-*")))
    return int(next(iter(directory.glob(f"rank{rank}-*"))).name.split("-")[1])


@pytest.fixture
def in_thread() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Run functions beside the test, and wait for them."""
    threads: list[threading.Thread] = []

    def start(function: Callable[[], object]) -> None:
        threads.append(threading.Thread(target=function))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


def test_all_ranks_save_at_the_same_call_each_time_somebody_asks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers: list[bool] = []

    def on_report(point: Any) -> None:
        if point.values.get("saves", 0) < 2:
            answers.append(runner.request_checkpoint())

    runner = HorovodRunner(np=-3, results="all", on_report=on_report)
    assert not runner.request_checkpoint()  # nothing runs, and the next run is not affected
    first, *others = results_of(runner, step_until, saves=2)
    assert others == [first, first]
    assert first == sorted(set(first))
    assert answers == [True, True]
    assert not runner.request_checkpoint()
    shown = capsys.readouterr().out
    text = "HorovodRunner: runner.request_checkpoint(): all ranks are to save a checkpoint\n"
    assert shown.count(text) == 2
    for call in first:
        told = f"all ranks save at their call {call} of checkpoint.should_save_now()\n"
        assert f"HorovodRunner: {told}" in shown


def test_a_checkpoint_may_be_requested_before_the_ranks_run(
    in_thread: Callable[[Callable[[], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    runner = HorovodRunner(np=-2, results="all")
    in_thread(lambda: wait_until(runner.request_checkpoint))  # as soon as there is a run
    first, second = results_of(runner, step_until, saves=1)
    assert first == second
    assert "to save a checkpoint" in capsys.readouterr().out


def test_sigterm_to_a_rank_lets_all_ranks_save(
    tmp_path: Path,
    in_thread: Callable[[Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    runner = HorovodRunner(np=-3, results="all")

    def signal_two() -> None:
        pids = [pid_of(tmp_path, rank) for rank in (0, 1, 2)]
        for pid in pids[1:]:
            os.kill(pid, signal.SIGTERM)

    in_thread(signal_two)
    first, *others = results_of(runner, step_until, saves=1, directory=str(tmp_path))
    assert others == [first, first]
    shown = capsys.readouterr().out
    assert "was sent SIGTERM" in shown
    assert shown.count("all ranks are to save a checkpoint") == 1


def sleep_after_a_call(directory: str, handler: str = "") -> str:
    taken: list[int] = []
    if handler:
        signal.signal(signal.SIGTERM, lambda number, _: taken.append(number))
    checkpoint.should_save_now()
    mains.count_run(directory)
    metrics.report(0, begun=1.0)
    while not taken:
        time.sleep(0.01)
    return f"{handler} {taken} {checkpoint.should_save_now()}"


def test_a_run_is_stopped_at_once_although_sigterm_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WorkerProcess.stop, "__defaults__", (600.0,))
    monkeypatch.setattr(leader, "STOP_SECONDS", 600.0)
    runner = HorovodRunner(np=-2, on_report=lambda _: runner.stop("enough"))
    with pytest.raises(RunStoppedError, match=r"^enough"):
        runner.run(sleep_after_a_call, directory=str(tmp_path))


def test_a_handler_of_mains_own_is_left_alone(
    tmp_path: Path, in_thread: Callable[[Callable[[], object]], None]
) -> None:
    in_thread(lambda: os.kill(pid_of(tmp_path, 0), signal.SIGTERM))
    told = HorovodRunner(np=-1).run(sleep_after_a_call, directory=str(tmp_path), handler="main's")
    assert told == f"main's [{int(signal.SIGTERM)}] False"


def send_itself_sigterm(times: int) -> None:
    from horovodrunner.flows.saving import worker

    worker.SAME_SECONDS = 0.0
    assert not checkpoint.should_save_now()
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)
    while not checkpoint.should_save_now():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)
    while not checkpoint.should_save_now():
        time.sleep(0.001)


def test_a_second_sigterm_ends_a_rank_that_has_not_saved_and_no_other() -> None:
    HorovodRunner(np=-1).run(send_itself_sigterm, times=1)
    with pytest.raises(WorkerFailedError) as caught:
        HorovodRunner(np=-1).run(send_itself_sigterm, times=2)
    assert caught.value.signal == "SIGTERM"


def test_sigterm_ends_a_rank_that_never_asks(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailedError) as caught:
        HorovodRunner(np=-1).run(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert caught.value.signal == "SIGTERM"


def what_a_fork_sees() -> tuple[int, str]:
    assert not checkpoint.should_save_now()
    ours = signal.getsignal(signal.SIGTERM)
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:  # noqa: TID251 -- a rank may
        seen = (checkpoint.should_save_now(), signal.getsignal(signal.SIGTERM) is ours)
        os.write(writing, repr(seen).encode())
        signal.pause()
    text = os.read(reading, 100).decode()
    os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def test_a_process_that_main_forks_is_told_nothing_and_ends_on_sigterm() -> None:
    told = HorovodRunner(np=-1).run(what_a_fork_sees)
    assert told == (-signal.SIGTERM, "(False, False)")


def end_early(saves: int) -> list[int]:
    if mains.rank() == 1:
        return []
    return step_until(saves)


def test_a_rank_that_has_returned_is_not_waited_for() -> None:
    def on_report(point: Any) -> None:
        wait_until(lambda: runner.request_checkpoint() or True)

    runner = HorovodRunner(np=-2, results="all", on_report=on_report)
    first, second = results_of(runner, end_early, saves=1)
    assert (len(first), second) == (1, [])


def save_and_return(directory: str) -> int:
    """Return at the first call that is told to save."""
    mains.count_run(directory)
    calls = 1
    while not checkpoint.should_save_now():
        calls += 1
        time.sleep(0.001)
    with checkpoint.save(step=calls) as saved:
        (saved / "a.txt").write_text("state")
    return calls


def signal_own_process(directory: Path) -> Callable[[], None]:
    """Return what sends SIGTERM to the driver once main runs on both ranks."""

    def send() -> None:
        for rank in (0, 1):
            pid_of(directory, rank)
        os.kill(os.getpid(), signal.SIGTERM)

    return send


def test_sigterm_to_the_driver_lets_ranks_save_and_ends_the_run(
    tmp_path: Path,
    in_thread: Callable[[Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    store, runs = tmp_path / "saved", tmp_path / "runs"
    runner = HorovodRunner(np=-2, checkpoint_dir=store, run_dir=runs, sigterm_grace=600)
    in_thread(signal_own_process(tmp_path))
    with pytest.raises(RunStoppedError) as caught:
        runner.run(save_and_return, directory=str(tmp_path), run_key="k")
    assert "SIGTERM: the run of 2 ranks was stopped; the latest checkpoint is that of step " in str(
        caught.value
    )
    assert signal.getsignal(signal.SIGTERM) is before
    shown = capsys.readouterr().out
    assert "this process was sent SIGTERM: all ranks are to save a checkpoint" in shown
    # what main has returned then is not the value of the key
    assert runner.run(lambda: "done", run_key="k", on_change="rerun") == "done"


def test_when_the_grace_period_is_over_the_run_is_stopped(
    tmp_path: Path, in_thread: Callable[[Callable[[], object]], None]
) -> None:
    in_thread(signal_own_process(tmp_path))
    with pytest.raises(RunStoppedError, match=r"^SIGTERM: the run of 2 ranks was stopped"):
        HorovodRunner(np=-2, sigterm_grace=0.1).run(sleep_after_a_call, directory=str(tmp_path))


def test_a_second_sigterm_to_the_driver_ends_the_grace_period(
    tmp_path: Path,
    in_thread: Callable[[Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grace, "SAME_SECONDS", 0.0)

    def on_report(point: Any) -> None:
        if "saves" in point.values:
            os.kill(os.getpid(), signal.SIGTERM)

    in_thread(signal_own_process(tmp_path))
    runner = HorovodRunner(np=-2, sigterm_grace=600, on_report=on_report)
    with pytest.raises(RunStoppedError, match=r"^SIGTERM: "):
        runner.run(step_until, saves=2, directory=str(tmp_path))


def test_outside_the_main_thread_there_is_no_grace_period(
    in_thread: Callable[[Callable[[], object]], None],
) -> None:
    errors: list[Exception] = []

    def run() -> None:
        try:
            HorovodRunner(np=-1, sigterm_grace=1).run(int)
        except ConfigurationError as error:
            errors.append(error)

    in_thread(run)
    wait_until(lambda: errors)
    assert str(errors[0]).startswith("sigterm_grace=1: run() was called in 'Thread-")
