"""Checkpoints on their way, and which one the ranks start from; backends are small real ones."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from horovodrunner.flows.checkpoints.manifest import Manifest
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.checkpoints.task import retrying
from horovodrunner.flows.checkpoints.task.latest import LatestCopy, LatestDecision
from horovodrunner.flows.checkpoints.task.retrying import ATTEMPTS
from horovodrunner.flows.checkpoints.task.uploading import CheckpointUploader
from horovodrunner.placement.topology import Member
from horovodrunner.wire.events import Latest, LatestWanted


class CountingBackend(CheckpointStore):
    """Keeps files in a directory and remembers what it was asked."""

    def __init__(self, location: Path) -> None:
        super().__init__(location, keep=9)
        self.looked = 0
        self.fetched: list[Path] = []
        self.find_error: Exception | None = None
        self.fetch_errors: list[Exception] = []

    def find_latest(self) -> tuple[Manifest | None, list[str]]:
        self.looked += 1
        if self.find_error is not None:
            raise self.find_error
        return super().find_latest()

    def fetch(self, manifest: Manifest, directory: Path, rank: int | None = None) -> None:
        self.fetched.append(directory)
        if self.fetch_errors:
            raise self.fetch_errors.pop()
        super().fetch(manifest, directory, rank)


class SlowBackend(CheckpointStore):
    """Stores nothing before the gate opens; fails in the given ways first."""

    def __init__(self, *errors: Exception, is_open: bool = True) -> None:
        super().__init__("nowhere", keep=1)
        self.gate = threading.Event()
        if is_open:
            self.gate.set()
        self.tried: list[int] = []
        self.stored: list[tuple[int, str]] = []
        self._errors = list(errors)

    def put(self, step: int, directory: Path, metrics: Mapping[str, float] | None = None) -> None:
        self.tried.append(step)
        self.gate.wait(30)
        if self._errors:
            raise self._errors.pop(0)
        self.stored.append((step, (directory / "state").read_text()))


class Run:
    """An uploader and what it says."""

    def __init__(self, backend: SlowBackend, scratch: Path) -> None:
        self.notes: list[str] = []
        self.errors: list[str] = []
        self.uploader = CheckpointUploader(backend, self.notes.append, self.errors.append)
        self._scratch = scratch

    def save(self, step: int) -> Path:
        directory = self._scratch / f"saving-{step}-{time.monotonic_ns()}"
        directory.mkdir()
        (directory / "state").write_text(f"weights of {step}")
        self.uploader.saved(step, directory)
        return directory

    def left(self) -> list[str]:
        return [path.name for path in self._scratch.iterdir()]


@contextlib.asynccontextmanager
async def running(backend: SlowBackend, scratch: Path) -> AsyncIterator[Run]:
    run = Run(backend, scratch)
    task = asyncio.create_task(run.uploader.run())
    try:
        yield run
        assert not task.done()
    finally:
        backend.gate.set()
        task.cancel()
        await asyncio.wait([task])


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "RETRY_SECONDS", 0.05)


def test_what_is_saved_is_stored_and_its_directory_deleted(tmp_path: Path) -> None:
    async def scenario() -> None:
        backend = SlowBackend()
        async with running(backend, tmp_path) as run:
            for step in (3, 4):
                run.save(step)
                assert run.uploader.is_idle is False
                assert await run.uploader.drain(10)
            assert backend.stored == [(3, "weights of 3"), (4, "weights of 4")]
            assert (run.left(), run.notes, run.errors) == ([], [], [])

    asyncio.run(scenario())


def test_saves_that_are_too_fast_take_bounded_space_and_the_newest_wins(tmp_path: Path) -> None:
    async def scenario() -> None:
        backend = SlowBackend(is_open=False)
        async with running(backend, tmp_path) as run:
            run.save(1)
            await until(lambda: backend.tried == [1])
            for step in range(2, 50):
                run.save(step)
                await until(lambda: len(run.left()) == 2)
            backend.gate.set()
            assert await run.uploader.drain(10)
            assert backend.stored == [(1, "weights of 1"), (49, "weights of 49")]
            (note,) = run.notes
            assert "step 2 is skipped" in note
            assert (run.left(), run.errors) == ([], [])

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), TimeoutError("silent")])
def test_a_network_that_comes_back_costs_nothing(tmp_path: Path, error: Exception) -> None:
    async def scenario() -> None:
        backend = SlowBackend(error, error)
        async with running(backend, tmp_path) as run:
            run.save(1)
            assert await run.uploader.drain(10)
            assert backend.tried == [1, 1, 1]
            assert backend.stored == [(1, "weights of 1")]
            assert (run.errors, run.left()) == ([], [])

    asyncio.run(scenario())


def test_a_network_that_stays_away_is_reported_and_the_next_checkpoint_tried(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        backend = SlowBackend(*[ConnectionResetError("gone")] * ATTEMPTS)
        async with running(backend, tmp_path) as run:
            run.save(1)
            assert await run.uploader.drain(10)
            assert run.errors == [
                "the checkpoint of step 1 was not stored: ConnectionResetError: gone. "
                "Older checkpoints are intact"
            ]
            run.save(2)
            assert await run.uploader.drain(10)
            assert backend.stored == [(2, "weights of 2")]
            assert len(run.errors) == 1
            assert run.left() == []

    asyncio.run(scenario())


def test_an_old_checkpoint_is_not_tried_again_when_a_newer_one_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        backend = SlowBackend(ConnectionResetError("gone"), is_open=False)
        async with running(backend, tmp_path) as run:
            run.save(1)
            await until(lambda: backend.tried == [1])
            run.save(2)
            backend.gate.set()
            assert await run.uploader.drain(10)
            assert backend.tried == [1, 2]
            assert backend.stored == [(2, "weights of 2")]
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
        backend = SlowBackend(error, error)
        async with running(backend, tmp_path) as run:
            for step in (1, 2, 3):
                run.save(step)
                assert await run.uploader.drain(10)
            assert backend.tried == [1, 2, 3]  # trying again would not help
            assert [each.partition(text)[0] for each in run.errors] == [
                f"the checkpoint of step {step} was not stored: " for step in (1, 2)
            ]
            assert backend.stored == [(3, "weights of 3")]
            assert run.left() == []

    asyncio.run(scenario())


def test_draining_takes_no_longer_than_it_may(tmp_path: Path) -> None:
    async def scenario() -> None:
        backend = SlowBackend(is_open=False)
        async with running(backend, tmp_path) as run:
            assert await run.uploader.drain(0)
            run.save(1)
            run.save(2)
            assert not await run.uploader.drain(0.1)
            backend.gate.set()
            assert await run.uploader.drain(10)
            assert backend.stored[-1] == (2, "weights of 2")

    asyncio.run(scenario())


def test_the_loop_goes_on_while_a_backend_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        backend = SlowBackend(is_open=False)
        async with running(backend, tmp_path) as run:
            run.save(1)
            await until(lambda: backend.tried)
            await asyncio.sleep(0.01)

    asyncio.run(scenario())


def member(partition: int, host: str) -> Member:
    return Member(partition, host, f"{host}.example", "127.0.0.1", "lo", 1)


WANTED = LatestWanted(0)
MEMBERS = [member(0, "a"), member(1, "a"), member(2, "b"), member(3, "a")]


@pytest.fixture
def backend(tmp_path: Path) -> CountingBackend:
    backend = CountingBackend(tmp_path / "kept")
    source = tmp_path / "source"
    (source / "variables" / "deep").mkdir(parents=True)
    (source / "assets").mkdir()
    (source / "model.pt").write_bytes(b"weights")
    (source / "variables" / "deep" / "index").write_bytes(b"index")
    backend.put(5, source)
    return backend


class Tasks:
    """The run's tasks, as far as they deal with the latest checkpoint."""

    def __init__(self, backend: CountingBackend | None, scratch: Path) -> None:
        self.notes: list[str] = []
        self.decision = LatestDecision(backend, MEMBERS, self.notes.append)
        self.told: list[tuple[int, str]] = []
        self._backend = backend
        self._scratch = scratch

    def copy(self, partition: int) -> LatestCopy:
        scratch = self._scratch / f"task-{partition}"
        scratch.mkdir()

        def tell(part: int, directory: str) -> None:
            self.told.append((partition, directory))
            self.decision.fetched(partition, part, directory)

        ask = functools.partial(self.decision.answer, partition)
        return LatestCopy(self._backend, scratch, ask=ask, tell=tell)


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
    backend: CountingBackend, tmp_path: Path
) -> None:
    async def scenario() -> None:
        tasks = Tasks(backend, tmp_path)
        first = await tasks.copy(2).get(WANTED)
        backend.put(6, tmp_path / "source")
        later = [await tasks.copy(partition).get(WANTED) for partition in (0, 1)]
        assert [answer.step for answer in (first, *later)] == [5, 5, 5]
        assert all(content(answer.directory) == WHOLE for answer in (first, *later))
        assert backend.looked == 1

    asyncio.run(scenario())


def test_tasks_of_one_host_share_one_fetch_by_hard_links(
    backend: CountingBackend, tmp_path: Path
) -> None:
    async def scenario() -> None:
        tasks = Tasks(backend, tmp_path)
        answers = await asyncio.gather(*(tasks.copy(each).get(WANTED) for each in range(4)))
        directories = [answer.directory for answer in answers]
        assert len(set(directories)) == 4
        assert all(content(directory) == WHOLE for directory in directories)
        inodes = [Path(directory, "model.pt").stat().st_ino for directory in directories]
        assert inodes[0] == inodes[1] == inodes[3]
        assert inodes[2] != inodes[0]  # it is on another host
        assert len(backend.fetched) == 2
        assert sorted(tasks.told) == list(enumerate(directories))

    asyncio.run(scenario())


def test_workers_of_one_task_share_one_copy(backend: CountingBackend, tmp_path: Path) -> None:
    async def scenario() -> None:
        copy = Tasks(backend, tmp_path).copy(0)
        first, second = await asyncio.gather(copy.get(WANTED), copy.get(WANTED))
        assert first == second == await copy.get(WANTED)
        assert len(backend.fetched) == 1

    asyncio.run(scenario())


def test_when_the_first_fetch_fails_the_others_fetch_for_themselves(
    backend: CountingBackend, tmp_path: Path
) -> None:
    async def scenario() -> None:
        backend.fetch_errors = [OSError("the disk of the scratch directory is full")]
        tasks = Tasks(backend, tmp_path)
        answers = await asyncio.gather(*(tasks.copy(each).get(WANTED) for each in (0, 1, 3)))
        assert answers[0] == Latest(error="OSError: the disk of the scratch directory is full")
        assert [answer.step for answer in answers[1:]] == [5, 5]
        assert all(content(answer.directory) == WHOLE for answer in answers[1:])
        assert tasks.told[0] == (0, "")

    asyncio.run(scenario())


def test_a_task_that_is_gone_keeps_nobody_waiting(backend: CountingBackend, tmp_path: Path) -> None:
    async def scenario() -> None:
        tasks = Tasks(backend, tmp_path)
        assert (await tasks.decision.answer(0, WANTED)).copy_from == ""  # it is to fetch, and dies
        waiting = asyncio.create_task(tasks.copy(1).get(WANTED))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        tasks.decision.fetched(0, -1, "")
        answer = await asyncio.wait_for(waiting, 10)
        assert content(answer.directory) == WHOLE
        tasks.decision.fetched(0, -1, "")  # told twice
        tasks.decision.fetched(3, -1, "")  # it never asked

    asyncio.run(scenario())


@pytest.mark.parametrize("what_is_gone", ["all", "a file"])
def test_a_copy_that_cannot_be_linked_is_fetched_instead(
    backend: CountingBackend, tmp_path: Path, what_is_gone: str
) -> None:
    async def scenario() -> None:
        tasks = Tasks(backend, tmp_path)
        first = Path((await tasks.copy(0).get(WANTED)).directory)
        if what_is_gone == "all":
            first.rename(tmp_path / "moved")
        else:
            (first / "variables" / "deep" / "index").unlink()
        second = await tasks.copy(1).get(WANTED)
        assert content(second.directory) == WHOLE
        assert len(backend.fetched) == 2

    asyncio.run(scenario())


def test_damaged_checkpoints_are_noted_and_the_one_before_is_taken(
    backend: CountingBackend, tmp_path: Path
) -> None:
    async def scenario() -> None:
        backend.put(6, tmp_path / "source")
        (tmp_path / "kept" / "step-00000006" / "model.pt").write_bytes(b"Weights")
        tasks = Tasks(backend, tmp_path)
        assert [(await tasks.copy(partition).get(WANTED)).step for partition in (0, 1)] == [5, 5]
        (note,) = tasks.notes
        assert "step-00000006 is damaged and skipped: model.pt" in note

    asyncio.run(scenario())


def test_when_the_backend_cannot_be_asked_every_task_gets_the_error(
    backend: CountingBackend, tmp_path: Path
) -> None:
    async def scenario() -> None:
        backend.find_error = PermissionError("not yours")
        tasks = Tasks(backend, tmp_path)
        answers = [await tasks.copy(partition).get(WANTED) for partition in (0, 2)]
        assert answers == [Latest(error="PermissionError: not yours")] * 2
        assert backend.looked == 1
        assert backend.fetched == []

    asyncio.run(scenario())


@pytest.mark.parametrize("is_kept", [True, False])
def test_without_a_checkpoint_there_is_none(tmp_path: Path, is_kept: bool) -> None:
    async def scenario() -> None:
        tasks = Tasks(CountingBackend(tmp_path / "none") if is_kept else None, tmp_path)
        for partition in (0, 1):
            assert (await tasks.copy(partition).get(WANTED)).directory == ""
        assert tasks.told == []

    asyncio.run(scenario())
