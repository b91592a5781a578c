"""What the ranks of a task save of checkpoints of all ranks, until it is stored. Runs in: the task.

A rank's part waits here until partition 0, which knows what the others have, decides what becomes
of it (flows/checkpoints/task/saves.py and uploading.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from horovodrunner.flows.checkpoints.task.backend import CheckpointBackend
from horovodrunner.flows.checkpoints.task.retrying import in_thread_again
from horovodrunner.flows.checkpoints.tree import files_below, pieces_of_tree, sha256_of
from horovodrunner.formatting import in_one_line
from horovodrunner.wire.events import (
    DropParts,
    Event,
    Handlers,
    ListParts,
    PartAnswer,
    PartSaved,
    PartWaits,
    Sink,
    StoreParts,
    Storing,
)
from horovodrunner.wire.upload import chunks_of

__all__ = ["PartKeeper", "delete_tree"]

STORING_SECONDS = 2.0
"""How often it is reported that parts still wait."""

_SAMPLE_BYTES = 64 * 1024
"""So much of a file's beginning, middle and end tells whether another may be the same."""

_Key = tuple[int, int]
"""A step, and which of the checkpoints of this step it is."""


class PartKeeper:
    """Keeps a task's parts, and does with them what partition 0 says; `emit` is the way to it."""

    def __init__(self, backend: CheckpointBackend, emit: Sink) -> None:
        self._backend = backend
        self._emit = emit
        self._parts: dict[_Key, dict[int, Path]] = {}
        self._saved: Counter[tuple[int, int]] = Counter()
        self._working: set[asyncio.Task[None]] = set()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self.handlers: Handlers = {PartSaved: self._take}
        """Of what workers report."""
        self.requests: Handlers = {
            ListParts: self._list,
            StoreParts: self._store,
            DropParts: self._drop,
        }
        """Of what partition 0 asks for."""

    async def finish(self, ended: asyncio.Future[Any]) -> None:
        """Wait until no part waits any more, or until partition 0 is gone."""
        while not (self._is_empty.is_set() or ended.done()):
            self._emit(Storing())
            empty = asyncio.create_task(self._is_empty.wait())
            await asyncio.wait(
                [empty, ended], timeout=STORING_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            empty.cancel()

    def _take(self, event: PartSaved) -> None:
        self._saved[event.rank, event.step] += 1
        turn = self._saved[event.rank, event.step]
        if not event.problem:
            parts = self._parts.setdefault((event.step, turn), {})
            parts[event.rank] = Path(event.directory)
            self._is_empty.clear()
        self._emit(
            PartWaits(event.rank, event.step, turn, event.problem, event.metrics, event.guess)
        )

    def _list(self, event: ListParts) -> None:
        def listed(rank: int, directory: Path) -> Any:
            files, _ = files_below(directory)
            return {name: fingerprint(path) for name, path in files.items()}

        self._for_each_part(event, (event.step, event.turn), listed)

    def _store(self, event: StoreParts) -> None:
        choice = json.loads(event.choice) if event.choice else {}

        def stored(rank: int, directory: Path) -> Any:
            chosen = choice.get(str(rank), {})
            hashed, wanted = set(chosen.get("hash", ())), chosen.get("store")
            is_wanted: Callable[[str], bool] = (
                (lambda name: name not in hashed) if wanted is None else set(wanted).__contains__
            )
            part = self._backend.put_part(event.place, rank, pieces_of_tree(directory, is_wanted))
            hashes = {name: _size_and_sha256(directory / name) for name in sorted(hashed)}
            return {"part": part.to_json(), "hashes": hashes}

        self._for_each_part(event, (event.step, event.turn), stored)

    def _drop(self, event: DropParts) -> None:
        for directory in self._parts.pop((event.step, event.turn), {}).values():
            # gigabytes are deleted elsewhere than in the event loop
            threading.Thread(target=delete_tree, args=[directory], daemon=True).start()
        if not self._parts:
            self._is_empty.set()

    def _for_each_part(
        self, event: ListParts | StoreParts, key: _Key, work: Callable[[int, Path], Any]
    ) -> None:
        """Work on the parts one after the other, in a thread, and answer for each."""

        async def answer() -> None:
            for rank, directory in list(self._parts.get(key, {}).items()):
                self._emit(await _answer(rank, event.number, work, directory))

        task = asyncio.create_task(answer())
        self._working.add(task)
        task.add_done_callback(self._working.discard)


async def _answer(
    rank: int, number: int, work: Callable[[int, Path], Any], directory: Path
) -> Event:
    try:
        content = json.dumps(await in_thread_again(work, rank, directory)).encode()
    except Exception as error:  # noqa: BLE001 - a file system of anybody's may raise any
        return PartAnswer(rank, number, error=in_one_line(error))
    return PartAnswer(rank, number, content=content)


def fingerprint(path: Path) -> list[Any]:
    """Return a file's size, and a hash of parts of it: files that differ there are not the same."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in (0, size // 2, size - _SAMPLE_BYTES):
            file.seek(max(start, 0))
            digest.update(file.read(_SAMPLE_BYTES))
    return [size, digest.hexdigest()]


def _size_and_sha256(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, sha256_of(chunks_of(file))]


def delete_tree(directory: Path) -> None:
    """Delete a directory as far as possible."""
    shutil.rmtree(directory, ignore_errors=True)
