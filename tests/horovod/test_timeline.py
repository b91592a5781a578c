"""Horovod's timeline is on the driver at the end of a run, whatever the end was."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import HorovodRunner, WorkerFailedError, checkpoint

pytestmark = pytest.mark.horovod

STEPS = 12


def train(end: str, driver: int = 0) -> str:
    """Reduce in steps; in the middle the last rank, or the driver, meets its end."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    for step in range(STEPS):
        if step == STEPS // 2 and hvd.rank() == hvd.size() - 1:
            if end == "killed at first" and checkpoint.attempt == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if end == "raised":
                raise ValueError("planned")
            if end == "interrupted":
                time.sleep(0.5)  # an event reaches the file when the next one is written
                os.kill(driver, signal.SIGINT)
                time.sleep(600)
        hvd.allreduce(torch.ones(1000), name=f"gradient.{step}")
    time.sleep(0.5)  # Horovod drops what its writer has not come to when the process leaves
    return "trained"


def events_in(path: Path) -> list[dict[str, Any]]:
    events = json.loads(path.read_text())
    assert isinstance(events, list)
    return events


def reduced_tensors(events: list[dict[str, Any]]) -> set[str]:
    """Name the tensors of which an ALLREDUCE begins."""
    names = {
        event["pid"]: event["args"].get("name", "")
        for event in events
        if event.get("name") == "process_name"
    }
    return {names[event["pid"]] for event in events if event.get("name") == "ALLREDUCE"}


def begins_with_the_first_half(tensors: set[str]) -> bool:
    """Allow the last event to be missing of a process that was ended at once."""
    half = [f"allreduce.gradient.{step}" for step in range(STEPS // 2)]
    return set(half[:-1]) <= tensors <= set(half)


def test_each_attempt_has_its_timeline_also_the_one_that_lost_a_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    options = f"--timeline-filename {path} --timeline-mark-cycles"
    runner = HorovodRunner(np=-2, horovodrun_args=options, max_restarts=1)
    assert runner.run(train, end="killed at first") == "trained"

    first, last = events_in(tmp_path / "run.attempt-1.json"), events_in(path)
    assert begins_with_the_first_half(reduced_tensors(first))
    assert reduced_tensors(last) == {f"allreduce.gradient.{step}" for step in range(STEPS)}
    for events in (first, last):
        kinds = {event.get("name") for event in events}
        assert kinds > {"NEGOTIATE_ALLREDUCE", "ALLREDUCE", "GLOO_ALLREDUCE", "CYCLE_START"}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run.attempt-1.json", "run.json"]
    collectives = [event for event in last if "pid" in event and event["ph"] != "M"]
    assert f"timeline: {len(collectives)} events in {path}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("initialises", "reason"),
    [
        (True, "no collective operation of Horovod's began on rank 0 after hvd.init()"),
        (False, "hvd.init() was not called on rank 0"),
    ],
)
def test_a_timeline_without_events_says_why(
    initialises: bool,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> None:
        if initialises:
            import horovod.torch as hvd

            hvd.init()

    monkeypatch.setenv("HOROVOD_TIMELINE", str(tmp_path / "t.json"))
    monkeypatch.setenv("HOROVOD_TIMELINE_MARK_CYCLES", "1")
    HorovodRunner(np=-1).run(main)
    assert reduced_tensors(events_in(tmp_path / "t.json")) == set()
    assert f"timeline: 0 events in {tmp_path}/t.json: {reason}" in capsys.readouterr().out


def test_an_interrupted_run_leaves_its_timeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_TIMELINE", str(tmp_path / "t.json"))
    with pytest.raises(KeyboardInterrupt):
        HorovodRunner(np=-1).run(train, end="interrupted", driver=os.getpid())
    assert begins_with_the_first_half(reduced_tensors(events_in(tmp_path / "t.json")))


def test_main_may_start_the_timeline_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(path: str) -> None:
        import horovod.torch as hvd
        import torch

        hvd.init()
        hvd.start_timeline(path)
        hvd.allreduce(torch.ones(2), name="seen")
        time.sleep(0.2)
        hvd.stop_timeline()

    monkeypatch.setenv("HOROVOD_TIMELINE", "DYNAMIC")
    HorovodRunner(np=-1).run(main, path=str(tmp_path / "t.json"))
    assert reduced_tensors(events_in(tmp_path / "t.json")) == {"allreduce.seen"}


@pytest.mark.spark
@pytest.mark.usefixtures("spark")
def test_the_timeline_of_a_failing_run_on_executors_comes_to_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOROVOD_TIMELINE", str(tmp_path / "t.json"))
    with pytest.raises(WorkerFailedError, match="ValueError: planned"):
        HorovodRunner(np=2).run(train, end="raised")
    assert begins_with_the_first_half(reduced_tensors(events_in(tmp_path / "t.json")))
    assert f" events in {tmp_path}/t.json\n" in capsys.readouterr().out


def end_the_task() -> None:
    """Let rank 0's task go, and with it all it knows."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    hvd.allreduce(torch.ones(2))
    if hvd.rank() == 0:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


@pytest.mark.spark
@pytest.mark.usefixtures("spark")
def test_a_timeline_that_is_lost_with_rank_0s_task_is_told_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from horovodrunner import BarrierStageError

    monkeypatch.setenv("HOROVOD_TIMELINE", str(tmp_path / "t.json"))
    with pytest.raises(BarrierStageError):
        HorovodRunner(np=2, keep_warm=False).run(end_the_task)
    assert f"HOROVOD_TIMELINE={tmp_path}/t.json: nothing came" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
