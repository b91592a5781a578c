"""Checkpoints of all ranks count at once or not at all; the stores are real, the network is not."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest

from horovodrunner.flows.checkpoints.driver import CheckpointReceiver
from horovodrunner.flows.checkpoints.manifest import Manifest, Part
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.checkpoints.task import retrying
from horovodrunner.flows.checkpoints.task.parts import PartKeeper
from horovodrunner.flows.checkpoints.task.uploading import CheckpointUploader
from horovodrunner.wire.events import (
    CheckpointSaved,
    CheckpointStored,
    DiscardCheckpoint,
    Ended,
    Event,
    PartSaved,
    Sink,
    UploadPart,
    decode,
    dispatcher,
    encode,
    refuse,
)
from horovodrunner.wire.upload import Piece

HOSTS = {0: "a", 1: "a", 2: "b", 3: "c"}
TASKS = {0: [0, 1], 1: [2], 2: [3]}


class Store(CheckpointStore):
    """Keeps files, and fails or waits where it is told to."""

    def __init__(self, location: str | Path) -> None:
        super().__init__(location, keep=9)
        self.errors: dict[int, list[Exception]] = {}
        self.gates: dict[int, threading.Event] = {}
        self.put_by: list[int] = []

    def put_part(self, place: str, rank: int | None, pieces: Iterable[Piece]) -> Part:
        if rank is not None:
            self.put_by.append(rank)
            if rank in self.gates:
                assert self.gates[rank].wait(30)
            if self.errors.get(rank):
                raise self.errors[rank].pop(0)
        return super().put_part(place, rank, pieces)


class Run:
    """Partition 0 and the other tasks, which send each other encoded events."""

    def __init__(self, store: Store, scratch: Path) -> None:
        self.notes: list[str] = []
        self.errors: list[str] = []
        self.stored: list[int] = []
        self.store = store
        self._scratch = scratch
        self.uploader = CheckpointUploader(
            store,
            self.notes.append,
            self.errors.append,
            self._to_driver,
            ask=self._to_all,
            hosts=HOSTS,
        )
        self._leader = dispatcher([self.uploader.handlers], refuse)
        self.keepers = {task: PartKeeper(store, self._to_leader(task)) for task in TASKS}
        self._gone: set[int] = set()

    def save(self, step: int, rank: int, content: Mapping[str, bytes]) -> None:
        metrics = {"loss": 0.5 + rank}
        directory = self.directory_with(content, f"{step}-{rank}-")
        self.from_worker(PartSaved(rank, step, str(directory), metrics=metrics))

    def directory_with(self, content: Mapping[str, bytes], prefix: str = "") -> Path:
        directory = self._scratch / f"saving-{prefix}{secrets.token_hex(8)}"
        for path, data in content.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(data)
        directory.mkdir(exist_ok=True)
        return directory

    def save_all(self, step: int, ranks: Iterable[int] = HOSTS) -> None:
        for rank in ranks:
            self.save(step, rank, {"state": f"rank {rank} at {step}".encode(), "same": b"x" * 99})

    def from_worker(self, event: PartSaved) -> None:
        dispatcher([self.keepers[task_of(event.rank)].handlers], refuse)(event)

    def from_rank_0(self, event: CheckpointSaved) -> None:
        self._leader(as_sent(event))

    def end(self, rank: int) -> None:
        self._leader(Ended(rank, b""))

    def lose(self, task: int) -> None:
        self._gone.add(task)
        self.uploader.lost(TASKS[task])

    def left(self) -> list[str]:
        return [path.name for path in self._scratch.iterdir()]

    def _to_leader(self, task: int) -> Sink:
        def send(event: Event) -> None:
            if task not in self._gone:
                self._leader(as_sent(event))

        return send

    def _to_all(self, event: Event) -> None:
        for task, keeper in self.keepers.items():
            if task not in self._gone:
                dispatcher([keeper.requests], refuse)(as_sent(event))

    def _to_driver(self, event: Event) -> None:
        assert isinstance(event, CheckpointStored)
        self.stored.append(event.step)


def as_sent(event: Event) -> Event:
    head, body = encode(event)
    return decode(head[12:], body)


def task_of(rank: int) -> int:
    return next(task for task, ranks in TASKS.items() if rank in ranks)


@contextlib.asynccontextmanager
async def running(store: Store, scratch: Path) -> AsyncIterator[Run]:
    scratch.mkdir()
    run = Run(store, scratch)
    task = asyncio.create_task(run.uploader.run())
    try:
        yield run
        assert not task.done()
    finally:
        for gate in store.gates.values():
            gate.set()
        task.cancel()
        await asyncio.wait([task])


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "RETRY_SECONDS", 0.05)


@pytest.fixture(params=["path", "URL"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    where = tmp_path / "kept"
    return Store(where if request.param == "path" else f"file://{where}")


def steps(store: Store) -> list[int]:
    return [manifest.step for manifest in store.manifests()]


def tree(store: Store) -> set[str]:
    fs, root = fsspec.core.url_to_fs(store.location)
    return {name.removeprefix(f"{root}/") for name in fs.find(str(root))}


def content_of(store: Store, manifest: Manifest, rank: int) -> dict[str, bytes]:
    return {piece.name: piece.read() for piece in store.pieces(manifest, rank)}


def test_a_checkpoint_counts_when_all_ranks_files_are_there(store: Store, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            store.gates[3] = threading.Event()
            run.save_all(7, ranks=[1, 0, 2])
            await asyncio.sleep(0.05)
            assert (store.put_by, run.uploader.is_idle) == ([], False)
            run.save_all(7, ranks=[3])
            await until(lambda: sorted(store.put_by) == [0, 1, 2, 3])
            assert steps(store) == []
            store.gates[3].set()
            assert await run.uploader.drain(10)
            assert (steps(store), run.stored, run.errors, run.notes) == ([7], [7], [], [])
            await until(lambda: not run.left())

    asyncio.run(scenario())
    (manifest,) = store.manifests()
    assert (manifest.world_size, manifest.metrics) == (4, {"loss": 0.5})
    assert [content_of(store, manifest, rank) for rank in HOSTS] == [
        {"state": f"rank {rank} at 7".encode(), "same": b"x" * 99} for rank in HOSTS
    ]
    stored = {f"step-00000007/rank-{rank}/state" for rank in HOSTS}
    assert tree(store) == {*stored, "step-00000007/rank-0/same", "step-00000007/manifest.json"}
    assert store.verify(manifest) == ""


def test_files_that_only_look_the_same_are_all_stored(store: Store, tmp_path: Path) -> None:
    data = {rank: bytearray(1_000_000) for rank in HOSTS}
    data[2][300_000] = data[3][300_000] = 1  # where nobody looks at first

    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            for rank in HOSTS:
                run.save(1, rank, {"deep/weights": bytes(data[rank]), f"own-{rank}": b"mine"})
            assert await run.uploader.drain(10)
            assert run.errors == []

    asyncio.run(scenario())
    (manifest,) = store.manifests()
    for rank in HOSTS:
        found = content_of(store, manifest, rank)
        assert found == {"deep/weights": bytes(data[rank]), f"own-{rank}": b"mine"}
    assert manifest.copies["rank-1/deep/weights"] == "rank-0/deep/weights"
    assert "rank-2/deep/weights" not in manifest.copies


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyError("s3")])
def test_when_one_part_cannot_be_stored_nothing_counts_and_older_ones_stay(
    store: Store, tmp_path: Path, error: Exception
) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            run.save_all(1)
            assert await run.uploader.drain(10)
            before = tree(store)
            store.errors[2] = [error]
            run.save_all(2)
            assert await run.uploader.drain(10)
            await until(lambda: tree(store) == before)
            (text,) = run.errors
            assert text.startswith(
                "the checkpoint of step 2 has 3 of 4 ranks' files: what rank 2 on b"
            )
            assert "older checkpoints are intact" in text
            run.save_all(3)
            assert await run.uploader.drain(10)
            assert steps(store) == [3, 1]
            await until(lambda: not run.left())

    asyncio.run(scenario())


def test_a_network_that_comes_back_costs_nothing(store: Store, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            store.errors[1] = [ConnectionResetError("gone"), TimeoutError("slow")]
            run.save_all(1)
            assert await run.uploader.drain(10)
            assert (steps(store), run.errors) == ([1], [])

    asyncio.run(scenario())


@pytest.mark.parametrize("when", ["before all have saved", "in the middle"])
def test_a_task_that_is_lost_is_named(store: Store, tmp_path: Path, when: str) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            run.save_all(39)
            assert await run.uploader.drain(10)
            before = tree(store)
            if when == "in the middle":
                store.gates[2] = threading.Event()
                run.save_all(40)
                await until(lambda: store.put_by.count(2) == 2)
            else:
                run.save_all(40, ranks=[0, 1, 2])
            run.lose(1)
            assert await run.uploader.drain(10)
            assert run.errors == [
                "the checkpoint of step 40 has 3 of 4 ranks' files: rank 2's task on b was lost. "
                "It does not count; older checkpoints are intact"
            ]
            await until(lambda: tree(store) == before)
            assert steps(store) == [39]
            await until(lambda: not [name for name in run.left() if "-2-" not in name])

    asyncio.run(scenario())


def test_a_rank_that_ends_without_saving_is_not_waited_for(store: Store, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            run.save_all(5, ranks=[0, 1, 3])
            run.end(2)
            assert await run.uploader.drain(10)
            (text,) = run.errors
            assert "step 5 has 3 of 4 ranks' files: rank 2 ended without saving its own" in text
            for keeper in run.keepers.values():  # tasks need not stay for it
                await asyncio.wait_for(keeper.finish(asyncio.Future()), 10)
            await until(lambda: not run.left())
            assert tree(store) == set()

    asyncio.run(scenario())


def test_a_rank_that_raises_in_the_block_gives_the_checkpoint_up(
    store: Store, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            run.save_all(5, ranks=[0])
            run.from_worker(PartSaved(1, 5, problem="rank 1 on a raised KeyError in save()"))
            run.save_all(5, ranks=[2, 3])  # too late
            assert await run.uploader.drain(10)
            (text,) = run.errors
            assert "has 3 of 4 ranks' files: rank 1 on a raised KeyError" in text
            await until(lambda: not run.left())
            run.save_all(5)  # again, and by all
            assert await run.uploader.drain(10)
            assert steps(store) == [5]

    asyncio.run(scenario())


@pytest.mark.parametrize("order", ["whole first", "part first"])
def test_what_only_some_ranks_take_for_sharded_is_refused(
    order: str, store: Store, tmp_path: Path
) -> None:
    """Rank 0's stage of a pipeline is whole, and nobody has told it that the others' are not."""

    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            store.gates[0] = threading.Event()
            run.save_all(4)
            await until(lambda: 0 in store.put_by)
            whole = run.directory_with({"model.pt": b"stage 0"})
            for kind in ("whole", "part") if order == "whole first" else ("part", "whole"):
                if kind == "whole":
                    run.from_rank_0(CheckpointSaved(5, str(whole), guess=7))
                else:
                    part = run.directory_with({"shards.bin": b"stage 1"})
                    run.from_worker(PartSaved(1, 5, str(part), guess=7))
            (text,) = run.errors
            told = "objects are sharded, or of RandomState, on rank 1 and not on rank 0"
            assert f"the checkpoint of step 5 was not stored: {told}" in text
            assert 'save_torch(..., ranks="all")' in text
            store.gates[0].set()
            assert await run.uploader.drain(10)
            assert steps(store) == [4]
            await until(lambda: not run.left())

    asyncio.run(scenario())


def test_a_step_that_is_saved_twice_is_not_mixed(store: Store, tmp_path: Path) -> None:
    """First by rank 0 for all, then by every rank, some of which are ahead."""

    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            for rank in (1, 2, 3, 0):
                if rank == 0:
                    whole = run.directory_with({"model.pt": b"of rank 0"})
                    run.from_rank_0(CheckpointSaved(5, str(whole), guess=1))
                part = run.directory_with({"random.pt": b"%d" % rank})
                run.from_worker(PartSaved(rank, 5, str(part), guess=2))
            assert await run.uploader.drain(10)
            assert run.errors == []
            assert "step-00000005/rank-3/random.pt" in tree(store)

    asyncio.run(scenario())


def test_a_rank_that_saved_once_more_by_itself_is_not_mixed_up(
    store: Store, tmp_path: Path
) -> None:
    """Main called save_torch() on rank 0 only once, and its calls have other numbers since."""

    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            whole = run.directory_with({"ema.pt": b"of rank 0"})
            run.from_rank_0(CheckpointSaved(4, str(whole), guess=1))
            for rank in (1, 2, 3, 0):
                part = run.directory_with({"shards.bin": b"%d" % rank})
                run.from_worker(PartSaved(rank, 5, str(part), guess=2 - (rank > 0)))
            assert await run.uploader.drain(10)
            assert run.errors == []
            assert 5 in steps(store)

    asyncio.run(scenario())


def test_what_counts_already_is_not_called_intact(store: Store, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            whole = run.directory_with({"model.pt": b"stage 0"})
            run.from_rank_0(CheckpointSaved(5, str(whole), guess=1))
            assert await run.uploader.drain(10)
            part = run.directory_with({"shards.bin": b"stage 1"})
            run.from_worker(PartSaved(1, 5, str(part), guess=1))
            (text,) = run.errors
            assert text.startswith("the checkpoint of step 5 has what rank 0 saved, only: objects")
            assert steps(store) == [5]

    asyncio.run(scenario())


def test_the_newest_that_all_have_saved_wins(store: Store, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            store.gates[0] = threading.Event()
            run.save_all(1)
            await until(lambda: 0 in store.put_by)
            run.save_all(2)
            run.save_all(3)
            run.save_all(4, ranks=[0, 1])  # the others are slower
            store.gates[0].set()
            await until(lambda: steps(store) == [3, 1])
            assert run.uploader.is_idle is False
            run.save_all(4, ranks=[2, 3])
            assert await run.uploader.drain(10)
            assert (steps(store), run.errors) == ([4, 3, 1], [])
            (note,) = run.notes
            assert "step 2 is skipped, the newest one wins" in note
            await until(lambda: not run.left())

    asyncio.run(scenario())


def test_what_a_rank_has_passed_over_is_given_up(store: Store, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            run.save_all(1, ranks=[0, 1, 2])
            run.save_all(2)
            assert await run.uploader.drain(10)
            assert steps(store) == [2]
            (text,) = run.errors
            assert "step 1 has 3 of 4 ranks' files: rank 3 did not save it" in text
            await until(lambda: not run.left())

    asyncio.run(scenario())


def test_ranks_that_run_ahead_take_bounded_space(store: Store, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            for step in range(30):
                run.save_all(step, ranks=[0])
            await until(lambda: len(run.left()) <= 4)
            (note,) = run.notes
            assert "step 1 is skipped, because ranks 1, 2 and 3 had not saved it yet" in note
            run.uploader.no_more()
            assert await run.uploader.drain(10)
            assert len(run.errors) == 4
            assert (
                "step 29 has 1 of 4 ranks' files: rank 1 did not save its own; " in run.errors[-1]
            )
            await until(lambda: not run.left())
            run.save_all(0, ranks=[1])
            await until(lambda: not run.left())

    asyncio.run(scenario())


def test_a_rank_that_stays_behind_keeps_no_checkpoint_from_being_stored(
    store: Store, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            for step in range(24):
                run.save_all(step, ranks=[0, 1, 2])
                run.save_all(step - 9, ranks=[3] if step >= 9 else [])
                count = len([each for each in (0, 7, 14) if each <= step - 9])
                await until(lambda: len(run.stored) == count)  # noqa: B023 - it is called here
            assert run.stored == [0, 7, 14]

    asyncio.run(scenario())


def test_checkpoints_of_rank_0_and_of_all_ranks_take_turns(store: Store, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            run.save_all(1, ranks=[0, 1, 2])
            own = tmp_path / "scratch" / "saving-own"
            own.mkdir()
            (own / "state").write_bytes(b"of rank 0")
            run.uploader.saved(3, own)
            await until(lambda: run.stored == [3])
            run.save_all(1, ranks=[3])
            assert await run.uploader.drain(10)
            assert (run.stored, run.errors) == ([3, 1], [])

    asyncio.run(scenario())


def test_a_rank_may_save_nothing_or_empty_directories(store: Store, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            for rank in (0, 1, 2, 3):
                run.save(1, rank, {"state": b""} if rank == 2 else {})
            assert await run.uploader.drain(10)
            assert run.errors == []

    asyncio.run(scenario())
    (manifest,) = store.manifests()
    assert [content_of(store, manifest, rank) for rank in HOSTS] == [{}, {}, {"state": b""}, {}]


def test_ranges_are_read_of_stored_files_and_of_copies(store: Store, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            run.save_all(1)
            assert await run.uploader.drain(10)

    asyncio.run(scenario())
    (manifest,) = store.manifests()
    ranges = [("rank-2/state", 5, 3), ("rank-3/same", 97, 2), ("rank-0/state", 0, 0)]
    store.read_into(tmp_path / "found", manifest, ranges)
    assert (tmp_path / "found").read_bytes() == b"2 axx"
    for wrong in (("rank-2/state", 5, 99), ("rank-2/state", -1, 1), ("../state", 0, 1)):
        with pytest.raises(ValueError, match="the checkpoint has no"):
            list(store.read(manifest, [wrong]))


@pytest.mark.parametrize("damage", ["content", "size", "gone"])
def test_a_damaged_part_is_found_before_it_is_used(
    store: Store, tmp_path: Path, damage: str
) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            for step in (1, 2):
                run.save_all(step)
                assert await run.uploader.drain(10)

    asyncio.run(scenario())
    state = tmp_path / "kept" / "step-00000002" / "rank-3" / "state"
    if damage == "gone":
        state.unlink()
    else:
        state.write_bytes(b"Rank 3 at 2" + b"more" * (damage == "size"))
    found, sentences = store.find_latest()
    assert found is not None
    if damage == "content" and store.location.startswith("file:"):
        # nobody reads all ranks' files behind a URL; who fetches one compares it
        (tmp_path / "fetched").mkdir()
        store.fetch(found, tmp_path / "fetched", 2)
        with pytest.raises(OSError, match="rank-3/state of the checkpoint of step 2 arrived with"):
            store.fetch(found, tmp_path / "fetched", 3)
        return
    assert found.step == 1
    (sentence,) = sentences
    assert "step-00000002 is damaged and skipped: rank-3/state" in sentence


def test_a_part_that_still_comes_when_its_checkpoint_is_given_up_leaves_nothing(
    tmp_path: Path,
) -> None:
    """As from a task that partition 0 has lost, and that goes on sending."""
    receiver = CheckpointReceiver(CheckpointStore(tmp_path, keep=3))
    put, discard = (receiver.handlers[kind].handle for kind in (UploadPart, DiscardCheckpoint))

    def coming() -> Iterator[Any]:
        yield Piece("first", 1, [b"1"])
        assert discard(DiscardCheckpoint("run-1", "place"), iter(())) is None
        assert list(tmp_path.iterdir()) == []
        yield Piece("second", 1, [b"2"])
        raise ConnectionResetError("the task is gone")

    with pytest.raises(OSError, match="gone"):
        put(UploadPart("run-1", "place", 4, 1), coming())
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_saves_a_later_step_has_passed_over_an_earlier_one(
    store: Store, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            run.save_all(1, ranks=[0, 1, 2])
            run.save_all(2, ranks=[0, 1, 3])
            (text,) = run.errors
            assert "step 1 has 3 of 4 ranks' files: rank 3 did not save it" in text
            run.save_all(2, ranks=[2])
            assert await run.uploader.drain(10)
            assert steps(store) == [2]

    asyncio.run(scenario())


@pytest.mark.parametrize("times", [2, 3])
def test_a_network_that_breaks_at_the_commit_is_tried_again(
    store: Store, tmp_path: Path, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, errors = store.commit, [ConnectionResetError("gone")] * times
    monkeypatch.setattr(retrying, "RETRY_SECONDS", 0.01)

    def break_off(*arguments: Any) -> Manifest:
        if errors:
            raise errors.pop()
        return commit(*arguments)

    monkeypatch.setattr(store, "commit", break_off)

    async def scenario() -> None:
        async with running(store, tmp_path / "scratch") as run:
            run.save_all(1)
            assert await run.uploader.drain(10)
            assert (steps(store), len(run.errors)) == (([1], 0) if times == 2 else ([], 1))

    asyncio.run(scenario())
