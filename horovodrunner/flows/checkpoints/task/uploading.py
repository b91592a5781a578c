"""Which checkpoints are stored, and when those of all ranks count. Runs in: partition 0's task.

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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from horovodrunner.flows.checkpoints.manifest import Manifest, Part, directory_of
from horovodrunner.flows.checkpoints.store import draft
from horovodrunner.flows.checkpoints.task.backend import CheckpointBackend
from horovodrunner.flows.checkpoints.task.parts import PUT_ATTEMPTS, RETRY_SECONDS, delete_tree
from horovodrunner.formatting import ranks_in_words
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

MAX_INCOMPLETE = 4
"""So many checkpoints wait for slower ranks; then the oldest but one is given up."""


class _NotStoredError(Exception):
    """A part could not be stored; the text says whose and why."""

    def __init__(self, ranks: Iterable[int], why: str) -> None:
        super().__init__(why)
        self.ranks = sorted(ranks)


@dataclass(eq=False)
class _Save:
    """A checkpoint that main has saved, on rank 0 or, so far, on some ranks."""

    step: int
    turn: int = 0
    directory: Path | None = None
    """Where rank 0's is; None: every rank has its part."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)
    """Those that have saved their part."""
    by_choice: bool = True
    """Whether main said who saves."""

    @property
    def is_of_all(self) -> bool:
        return self.directory is None


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
        self._note = note
        self._on_error = on_error
        self._ask = ask
        self._hosts = dict(hosts or {0: ""})
        self._saves: list[_Save] = []
        self._storing: _Save | None = None
        self._gone: dict[int, str] = {}
        self._resolved: set[tuple[int, int]] = set()
        self._numbers = itertools.count()
        self._answers: dict[int, dict[int, asyncio.Future[PartAnswer]]] = {}
        self._chosen_alone: set[int] = set()
        """Steps that rank 0 has saved for all because of what its objects looked like."""
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._warned: set[str] = set()
        self.has_saved = False
        """Whether main has saved any."""
        self.handlers: Handlers = {
            CheckpointSaved: self._take_whole,
            PartWaits: self._take_part,
            PartAnswer: self._take_answer,
            Ended: lambda event: self._rank_is_gone(event.rank, "ended without saving its own"),
        }

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return self._idle.is_set()

    def saved(self, step: int, directory: Path, metrics: Mapping[str, float] | None = None) -> None:
        """Take over a directory that rank 0 has filled; it is deleted when it is not needed."""
        self._add(_Save(step, directory=directory, metrics=metrics or {}, ranks=set(self._hosts)))

    def lost(self, ranks: Iterable[int]) -> None:
        """Note that a task is gone, and with it what its ranks have saved and is not stored."""
        for rank in ranks:
            why = f"rank {rank}'s task on {self._hosts[rank]} was lost"
            for answers in self._answers.values():
                if (answer := answers.get(rank)) is not None and not answer.done():
                    answer.set_result(PartAnswer(rank, -1, error=why))
            for save in self._saves_of_all():
                save.ranks.discard(rank)
            self._gone[rank] = why
            self._give_up_incomplete()

    def no_more(self) -> None:
        """Give up what some ranks have not saved yet: they will not."""
        for rank in self._hosts:
            self._gone.setdefault(rank, f"rank {rank} did not save its own")
        self._give_up_incomplete()

    async def run(self) -> None:
        """Store what is saved, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while (save := self._next()) is not None:
                self._storing = save
                if save.directory is not None:
                    await self._put(save)
                    await in_thread(delete_tree, save.directory)
                else:
                    try:
                        await self._put_parts(save)
                    finally:
                        self._drop(save)
                self._storing = None
            self._note_idleness()

    async def drain(self, timeout: float) -> bool:
        """Wait at most so many seconds until nothing is on its way; return whether that is so."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        return self.is_idle

    # ---- what is saved, and what of it is to be stored

    def _take_whole(self, event: CheckpointSaved) -> None:
        if event.problem:
            self._report_problem(event.step, event.problem)
            return
        self.saved(event.step, Path(event.directory), event.metrics)
        if not event.by_choice:
            self._chosen_alone.add(event.step)
            self._refuse_mixed(event.step)

    def _take_part(self, event: PartWaits) -> None:
        key = event.step, event.turn
        if key in self._resolved:  # the others did not wait for it
            self._ask(DropParts(*key))
            return
        found = [s for s in self._saves_of_all() if (s.step, s.turn) == key]
        save = found[0] if found else _Save(*key)
        if not found:
            self._add(save)
        if event.rank == 0:
            save.metrics = event.metrics
        save.by_choice &= event.by_choice
        if event.problem:
            self._give_up(save, {event.rank}, event.problem)
            return
        for older in self._saves_of_all()[: self._saves_of_all().index(save)]:
            if event.rank not in older.ranks:  # every rank saves in order
                self._give_up_passed_over(older)
        save.ranks.add(event.rank)
        if self._is_complete(save):
            self._take_complete(save)
        self._refuse_mixed(event.step)
        self._give_up_incomplete()

    def _refuse_mixed(self, step: int) -> None:
        """Give up what some ranks save for themselves and rank 0 for all, neither of them told."""
        if step not in self._chosen_alone:
            return
        for save in self._saves_of_all():
            if save.step == step and not save.by_choice and 0 not in save.ranks:
                for alone in [each for each in self._saves if each.step == step]:
                    self._saves.remove(alone)
                    self._drop(alone)
                self._report_problem(
                    step,
                    f"objects are sharded on {ranks_in_words(save.ranks)} and not on rank 0, so "
                    'that rank 0 would save its own for all: give save_torch(..., ranks="all") on '
                    "every rank",
                )
        self._note_idleness()

    def _add(self, save: _Save) -> None:
        self.has_saved = True
        self._saves.append(save)
        self._idle.clear()
        if self._is_complete(save):
            self._take_complete(save)
        incomplete = [each for each in self._saves if not self._is_complete(each)]
        if len(incomplete) > MAX_INCOMPLETE:
            # not the oldest: a rank that stays behind completes that one next
            late = incomplete[1]
            self._saves.remove(late)
            self._drop(late)
            self._warn_of_distance(late)

    def _take_complete(self, newest: _Save) -> None:
        """Let a checkpoint wait for its turn; what is older is not stored any more."""
        for older in self._saves[: self._saves.index(newest)]:
            if self._is_complete(older):
                self._saves.remove(older)
                self._drop(older)
                self._warn_of_haste(older.step)
        self._changed.set()

    def _next(self) -> _Save | None:
        for save in self._saves:
            if self._is_complete(save):
                self._saves.remove(save)
                return save
        return None

    def _give_up_passed_over(self, save: _Save) -> None:
        missing = self._hosts.keys() - save.ranks
        self._give_up(save, missing, f"{ranks_in_words(missing)} did not save it")

    def _is_complete(self, save: _Save) -> bool:
        return save.ranks >= self._hosts.keys()

    def _saves_of_all(self) -> list[_Save]:
        return [each for each in self._saves if each.is_of_all]

    def _rank_is_gone(self, rank: int, how: str) -> None:
        self._gone.setdefault(rank, f"rank {rank} {how}")
        self._give_up_incomplete()

    def _give_up_incomplete(self) -> None:
        for save in self._saves_of_all():
            gone = self._gone.keys() - save.ranks
            if gone:
                self._give_up(save, gone, "; ".join(self._gone[rank] for rank in sorted(gone)))

    def _give_up(self, save: _Save, missing: Iterable[int], why: str) -> None:
        self._saves.remove(save)
        self._drop(save)
        self._report_missing(save.step, missing, why)
        self._note_idleness()

    def _drop(self, save: _Save) -> None:
        if save.directory is not None:
            # gigabytes are deleted elsewhere than in the event loop
            threading.Thread(target=delete_tree, args=[save.directory], daemon=True).start()
            return
        self._resolved.add((save.step, save.turn))
        self._ask(DropParts(save.step, save.turn))

    def _note_idleness(self) -> None:
        if not self._saves and self._storing is None:
            self._idle.set()

    # ---- storing

    async def _put(self, save: _Save) -> None:
        for attempt in range(1, PUT_ATTEMPTS + 1):
            try:
                await in_thread(self._backend.put, save.step, save.directory, save.metrics)
                self._to_driver(CheckpointStored(save.step, dict(save.metrics)))
            except (ConnectionError, TimeoutError) as error:
                if attempt < PUT_ATTEMPTS and not self._saves:
                    await asyncio.sleep(RETRY_SECONDS)  # the network may come back
                    continue
                self._report(save.step, error)
            except Exception as error:  # noqa: BLE001 - a file system of anybody's may raise any
                self._report(save.step, error)
            return

    async def _put_parts(self, save: _Save) -> None:
        place = ""
        try:
            place = await in_thread(self._backend.begin, save.step)
            parts, copies = await self._store_parts(save, place)
            manifest = draft(
                save.step, parts, save.metrics, world_size=len(self._hosts), copies=copies
            )
            await self._commit(place, manifest)
        except BaseException as error:
            if place:  # in a thread of its own: this may be the end of the run
                threading.Thread(target=self._discard, args=[place], daemon=True).start()
            if isinstance(error, _NotStoredError):
                self._report_missing(save.step, error.ranks, str(error))
            elif isinstance(error, Exception):
                self._report(save.step, error)
            else:
                raise
        else:
            self._to_driver(CheckpointStored(save.step, dict(save.metrics)))

    async def _commit(self, place: str, manifest: Manifest) -> None:
        for _ in range(PUT_ATTEMPTS - 1):
            try:
                await in_thread(self._backend.commit, place, manifest)
            except (ConnectionError, TimeoutError):
                await asyncio.sleep(RETRY_SECONDS)  # the network may come back
            else:
                return
        await in_thread(self._backend.commit, place, manifest)

    async def _store_parts(self, save: _Save, place: str) -> tuple[list[Part], dict[str, str]]:
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
        for rank, why in self._gone.items():
            if why.endswith("was lost"):
                answers[rank].set_result(PartAnswer(rank, number, error=why))
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
        if answer.rank in self._gone and answer.error == self._gone[answer.rank]:
            return answer.error
        where = f" on {self._hosts[answer.rank]}" if self._hosts[answer.rank] else ""
        return f"what rank {answer.rank}{where} saved could not be stored: {answer.error}"

    def _discard(self, place: str) -> None:
        with contextlib.suppress(Exception):  # the driver deletes what is left, too
            self._backend.discard(place)

    # ---- what the user is told

    def _report(self, step: int, error: Exception) -> None:
        text = str(error) if type(error) is OSError else f"{type(error).__name__}: {error}"
        self._report_problem(step, text)

    def _report_problem(self, step: int, text: str) -> None:
        self._on_error(
            f"the checkpoint of step {step} was not stored: {text}. Older checkpoints are intact"
        )

    def _report_missing(self, step: int, missing: Iterable[int], why: str) -> None:
        size = len(self._hosts)
        self._on_error(
            f"the checkpoint of step {step} has {size - len(set(missing))} of {size} ranks' files: "
            f"{why}. It does not count; older checkpoints are intact"
        )

    def _warn_of_haste(self, step: int) -> None:
        self._warn(
            f"checkpoints are saved faster than they can be stored: step {step} is skipped, the "
            "newest one wins (said once)"
        )

    def _warn_of_distance(self, save: _Save) -> None:
        missing = ranks_in_words(self._hosts.keys() - save.ranks)
        self._warn(
            f"the ranks are far apart: step {save.step} is skipped, because {missing} had not "
            f"saved it yet when {MAX_INCOMPLETE} others waited, too (said once)"
        )

    def _warn(self, text: str) -> None:
        about = text.partition(":")[0]
        if about not in self._warned:
            self._warned.add(about)
            self._note(text)


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
