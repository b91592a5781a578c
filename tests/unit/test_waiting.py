"""What is told of a run whose tasks were not heard of yet."""

from __future__ import annotations

import time

import pytest

from horovodrunner.flows.artifacts.driver import BroughtFiles
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.going import GoingRun
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.results.driver import ResultStore
from horovodrunner.processes.driver import addresses, cluster
from horovodrunner.processes.driver.resources import TaskRequest
from horovodrunner.processes.driver.slots import Holders


class Job:
    """A Spark job of two tasks."""

    running = 0

    def running_tasks(self) -> int:
        return self.running


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    job = Job()
    monkeypatch.setattr(cluster, "spark_job", lambda *_: job)
    monkeypatch.setattr(addresses, "advertised_host", lambda *_: "192.0.2.1")
    monkeypatch.setattr(cluster, "FIRST_LOOK_SECONDS", 0)
    monkeypatch.setattr(cluster, "NOTE_SECONDS", 0)
    return job


class Waiting:
    """A run that waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self._console = Console()
        self._run = cluster.BarrierRun(
            None,
            JobSpec("r1", 2, b"", b""),
            TaskRequest(1, 0, ""),
            self._console,
            BroughtFiles({}),
            run=GoingRun("r1"),
            results=ResultStore(),
            start_timeout=1000,
            waiting_since=time.monotonic(),
        )

    def look(self, holders: Holders | None = None, *, has_heard: bool = False) -> str:
        self._monkeypatch.setattr(cluster, "slot_holders", lambda *_: holders)
        self._run._look_whether_it_starts(has_heard=has_heard)
        self._console.show(0)
        return self._capsys.readouterr().out


def test_where_slots_are_free_and_tasks_start_nothing_is_told(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = Waiting(monkeypatch, capsys)
    assert waiting.look(Holders(2, {})) == ""
    job.running = 2
    assert waiting.look() == ""


def test_free_slots_without_tasks_are_told_once(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "SILENT_SECONDS", 0)
    waiting = Waiting(monkeypatch, capsys)
    assert waiting.look(Holders(2, {})).endswith(": 2 free; waiting for Spark to start the tasks\n")
    assert waiting.look(Holders(2, {})) == ""


def test_who_holds_slots_is_told_when_it_changes(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = Waiting(monkeypatch, capsys)
    assert "waiting for 2 slots, 0 free, 2 held by job 7" in waiting.look(Holders(2, {7: 2}))
    assert waiting.look(Holders(2, {7: 2})) == ""
    assert "waiting for 2 slots, 1 free, 1 held by job 7" in waiting.look(Holders(2, {7: 1}))


def test_tasks_that_run_without_a_word_are_told_of_once(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "SILENT_SECONDS", 0)
    waiting = Waiting(monkeypatch, capsys)
    job.running = 2
    assert waiting.look(has_heard=True) == ""
    assert "nothing was heard of the run's tasks" in waiting.look()
    assert waiting.look() == ""
