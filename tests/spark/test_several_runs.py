"""Several runs at once on two slots."""

from __future__ import annotations

import os
import re
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import HorovodRunner, RunStoppedError, StartTimeoutError
from horovodrunner.processes.driver import queue
from tests.conftest import marked_processes
from tests.waiting import wait_until

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("spark")]


class Runs:
    """Runs in threads, each of which ends when it is told to."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pool = ThreadPoolExecutor(8)
        self.runners: dict[str, HorovodRunner] = {}

    def start(self, name: str, np: int, **options: Any) -> Future[Any]:
        """Start a run, and wait until it stands in line."""
        directory, log = self._directory, self._directory / "log"

        def main() -> str:
            if os.environ["RANK"] == "0":
                with log.open("a") as file:
                    file.write(name + "\n")
            wait_until((directory / f"end {name}").exists)
            return f"value of {name}"

        before = in_line()
        self.runners[name] = HorovodRunner(np=np, name=name, **options)
        future = self._pool.submit(self.runners[name].run, main)
        wait_until(lambda: len(in_line()) > len(before) or future.done())
        return future

    def wait_for_main(self, name: str) -> None:
        wait_until(lambda: name in self.began)

    def end(self, *names: str) -> None:
        """Let mains end, also those that have not begun."""
        for name in names:
            (self._directory / f"end {name}").touch()

    @property
    def began(self) -> list[str]:
        """The names of runs, in the order in which their mains began."""
        log = self._directory / "log"
        return log.read_text().split() if log.exists() else []


def in_line() -> list[queue.Turn]:
    return [turn for turns in queue._queues.values() for turn in turns]


@pytest.fixture
def runs(tmp_path: Path) -> Any:
    found = Runs(tmp_path)
    yield found
    for runner in found.runners.values():
        runner.stop("the test has ended")
    found._pool.shutdown()
    assert in_line() == []


@pytest.mark.filterwarnings("ignore:np=0")
def test_who_comes_first_gets_slots_first_and_who_is_stopped_is_out_of_the_line(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spark: Any
) -> None:
    monkeypatch.setattr(queue, "FIRST_NOTE_SECONDS", 0.0)
    small = runs.start("small", 1)
    runs.wait_for_main("small")
    large = runs.start("large", 2)
    all_slots = runs.start("all", 0)
    late = runs.start("late", 1)  # its slot is free, and it does not overtake the others
    shown = ""
    while not re.search(r"late HorovodRunner: waiting for 1 of 2 slots; .* start first", shown):
        shown += capsys.readouterr().out
    assert "large HorovodRunner: waiting for 2 of 2 slots, held by run 'small' (" in shown
    assert "all HorovodRunner: waiting for 2 of 2 slots, held by run 'small' (" in shown
    assert runs.began == ["small"]

    assert runs.runners["large"].stop("not wanted")
    with pytest.raises(RunStoppedError, match=r"^not wanted: the run of 2 ranks was stopped"):
        large.result()
    runs.end("small")
    assert small.result() == "value of small"
    runs.wait_for_main("all")
    assert not late.done()
    runs.end("all", "late")
    assert all_slots.result() == "value of all"
    assert late.result() == "value of late"
    assert runs.began == ["small", "all", "late"]
    assert spark.range(10).count() == 10


def test_the_end_of_one_run_leaves_the_other_alone(runs: Runs) -> None:
    one, other = runs.start("one", 1, max_restarts=3), runs.start("other", 1)
    runs.wait_for_main("one")
    runs.wait_for_main("other")
    assert len(marked_processes()) == 2
    assert runs.runners["one"].stop()
    with pytest.raises(RunStoppedError):
        one.result()
    assert len(marked_processes()) == 1
    third = runs.start("third", 1)
    runs.wait_for_main("third")
    runs.end("other", "third")
    assert other.result() == "value of other"
    assert third.result() == "value of third"
    assert runs.began.count("one") == 1


def test_a_run_keeps_its_slots_when_it_is_restarted(runs: Runs, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def main() -> None:
        with log.open("a") as file:
            file.write("first\n")
        wait_until((tmp_path / "go").exists)
        if log.read_text().count("first") == 1:
            os._exit(3)

    runner = runs.runners["first"] = HorovodRunner(np=1, max_restarts=1)
    first = runs._pool.submit(runner.run, main)
    runs.wait_for_main("first")
    second = runs.start("second", 2)
    (tmp_path / "go").touch()
    first.result()
    runs.end("second")
    second.result()
    assert runs.began == ["first", "first", "second"]


def test_who_waits_too_long_is_told_for_whom(runs: Runs) -> None:
    holder = runs.start("holder", 2)
    runs.wait_for_main("holder")
    waiting = runs.start("waiting", 1, start_timeout=0.5)
    with pytest.raises(
        StartTimeoutError,
        match=r"did not start within 0\.5 s: it was waiting for 1 of 2 slots, held by run 'holder'",
    ):
        waiting.result()
    runs.end("holder")
    assert holder.result() == "value of holder"


def test_ctrl_c_ends_the_run_that_waits_and_no_other(runs: Runs) -> None:
    holder = runs.start("holder", 2)
    runs.wait_for_main("holder")

    def interrupt() -> None:
        wait_until(lambda: len(in_line()) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="the run of 2 ranks was stopped"):
        HorovodRunner(np=2).run(os.getpid)
    thread.join()
    assert len(in_line()) == 1
    runs.end("holder")
    assert holder.result() == "value of holder"


def test_more_ranks_than_slots_are_refused_at_once_also_behind_others(runs: Runs) -> None:
    holder = runs.start("holder", 2)
    runs.wait_for_main("holder")
    too_large = runs.start("too large", 3)
    with pytest.raises(Exception, match="np=3 needs 3 task slots, and the cluster has 2"):
        too_large.result()
    runs.end("holder")
    holder.result()


def test_many_runs_of_two_slots_each_all_come_to_an_end() -> None:
    values: list[int] = []

    def one(number: int) -> None:
        values.append(HorovodRunner(np=2 - number % 2).run(lambda: number))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(values) == list(range(6))


def test_a_run_is_stopped_before_spark_has_started_it(spark: Any) -> None:
    runner = HorovodRunner(np=2)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            runner.run(lambda: wait_until(lambda: False))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(in_line)
    assert runner.stop("early")
    thread.join()
    [error] = errors
    assert isinstance(error, RunStoppedError)
    assert spark.range(10).count() == 10
