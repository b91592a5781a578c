"""Checkpoints on their way, and which one the ranks start from; depots are small real ones."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from horovodrunner.flows.checkpoints import task as checkpoints
from horovodrunner.flows.checkpoints.backend import StoreDepot
from horovodrunner.flows.checkpoints.manifest import Manifest
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.checkpoints.task import Courier, LatestCopy, LatestDecision
from horovodrunner.placement.topology import Member


class CountingDepot(StoreDepot):
    """Keeps files in a directory and remembers what it was asked."""

    def __init__(self, location: Path) -> None:
        super().__init__(CheckpointStore(location, keep=9))
        self.looked = 0
        self.fetched: list[Path] = []
        self.find_error: Exception | None = None
        self.fetch_errors: list[Exception] = []

    def find_latest(self) -> tuple[Manifest | None, Sequence[str]]:
        self.looked += 1
        if self.find_error is not None:
            raise self.find_error
        return super().find_latest()

    def fetch(self, manifest: Manifest, directory: Path) -> None:
        self.fetched.append(directory)
        if self.fetch_errors:
            raise self.fetch_errors.pop()
        super().fetch(manifest, directory)


class SlowDepot:
    """Stores nothing before the gate opens; fails in the given ways first."""

    def __init__(self, *errors: Exception, is_open: bool = True) -> None:
        self.gate = threading.Event()
        if is_open:
            self.gate.set()
        self.tried: list[int] = []
        self.stored: list[tuple[int, str]] = []
        self._errors = list(errors)

    def put(self, step: int, directory: Path) -> None:
        self.tried.append(step)
        self.gate.wait(30)
        if self._errors:
            raise self._errors.pop(0)
        self.stored.append((step, (directory / "state").read_text()))

    def find_latest(self) -> tuple[Manifest | None, Sequence[str]]:
        return None, []

    def fetch(self, manifest: Manifest, directory: Path) -> None:
        raise NotImplementedError

    def abort(self) -> None:
        self.gate.set()


class Run:
    """A courier and what it says."""

    def __init__(self, depot: SlowDepot, scratch: Path) -> None:
        self.notes: list[str] = []
        self.errors: list[str] = []
        self.courier = Courier(depot, self.notes.append, self.errors.append)
        self._scratch = scratch

    def save(self, step: int) -> Path:
        directory = self._scratch / f"saving-{step}-{time.monotonic_ns()}"
        directory.mkdir()
        (directory / "state").write_text(f"weights of {step}")
        self.courier.saved(step, directory)
        return directory

    def left(self) -> list[str]:
        return [path.name for path in self._scratch.iterdir()]


@contextlib.asynccontextmanager
async def running(depot: SlowDepot, scratch: Path) -> AsyncIterator[Run]:
    run = Run(depot, scratch)
    task = asyncio.create_task(run.courier.run())
    try:
        yield run
        assert not task.done()
    finally:
        depot.abort()
        task.cancel()
        await asyncio.wait([task])


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "RETRY_SECONDS", 0.05)


def test_what_is_saved_is_stored_and_its_directory_deleted(tmp_path: Path) -> None:
    async def scenario() -> None:
        depot = SlowDepot()
        async with running(depot, tmp_path) as run:
            for step in (3, 4):
                run.save(step)
                assert run.courier.is_idle is False
                assert await run.courier.drain(10)
            assert depot.stored == [(3, "weights of 3"), (4, "weights of 4")]
            assert (run.left(), run.notes, run.errors) == ([], [], [])

    asyncio.run(scenario())


def test_saves_that_are_too_fast_take_bounded_space_and_the_newest_wins(tmp_path: Path) -> None:
    async def scenario() -> None:
        depot = SlowDepot(is_open=False)
        async with running(depot, tmp_path) as run:
            run.save(1)
            await until(lambda: depot.tried == [1])
            for step in range(2, 50):
                run.save(step)
                await until(lambda: len(run.left()) == 2)
            depot.gate.set()
            assert await run.courier.drain(10)
            assert depot.stored == [(1, "weights of 1"), (49, "weights of 49")]
            (note,) = run.notes
            assert "step 2 is skipped" in note
            assert (run.left(), run.errors) == ([], [])

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), TimeoutError("silent")])
def test_a_network_that_comes_back_costs_nothing(tmp_path: Path, error: Exception) -> None:
    async def scenario() -> None:
        depot = SlowDepot(error, error)
        async with running(depot, tmp_path) as run:
            run.save(1)
            assert await run.courier.drain(10)
            assert depot.tried == [1, 1, 1]
            assert depot.stored == [(1, "weights of 1")]
            assert (run.errors, run.left()) == ([], [])

    asyncio.run(scenario())


def test_a_network_that_stays_away_is_reported_and_the_next_checkpoint_tried(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        depot = SlowDepot(*[ConnectionResetError("gone")] * checkpoints.PUT_ATTEMPTS)
        async with running(depot, tmp_path) as run:
            run.save(1)
            assert await run.courier.drain(10)
            assert run.errors == [
                "the checkpoint of step 1 was not stored: ConnectionResetError: gone. "
                "Older checkpoints are intact"
            ]
            run.save(2)
            assert await run.courier.drain(10)
            assert depot.stored == [(2, "weights of 2")]
            assert len(run.errors) == 1
            assert run.left() == []

    asyncio.run(scenario())


def test_an_old_checkpoint_is_not_tried_again_when_a_newer_one_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        depot = SlowDepot(ConnectionResetError("gone"), is_open=False)
        async with running(depot, tmp_path) as run:
            run.save(1)
            await until(lambda: depot.tried == [1])
            run.save(2)
            depot.gate.set()
            assert await run.courier.drain(10)
            assert depot.tried == [1, 2]
            assert depot.stored == [(2, "weights of 2")]
            assert len(run.errors) == 1
            assert run.left() == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
        (OSError("OSError: the driver's words"), "OSError: the driver's words"),
        (PermissionError(errno.EACCES, "No"), "PermissionError: [Errno 13] No"),
        (ValueError("the path is not safe"), "ValueError: the path is not safe"),
        (RuntimeError("anything"), "RuntimeError: anything"),
    ],
)
def test_any_other_error_is_reported_once_for_each_checkpoint(
    tmp_path: Path, error: Exception, text: str
) -> None:
    async def scenario() -> None:
        depot = SlowDepot(error, error)
        async with running(depot, tmp_path) as run:
            for step in (1, 2, 3):
                run.save(step)
                assert await run.courier.drain(10)
            assert depot.tried == [1, 2, 3]  # trying again would not help
            assert [each.partition(text)[0] for each in run.errors] == [
                f"the checkpoint of step {step} was not stored: " for step in (1, 2)
            ]
            assert depot.stored == [(3, "weights of 3")]
            assert run.left() == []

    asyncio.run(scenario())


def test_draining_takes_no_longer_than_it_may(tmp_path: Path) -> None:
    async def scenario() -> None:
        depot = SlowDepot(is_open=False)
        async with running(depot, tmp_path) as run:
            assert await run.courier.drain(0)
            run.save(1)
            run.save(2)
            assert not await run.courier.drain(0.1)
            depot.gate.set()
            assert await run.courier.drain(10)
            assert depot.stored[-1] == (2, "weights of 2")

    asyncio.run(scenario())


def test_the_loop_goes_on_while_a_depot_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        depot = SlowDepot(is_open=False)
        async with running(depot, tmp_path) as run:
            run.save(1)
            await until(lambda: depot.tried)
            await asyncio.sleep(0.01)

    asyncio.run(scenario())


def member(partition: int, host: str) -> Member:
    return Member(partition, host, f"{host}.example", "127.0.0.1", "lo", 1)


MEMBERS = [member(0, "a"), member(1, "a"), member(2, "b"), member(3, "a")]


@pytest.fixture
def depot(tmp_path: Path) -> CountingDepot:
    depot = CountingDepot(tmp_path / "kept")
    source = tmp_path / "source"
    (source / "variables" / "deep").mkdir(parents=True)
    (source / "assets").mkdir()
    (source / "model.pt").write_bytes(b"weights")
    (source / "variables" / "deep" / "index").write_bytes(b"index")
    depot.put(5, source)
    return depot


class Tasks:
    """The run's tasks, as far as they deal with the latest checkpoint."""

    def __init__(self, depot: CountingDepot | None, scratch: Path) -> None:
        self.notes: list[str] = []
        self.decision = LatestDecision(depot, MEMBERS, self.notes.append)
        self.told: list[tuple[int, str]] = []
        self._depot = depot
        self._scratch = scratch

    def copy(self, partition: int) -> LatestCopy:
        scratch = self._scratch / f"task-{partition}"
        scratch.mkdir()

        def tell(directory: str) -> None:
            self.told.append((partition, directory))
            self.decision.fetched(partition, directory)

        return LatestCopy(
            self._depot, scratch, ask=lambda: self.decision.answer(partition), tell=tell
        )


def content(directory: str) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes()
        for path in Path(directory).rglob("*")
    }


WHOLE = {
    "model.pt": b"weights",
    "assets": None,
    "variables": None,
    "variables/deep": None,
    "variables/deep/index": b"index",
}


def test_every_task_gets_the_same_checkpoint_whatever_is_saved_meanwhile(
    depot: CountingDepot, tmp_path: Path
) -> None:
    async def scenario() -> None:
        tasks = Tasks(depot, tmp_path)
        first = await tasks.copy(2).get()
        depot.put(6, tmp_path / "source")
        later = [await tasks.copy(partition).get() for partition in (0, 1)]
        assert [answer["step"] for answer in (first, *later)] == [5, 5, 5]
        assert all(content(answer["directory"]) == WHOLE for answer in (first, *later))
        assert depot.looked == 1

    asyncio.run(scenario())


def test_tasks_of_one_host_share_one_fetch_by_hard_links(
    depot: CountingDepot, tmp_path: Path
) -> None:
    async def scenario() -> None:
        tasks = Tasks(depot, tmp_path)
        answers = await asyncio.gather(*(tasks.copy(partition).get() for partition in range(4)))
        directories = [answer["directory"] for answer in answers]
        assert len(set(directories)) == 4
        assert all(content(directory) == WHOLE for directory in directories)
        inodes = [Path(directory, "model.pt").stat().st_ino for directory in directories]
        assert inodes[0] == inodes[1] == inodes[3]
        assert inodes[2] != inodes[0]  # it is on another host
        assert len(depot.fetched) == 2
        assert sorted(tasks.told) == list(enumerate(directories))

    asyncio.run(scenario())


def test_workers_of_one_task_share_one_copy(depot: CountingDepot, tmp_path: Path) -> None:
    async def scenario() -> None:
        copy = Tasks(depot, tmp_path).copy(0)
        first, second = await asyncio.gather(copy.get(), copy.get())
        assert first == second == await copy.get()
        assert len(depot.fetched) == 1

    asyncio.run(scenario())


def test_when_the_first_fetch_fails_the_others_fetch_for_themselves(
    depot: CountingDepot, tmp_path: Path
) -> None:
    async def scenario() -> None:
        depot.fetch_errors = [OSError("the disk of the scratch directory is full")]
        tasks = Tasks(depot, tmp_path)
        answers = await asyncio.gather(*(tasks.copy(partition).get() for partition in (0, 1, 3)))
        assert answers[0] == {"error": "OSError: the disk of the scratch directory is full"}
        assert [answer["step"] for answer in answers[1:]] == [5, 5]
        assert all(content(answer["directory"]) == WHOLE for answer in answers[1:])
        assert tasks.told[0] == (0, "")

    asyncio.run(scenario())


def test_a_task_that_is_gone_keeps_nobody_waiting(depot: CountingDepot, tmp_path: Path) -> None:
    async def scenario() -> None:
        tasks = Tasks(depot, tmp_path)
        assert (await tasks.decision.answer(0))["copy_from"] == ""  # it is to fetch, and dies
        waiting = asyncio.create_task(tasks.copy(1).get())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        tasks.decision.fetched(0, "")
        answer = await asyncio.wait_for(waiting, 10)
        assert content(answer["directory"]) == WHOLE
        tasks.decision.fetched(0, "")  # told twice
        tasks.decision.fetched(3, "")  # it never asked

    asyncio.run(scenario())


@pytest.mark.parametrize("what_is_gone", ["all", "a file"])
def test_a_copy_that_cannot_be_linked_is_fetched_instead(
    depot: CountingDepot, tmp_path: Path, what_is_gone: str
) -> None:
    async def scenario() -> None:
        tasks = Tasks(depot, tmp_path)
        first = Path((await tasks.copy(0).get())["directory"])
        if what_is_gone == "all":
            first.rename(tmp_path / "moved")
        else:
            (first / "variables" / "deep" / "index").unlink()
        second = await tasks.copy(1).get()
        assert content(second["directory"]) == WHOLE
        assert len(depot.fetched) == 2

    asyncio.run(scenario())


def test_damaged_checkpoints_are_noted_and_the_one_before_is_taken(
    depot: CountingDepot, tmp_path: Path
) -> None:
    async def scenario() -> None:
        depot.put(6, tmp_path / "source")
        (tmp_path / "kept" / "step-00000006" / "model.pt").write_bytes(b"Weights")
        tasks = Tasks(depot, tmp_path)
        assert [(await tasks.copy(partition).get())["step"] for partition in (0, 1)] == [5, 5]
        (note,) = tasks.notes
        assert "step-00000006 is damaged and skipped: model.pt" in note

    asyncio.run(scenario())


def test_when_the_depot_cannot_be_asked_every_task_gets_the_error(
    depot: CountingDepot, tmp_path: Path
) -> None:
    async def scenario() -> None:
        depot.find_error = PermissionError("not yours")
        tasks = Tasks(depot, tmp_path)
        answers = [await tasks.copy(partition).get() for partition in (0, 2)]
        assert answers == [{"error": "PermissionError: not yours"}] * 2
        assert depot.looked == 1
        assert depot.fetched == []

    asyncio.run(scenario())


@pytest.mark.parametrize("is_kept", [True, False])
def test_without_a_checkpoint_there_is_none(tmp_path: Path, is_kept: bool) -> None:
    async def scenario() -> None:
        tasks = Tasks(CountingDepot(tmp_path / "none") if is_kept else None, tmp_path)
        for partition in (0, 1):
            assert (await tasks.copy(partition).get())["directory"] == ""
        assert tasks.told == []

    asyncio.run(scenario())
