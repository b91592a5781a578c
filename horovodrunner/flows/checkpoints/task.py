"""Checkpoints on their way, while main goes on. Runs in: the task (np < 0: the driver)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import threading
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.call.record import calls_another_main, changes
from horovodrunner.flows.checkpoints.manifest import Manifest
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.checkpoints.tree import pieces_of_tree, restore
from horovodrunner.placement.topology import Member
from horovodrunner.wire.events import (
    CheckpointSaved,
    CheckpointStored,
    FetchCheckpoint,
    FindCheckpoint,
    Handlers,
    Latest,
    LatestDecided,
    Sink,
    UploadCheckpoint,
    ignore,
)
from horovodrunner.wire.upload import TransferClient, in_thread

__all__ = [
    "CheckpointBackend",
    "CheckpointUploader",
    "DriverBackend",
    "LatestCopy",
    "LatestDecision",
    "Resumption",
]

PUT_ATTEMPTS = 3
RETRY_SECONDS = 2.0


class CheckpointBackend(Protocol):
    """Keeps checkpoints; every method blocks, and raises an exception when it fails."""

    def put(self, step: int, directory: Path) -> None:
        """Store the files below a directory as the checkpoint of a step, all or nothing."""

    def find_latest(self) -> tuple[Manifest | None, Sequence[str]]:
        """Find the newest sound checkpoint, and write a sentence about each damaged one."""

    def fetch(self, manifest: Manifest, directory: Path) -> None:
        """Copy a checkpoint's files into an empty directory and check their hashes."""


class DriverBackend:
    """A directory on the driver; a store that the task reaches itself is a backend, too."""

    def __init__(self, client: TransferClient) -> None:
        self._client = client

    def put(self, step: int, directory: Path) -> None:
        self._client.upload(UploadCheckpoint(self._client.run_id, step), pieces_of_tree(directory))

    def find_latest(self) -> tuple[Manifest | None, Sequence[str]]:
        with self._client.download(FindCheckpoint(self._client.run_id)) as pieces:
            (answer,) = (json.loads(piece.read()) for piece in pieces)
        text = answer["manifest"]
        return (Manifest.from_json(text) if text else None), answer["damaged"]

    def fetch(self, manifest: Manifest, directory: Path) -> None:
        with self._client.download(FetchCheckpoint(self._client.run_id, manifest.step)) as pieces:
            restore(manifest, directory, pieces)


class CheckpointUploader:
    """Stores rank 0's checkpoints: one at a time, and the newest one wins.

    `note` takes a line for the user, `on_error` one about a checkpoint that could not be stored.
    """

    def __init__(
        self,
        backend: CheckpointBackend,
        note: Callable[[str], None],
        on_error: Callable[[str], None],
        to_driver: Sink = ignore,
    ) -> None:
        self._backend = backend
        self._to_driver = to_driver
        self._note = note
        self._on_error = on_error
        self._waiting: tuple[int, Path] | None = None
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._has_warned = False
        self.has_saved = False
        """Whether main has saved any."""
        self.handlers: Handlers = {
            CheckpointSaved: lambda event: self.saved(event.step, Path(event.directory))
        }

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return self._idle.is_set()

    def saved(self, step: int, directory: Path) -> None:
        """Take over a directory that main has filled; it is deleted when it is not needed."""
        self.has_saved = True
        if self._waiting is not None:
            skipped, stale = self._waiting
            # gigabytes are deleted elsewhere than in the event loop
            threading.Thread(target=_delete_tree, args=[stale], daemon=True).start()
            if not self._has_warned:
                self._has_warned = True
                self._note(
                    f"checkpoints are saved faster than they can be stored: step {skipped} is "
                    "skipped, the newest one wins (said once)"
                )
        self._waiting = (step, directory)
        self._idle.clear()
        self._changed.set()

    async def run(self) -> None:
        """Store what is saved, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._waiting is not None:
                (step, directory), self._waiting = self._waiting, None
                await self._put(step, directory)
                await in_thread(_delete_tree, directory)
            self._idle.set()

    async def drain(self, timeout: float) -> bool:
        """Wait at most so many seconds until nothing is on its way; return whether that is so."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        return self.is_idle

    async def _put(self, step: int, directory: Path) -> None:
        for attempt in range(1, PUT_ATTEMPTS + 1):
            try:
                await in_thread(self._backend.put, step, directory)
                self._to_driver(CheckpointStored(step))
            except (ConnectionError, TimeoutError) as error:
                if attempt < PUT_ATTEMPTS and self._waiting is None:
                    await asyncio.sleep(RETRY_SECONDS)  # the network may come back
                    continue
                self._report(step, error)
            except Exception as error:  # noqa: BLE001 - a file system of anybody's may raise any
                self._report(step, error)
            return

    def _report(self, step: int, error: Exception) -> None:
        text = str(error) if type(error) is OSError else f"{type(error).__name__}: {error}"
        self._on_error(
            f"the checkpoint of step {step} was not stored: {text}. Older checkpoints are intact"
        )


def _delete_tree(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


class LatestDecision:
    """Decides once per attempt which checkpoint all ranks start from. On partition 0.

    Tasks of one host share one copy: the first that asks fetches, the others link to it. `on_found`
    returns whether the checkpoint found is of a run that was called with something else.
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
        self._note = note
        self._decision: asyncio.Task[LatestDecided] | None = None
        self._copies: dict[str, asyncio.Future[str]] = {}
        self._fetching: dict[int, asyncio.Future[str]] = {}

    async def answer(self, partition: int) -> LatestDecided:
        """Return the latest checkpoint, the same for every task, and how this task gets it."""
        if self._decision is None:
            self._decision = asyncio.create_task(self._decide())
        decision = await asyncio.shield(self._decision)
        if not decision.manifest:
            return decision
        host = self._hosts[partition]
        if host in self._copies:
            return decision.replace(copy_from=await asyncio.shield(self._copies[host]))
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._copies[host] = self._fetching[partition] = future
        return decision

    def fetched(self, partition: int, directory: str) -> None:
        """Note where a task has put its copy; "" if it has none, also when the task is gone."""
        future = self._fetching.get(partition)
        if future is not None and not future.done():
            future.set_result(directory)

    async def _decide(self) -> LatestDecided:
        if self._backend is None:
            return LatestDecided()
        try:
            manifest, damaged = await in_thread(self._backend.find_latest)
            for sentence in damaged:
                self._note(sentence)
            differs = manifest is not None and self._on_found(manifest)
        except Exception as error:  # noqa: BLE001 - starting anew would lose work: main must know
            return LatestDecided(error=f"{type(error).__name__}: {error}")
        text = manifest.to_json() if manifest is not None else ""
        return LatestDecided(text.encode(), differs=differs)


class LatestCopy:
    """Fetches the latest checkpoint once for all workers of a task.

    `ask` asks partition 0 for the decision; `tell` tells it where the copy is.
    """

    def __init__(
        self,
        backend: CheckpointBackend | None,
        scratch: Path,
        ask: Callable[[], Awaitable[LatestDecided]],
        tell: Callable[[str], None],
    ) -> None:
        self._backend = backend
        self._scratch = scratch
        self._ask = ask
        self._tell = tell
        self._answer: asyncio.Task[Latest] | None = None

    async def get(self) -> Latest:
        """Return where the copy is."""
        if self._answer is None:
            self._answer = asyncio.create_task(self._fetch())
        return await asyncio.shield(self._answer)

    async def _fetch(self) -> Latest:
        answer = await self._ask()
        if answer.error or not answer.manifest or self._backend is None:
            return Latest(error=answer.error)
        manifest = Manifest.from_json(answer.manifest.decode())
        directory = self._scratch / f"latest-{manifest.step}"
        try:
            if not await in_thread(_link_copy, manifest, answer.copy_from, directory):
                directory.mkdir()
                await in_thread(self._backend.fetch, manifest, directory)
        except Exception as error:  # noqa: BLE001 - starting anew would lose work: main must know
            self._tell("")
            return Latest(error=f"{type(error).__name__}: {error}")
        self._tell(str(directory))
        return Latest(str(directory), manifest.step, answer.differs)


class Resumption:
    """Notes on partition 0, once in a run, that main goes on from another run's checkpoint."""

    def __init__(self, job: JobSpec, note: Callable[[str], None]) -> None:
        self._job = job
        self._note = note
        self._went_on_from: Manifest | None = None

    def found(self, manifest: Manifest) -> bool:
        """Return whether a checkpoint is of a run that was called with something else."""
        saver, record, location = manifest.run, self._job.record, self._job.checkpoint_location
        if record is None or location is None:
            return False
        if saver is not None and saver.run_id == record.run_id:  # an earlier attempt of this run
            return False
        if saver is None or not calls_another_main(saver, record):
            self._went_on_from = manifest
        found = [] if saver is None else changes(saver, record)
        if self._job.attempt == 1:  # later attempts are announced by the driver
            path = CheckpointStore(location, self._job.keep_checkpoints).path_of(manifest.step)
            for text in _describe_resumption(manifest, path, found):
                self._note(text)
        return bool(found)

    def main_returned(self, *, has_saved: bool) -> None:
        """Note that a run which went on from a checkpoint may have had nothing left to do."""
        if self._went_on_from is not None and not has_saved:
            self._note(
                f"main went on from step {self._went_on_from.step} and returned without saving a "
                "checkpoint. If it has trained nothing, its last epoch was reached before: raise "
                "the number of epochs, or start anew with resume=False"
            )


def _describe_resumption(manifest: Manifest, path: str, differences: Sequence[str]) -> list[str]:
    """Write that a run goes on from an earlier one's checkpoint, and what differs."""
    saved_at = datetime.fromisoformat(manifest.saved_at)
    age = _format_age((datetime.now(timezone.utc) - saved_at).total_seconds())
    unknown = " (what that was called with is not recorded)" if manifest.run is None else ""
    lines = [
        f"going on from step {manifest.step}, saved {age} by an earlier run{unknown}: {path}. "
        "resume=False starts anew"
    ]
    if differences:
        lines.append(
            "warning: this run differs from the one that saved that checkpoint: "
            f"{'; '.join(differences)}. What main loads from it, such as an optimizer's learning "
            "rate, replaces the new values"
        )
    return lines


def _format_age(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        if (count := int(seconds // length)) >= 1:
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"  # or in the future, by another machine's clock


def _link_copy(manifest: Manifest, source: str, directory: Path) -> bool:
    """Share a verified copy of another task on this host; False where that does not work."""
    if not source:
        return False
    try:
        directory.mkdir()
        for file in manifest.files:
            target = directory / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(Path(source) / file.path, target)
        for name in manifest.directories:
            (directory / name).mkdir(parents=True, exist_ok=True)
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
        return False
    return True
