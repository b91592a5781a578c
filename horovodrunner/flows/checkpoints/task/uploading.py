"""Stores checkpoints; those of all ranks count at once. Runs in: partition 0's task.

A checkpoint of all ranks has two phases: every task stores what its ranks have saved, and once all
have, one manifest lets it count. Nothing is stored before every rank has saved its part::

    worker ── PartSaved ──▶ its task ── PartWaits ──▶ partition 0
    all tasks ◀── ListParts ── partition 0            which files may be the same?
    all tasks ◀── StoreParts ── partition 0           all but those that another rank stores
              ── PartAnswer ──▶                       sizes and hashes
                                partition 0 ── the manifest ──▶ the driver or the object store
    all tasks ◀── DropParts ── partition 0
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from horovodrunner.flows.checkpoints.manifest import Part, directory_of
from horovodrunner.flows.checkpoints.store import draft
from horovodrunner.flows.checkpoints.task.backend import CheckpointBackend
from horovodrunner.flows.checkpoints.task.parts import delete_tree
from horovodrunner.flows.checkpoints.task.retrying import in_thread_again
from horovodrunner.flows.checkpoints.task.saves import Save, Saves
from horovodrunner.flows.checkpoints.task.telling import CheckpointNotes
from horovodrunner.wire.events import (
    CheckpointSaved,
    CheckpointStored,
    DropParts,
    Ended,
    Event,
    Handlers,
    ListParts,
    PartAnswer,
    PartWaits,
    Sink,
    StoreParts,
    ignore,
)
from horovodrunner.wire.upload import in_thread

__all__ = ["CheckpointUploader"]


class _NotStoredError(Exception):
    """A part could not be stored; the text says whose and why."""

    def __init__(self, ranks: Iterable[int], why: str) -> None:
        super().__init__(why)
        self.ranks = sorted(ranks)


class CheckpointUploader:
    """Stores checkpoints, one at a time; of several that wait the newest wins.

    `note` takes a line for the user, `on_error` one about a checkpoint that could not be stored,
    `ask` an event for every task. `hosts` has the host of every rank.
    """

    def __init__(
        self,
        backend: CheckpointBackend,
        note: Callable[[str], None],
        on_error: Callable[[str], None],
        to_driver: Sink = ignore,
        *,
        ask: Sink = ignore,
        hosts: Mapping[int, str] | None = None,
    ) -> None:
        self._backend = backend
        self._to_driver = to_driver
        self._ask = ask
        self._hosts = dict(hosts or {0: ""})
        self._notes = CheckpointNotes(len(self._hosts), note, on_error)
        self._saves = Saves(self._hosts, self._notes, self._drop, self._note_change)
        self._storing: Save | None = None
        self._numbers = itertools.count()
        self._answers: dict[int, dict[int, asyncio.Future[PartAnswer]]] = {}
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.has_saved = False
        """Whether main has saved any."""
        self.handlers: Handlers = {
            CheckpointSaved: self._take_whole,
            PartWaits: self._saves.take_part,
            PartAnswer: self._take_answer,
            Ended: lambda event: self._saves.ranks_are_gone(
                {event.rank: f"rank {event.rank} ended without saving its own"}
            ),
        }

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return self._idle.is_set()

    def saved(self, step: int, directory: Path, metrics: Mapping[str, float] | None = None) -> None:
        """Take over a directory that rank 0 has filled; it is deleted when it is not needed."""
        self._saves.take_whole(CheckpointSaved(step, str(directory), dict(metrics or {})))

    def lost(self, ranks: Collection[int]) -> None:
        """Note that a task is gone, and with it what its ranks have saved and is not stored."""
        self._saves.task_is_lost(ranks)
        for rank in ranks:
            for answers in self._answers.values():
                if (answer := answers.get(rank)) is not None and not answer.done():
                    answer.set_result(PartAnswer(rank, -1, error=self._saves.gone[rank]))

    def no_more(self) -> None:
        """Give up what some ranks have not saved yet: they will not."""
        self._saves.ranks_are_gone(
            {rank: f"rank {rank} did not save its own" for rank in self._hosts}
        )

    async def run(self) -> None:
        """Store what is saved, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while (save := self._saves.next()) is not None:
                self._storing = save
                if save.directory is not None:
                    await self._put(save, save.directory)
                    await in_thread(delete_tree, save.directory)
                else:
                    try:
                        await self._put_parts(save)
                    finally:
                        self._saves.resolve(save)
                        self._drop(save)
                self._storing = None
            self._note_idleness()

    async def drain(self, timeout: float) -> bool:
        """Wait at most so many seconds until nothing is on its way; return whether that is so."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        return self.is_idle

    def _take_whole(self, event: CheckpointSaved) -> None:
        if event.problem:
            self._notes.not_stored(event.step, event.problem)
        else:
            self._saves.take_whole(event)

    def _drop(self, save: Save) -> None:
        if save.directory is None:
            self._ask(DropParts(save.step, save.turn))
        else:
            # gigabytes are deleted elsewhere than in the event loop
            threading.Thread(target=delete_tree, args=[save.directory], daemon=True).start()

    def _note_change(self) -> None:
        if self._saves:
            self.has_saved = True
            self._idle.clear()
            self._changed.set()
        self._note_idleness()

    def _note_idleness(self) -> None:
        if not self._saves and self._storing is None:
            self._idle.set()

    async def _put(self, save: Save, directory: Path) -> None:
        def nothing_newer_waits() -> bool:
            return not self._saves

        try:
            await in_thread_again(
                self._backend.put,
                save.step,
                directory,
                save.metrics,
                is_wanted=nothing_newer_waits,
            )
        except Exception as error:  # noqa: BLE001 - a file system of anybody's may raise any
            self._notes.not_stored(save.step, error)
        else:
            self._to_driver(CheckpointStored(save.step, dict(save.metrics)))

    async def _put_parts(self, save: Save) -> None:
        place = ""
        try:
            place = await in_thread(self._backend.begin, save.step)
            parts, copies = await self._store_parts(save, place)
            manifest = draft(
                save.step, parts, save.metrics, world_size=len(self._hosts), copies=copies
            )
            await in_thread_again(self._backend.commit, place, manifest)
        except BaseException as error:
            if place:  # in a thread of its own: this may be the end of the run
                threading.Thread(target=self._discard, args=[place], daemon=True).start()
            if isinstance(error, _NotStoredError):
                self._notes.incomplete(save.step, error.ranks, str(error))
            elif isinstance(error, Exception):
                self._notes.not_stored(save.step, error)
            else:
                raise
        else:
            self._to_driver(CheckpointStored(save.step, dict(save.metrics)))

    async def _store_parts(self, save: Save, place: str) -> tuple[list[Part], dict[str, str]]:
        """Let all tasks store their parts, what is the same once; return these, and the copies."""
        listed: dict[int, dict[str, list[Any]]] = {}
        if len(self._hosts) > 1:
            listed = await self._all(lambda number: ListParts(number, save.step, save.turn))
        sources = _likely_copies(listed)
        choice = {
            rank: {"hash": sorted(name for of, name in sources if of == rank)}
            for rank in {rank for rank, _ in sources}
        }
        stored = await self._all(
            lambda number: StoreParts(number, save.step, save.turn, place, _to_json(choice))
        )
        parts = [Part.from_json(stored[rank]["part"]) for rank in sorted(stored)]
        there = {file.path: [file.size, file.sha256] for part in parts for file in part.files}
        copies: dict[str, str] = {}
        differ: dict[int, dict[str, list[str]]] = {rank: {"store": []} for rank in self._hosts}
        for (rank, name), source in sources.items():
            if there[source] == stored[rank]["hashes"][name]:
                copies[f"{directory_of(rank)}/{name}"] = source
            else:
                differ[rank]["store"].append(name)
        if any(each["store"] for each in differ.values()):
            more = await self._all(
                lambda number: StoreParts(number, save.step, save.turn, place, _to_json(differ))
            )
            parts += [Part(Part.from_json(more[rank]["part"]).files) for rank in sorted(more)]
        return parts, copies

    async def _all(self, request: Callable[[int], Event]) -> dict[int, Any]:
        """Let all tasks do something with a checkpoint's parts, and return what they answer."""
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        self._answers[number] = answers = {rank: loop.create_future() for rank in self._hosts}
        for rank in self._saves.lost:
            answers[rank].set_result(PartAnswer(rank, number, error=self._saves.gone[rank]))
        try:
            self._ask(request(number))
            # all of them: what is at the place must not be deleted while others write there
            found = await asyncio.gather(*answers.values())
        finally:
            del self._answers[number]
        failed = [answer for answer in found if answer.error]
        if failed:
            raise _NotStoredError(
                (answer.rank for answer in failed), self._describe_failure(failed[0])
            )
        return {answer.rank: json.loads(answer.content) for answer in found}

    def _take_answer(self, event: PartAnswer) -> None:
        answer = self._answers.get(event.number, {}).get(event.rank)
        if answer is not None and not answer.done():
            answer.set_result(event)

    def _describe_failure(self, answer: PartAnswer) -> str:
        if answer.error == self._saves.gone.get(answer.rank):
            return answer.error
        where = f" on {self._hosts[answer.rank]}" if self._hosts[answer.rank] else ""
        return f"what rank {answer.rank}{where} saved could not be stored: {answer.error}"

    def _discard(self, place: str) -> None:
        with contextlib.suppress(Exception):  # the driver deletes what is left, too
            self._backend.discard(place)


def _likely_copies(listed: Mapping[int, Mapping[str, list[Any]]]) -> dict[tuple[int, str], str]:
    """Return, for files that may be the same as one of a lower rank's, where that one is stored.

    >>> _likely_copies({0: {"a": [3, "x"]}, 1: {"a": [3, "x"], "b": [3, "y"]}})
    {(1, 'a'): 'rank-0/a'}
    """
    first: dict[tuple[Any, ...], tuple[int, str]] = {}
    found = {}
    for rank, files in sorted(listed.items()):
        for name, print_of_file in sorted(files.items()):
            owner, path = first.setdefault(
                tuple(print_of_file), (rank, f"{directory_of(rank)}/{name}")
            )
            if owner != rank:
                found[rank, name] = path
    return found


def _to_json(choice: Mapping[int, Any]) -> bytes:
    return json.dumps(choice).encode() if choice else b""
