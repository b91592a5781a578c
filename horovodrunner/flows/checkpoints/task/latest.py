"""Which checkpoint all ranks start from, and each task's copy of it.

Runs in: the task (np < 0: the driver).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from horovodrunner.flows.checkpoints.manifest import Manifest, directory_of
from horovodrunner.flows.checkpoints.task.backend import CheckpointBackend
from horovodrunner.placement.topology import Member
from horovodrunner.wire.events import Latest, LatestDecided, LatestWanted, RangesRead, RangesWanted
from horovodrunner.wire.upload import in_thread

__all__ = ["LatestCopy", "LatestDecision"]

_WHOLE, _NOTHING = -1, -2
"""Parts of a checkpoint that are no rank's: what rank 0 saved for all, and none."""


class LatestDecision:
    """Decides once per attempt which checkpoint all ranks start from. On partition 0.

    Tasks of one host share one copy of each part: the first that asks fetches, the others link to
    it. `on_found` returns whether the checkpoint found is of a run that was called with something
    else.
    """

    def __init__(
        self,
        backend: CheckpointBackend | None,
        members: Sequence[Member],
        note: Callable[[str], None],
        on_found: Callable[[Manifest], bool] = lambda manifest: False,
    ) -> None:
        self._backend = backend
        self._on_found = on_found
        self._hosts = {member.partition: member.host_id for member in members}
        self._size = sum(member.workers for member in members)
        self._note = note
        self._decision: asyncio.Task[tuple[Manifest | None, LatestDecided]] | None = None
        self._copies: dict[tuple[str, int], asyncio.Future[str]] = {}
        self._fetching: dict[tuple[int, int], asyncio.Future[str]] = {}

    async def answer(self, partition: int, wanted: LatestWanted) -> LatestDecided:
        """Return the latest checkpoint, the same for every task, and how this task gets it."""
        if self._decision is None:
            self._decision = asyncio.create_task(self._decide())
        manifest, decision = await asyncio.shield(self._decision)
        decision = decision.replace(rank=wanted.rank, asked=wanted.part)
        if manifest is None:
            return decision
        part = _part_of(manifest, wanted, self._size)
        if part == _NOTHING:
            return decision.replace(part=part)
        key = self._hosts[partition], part
        if key in self._copies:
            copy = await asyncio.shield(self._copies[key])
            return decision.replace(part=part, copy_from=copy)
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._copies[key] = self._fetching[partition, part] = future
        return decision.replace(part=part)

    def fetched(self, partition: int, part: int, directory: str) -> None:
        """Note where a task has put its copy of a part; "" if it has none."""
        future = self._fetching.get((partition, part))
        if future is not None and not future.done():
            future.set_result(directory)

    def lost(self, partition: int) -> None:
        """Note that a task is gone."""
        for each, part in list(self._fetching):
            if each == partition:
                self.fetched(partition, part, "")

    async def _decide(self) -> tuple[Manifest | None, LatestDecided]:
        decided = LatestDecided(-1, -1)
        if self._backend is None:
            return None, decided
        try:
            manifest, damaged = await in_thread(self._backend.find_latest)
            for sentence in damaged:
                self._note(sentence)
            differs = manifest is not None and self._on_found(manifest)
        except Exception as error:  # noqa: BLE001 - starting anew would lose work: main must know
            return None, decided.replace(error=f"{type(error).__name__}: {error}")
        if manifest is None:
            return None, decided
        return manifest, decided.replace(manifest=manifest.to_json().encode(), differs=differs)


def _part_of(manifest: Manifest, wanted: LatestWanted, size: int) -> int:
    if manifest.world_size is None:
        return _WHOLE
    if wanted.part >= 0:
        return wanted.part
    return wanted.rank if manifest.world_size == size else _NOTHING


class LatestCopy:
    """Fetches what a task's workers want of the latest checkpoint, each part once.

    `ask` asks partition 0 for the decision; `tell` tells it where the copy of a part is.
    """

    def __init__(
        self,
        backend: CheckpointBackend | None,
        scratch: Path,
        ask: Callable[[LatestWanted], Awaitable[LatestDecided]],
        tell: Callable[[int, str], None],
    ) -> None:
        self._backend = backend
        self._scratch = scratch
        self._ask = ask
        self._tell = tell
        self._manifest: Manifest | None = None
        self._answers: dict[tuple[int, int], asyncio.Task[Latest]] = {}
        self._fetches: dict[int, asyncio.Task[Latest]] = {}
        self._numbers = itertools.count()

    async def get(self, wanted: LatestWanted) -> Latest:
        """Return where the copy is."""
        key = wanted.rank, wanted.part
        if key not in self._answers:
            self._answers[key] = asyncio.create_task(self._answer(wanted))
        return await asyncio.shield(self._answers[key])

    async def read(self, wanted: RangesWanted) -> RangesRead:
        """Return where the bytes are that a worker wants; it deletes the file."""
        path = self._scratch / f"ranges-{next(self._numbers)}"
        try:
            if self._backend is None or self._manifest is None:
                raise FileNotFoundError("no checkpoint was asked for before")
            ranges = [(name, start, length) for name, start, length in json.loads(wanted.ranges)]
            await in_thread(self._backend.read_into, path, self._manifest, ranges)
        except Exception as error:  # noqa: BLE001 - main must know
            path.unlink(missing_ok=True)
            return RangesRead(error=f"{type(error).__name__}: {error}")
        return RangesRead(str(path))

    async def _answer(self, wanted: LatestWanted) -> Latest:
        decided = await self._ask(wanted)
        if decided.error or not decided.manifest or self._backend is None:
            return Latest(error=decided.error)
        part = decided.part
        if part not in self._fetches:
            self._fetches[part] = asyncio.create_task(self._fetch(decided, self._backend))
        return await asyncio.shield(self._fetches[part])

    async def _fetch(self, decided: LatestDecided, backend: CheckpointBackend) -> Latest:
        manifest, part = Manifest.from_json(decided.manifest.decode()), decided.part
        self._manifest = manifest
        directory = self._scratch / f"latest-{manifest.step}"
        if part != _WHOLE:
            directory = directory / (directory_of(part) if part >= 0 else "none")
        rank = part if part >= 0 else None
        of_all = b"" if manifest.world_size is None else decided.manifest
        answer = Latest(str(directory), manifest.step, decided.differs, manifest=of_all)
        try:
            if part == _NOTHING:
                directory.mkdir(parents=True)
                return answer
            if not await in_thread(_link_copy, manifest, rank, decided.copy_from, directory):
                directory.mkdir(parents=True)
                await in_thread(backend.fetch, manifest, directory, rank)
        except Exception as error:  # noqa: BLE001 - starting anew would lose work: main must know
            self._tell(part, "")
            return Latest(error=f"{type(error).__name__}: {error}")
        self._tell(part, str(directory))
        return answer


def _link_copy(manifest: Manifest, rank: int | None, source: str, directory: Path) -> bool:
    """Share a verified copy of another task on this host; False where that does not work."""
    if not source:
        return False
    try:
        directory.mkdir(parents=True)
        for path in manifest.files_of(rank):
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(Path(source) / path, target)
        for name in manifest.directories_of(rank):
            (directory / name).mkdir(parents=True, exist_ok=True)
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
        return False
    return True
