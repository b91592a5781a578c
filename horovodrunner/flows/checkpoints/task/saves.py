"""Which of the checkpoints that main has saved are to be stored. Runs in: partition 0's task.

Pure: of several that are complete the newest wins, and what some ranks will never save is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from horovodrunner.flows.checkpoints.task.telling import CheckpointNotes
from horovodrunner.formatting import ranks_in_words
from horovodrunner.wire.events import CheckpointSaved, PartWaits

__all__ = ["MAX_INCOMPLETE", "Save", "Saves"]

MAX_INCOMPLETE = 4
"""So many checkpoints wait for slower ranks; then the oldest but one is given up."""


@dataclass(eq=False)
class Save:
    """A checkpoint that main has saved, on rank 0 or, so far, on some ranks."""

    step: int
    turn: int = 0
    directory: Path | None = None
    """Where rank 0's is; None: every rank has its part."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)
    """Those that have saved their part."""
    guess: int = 0
    """Which call of each rank's it was whose objects told who saves; 0: main did."""

    @property
    def is_of_all(self) -> bool:
        """Whether every rank saves its part."""
        return self.directory is None


class Saves:
    """Those that wait, the oldest first.

    `hosts` has the host of every rank. `drop` is called with what is not to be stored any more,
    `on_change` when there may be another one to store, or none left.
    """

    def __init__(
        self,
        hosts: Mapping[int, str],
        notes: CheckpointNotes,
        drop: Callable[[Save], object],
        on_change: Callable[[], object],
    ) -> None:
        self._hosts = hosts
        self._notes = notes
        self._drop_elsewhere = drop
        self._on_change = on_change
        self._waiting: list[Save] = []
        self._resolved: set[tuple[int, int]] = set()
        self._guessed_alone: set[tuple[int, int]] = set()
        """Steps and calls that rank 0 has saved for all because its objects looked like it."""
        self.gone: dict[int, str] = {}
        """Ranks that save nothing any more, and why."""
        self.lost: set[int] = set()
        """Those of them whose task is gone, and with it what it has not stored."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def next(self) -> Save | None:
        """Take out the oldest one that is complete."""
        for save in self._waiting:
            if self._is_complete(save):
                self._waiting.remove(save)
                return save
        return None

    def add(self, save: Save) -> None:
        """Let one wait that rank 0 has saved for all, or of which the first part has come."""
        self._waiting.append(save)
        if self._is_complete(save):
            self._skip_older_than(save)
        incomplete = [each for each in self._waiting if not self._is_complete(each)]
        if len(incomplete) > MAX_INCOMPLETE:
            # not the oldest: a rank that stays behind completes that one next
            late = incomplete[1]
            self._drop(late)
            self._notes.far_apart(late.step, self._missing(late), MAX_INCOMPLETE)
        self._on_change()

    def take_whole(self, event: CheckpointSaved) -> None:
        """Take over a directory that rank 0 has filled."""
        whole = Save(event.step, directory=Path(event.directory), metrics=event.metrics)
        whole.ranks = set(self._hosts)
        whole.guess = event.guess
        self.add(whole)
        if event.guess:
            self._guessed_alone.add((event.step, event.guess))
            self._refuse_mixed(event.step, event.guess)

    def take_part(self, event: PartWaits) -> None:
        """Note that a rank's part waits in its task, or why there is none."""
        key = event.step, event.turn
        if key in self._resolved:  # the others did not wait for it
            self._drop_elsewhere(Save(*key))
            return
        found = [each for each in self._of_all() if (each.step, each.turn) == key]
        save = found[0] if found else Save(*key)
        if not found:
            self.add(save)
        if event.rank == 0:
            save.metrics = event.metrics
            self._put_whole_ones_before(save)  # which rank 0 has saved before it
        save.guess = event.guess
        if event.problem:
            self._give_up(save, {event.rank}, event.problem)
            return
        for older in self._of_all()[: self._of_all().index(save)]:
            if event.rank not in older.ranks:  # every rank saves in order
                missing = self._missing(older)
                self._give_up(older, missing, f"{ranks_in_words(missing)} did not save it")
        save.ranks.add(event.rank)
        if self._is_complete(save):
            self._skip_older_than(save)
            self._on_change()
        self._refuse_mixed(event.step, event.guess)
        self._give_up_incomplete()

    def ranks_are_gone(self, reasons: Mapping[int, str]) -> None:
        """Note, of ranks that save nothing any more, why that is so."""
        self.gone = {**reasons, **self.gone}
        self._give_up_incomplete()

    def task_is_lost(self, ranks: Collection[int]) -> None:
        """Note that a task is gone, and with it what its ranks have saved."""
        for save in self._of_all():
            save.ranks -= set(ranks)
        for rank in ranks:
            self.gone[rank] = f"rank {rank}'s task on {self._hosts[rank]} was lost"
        self.lost.update(ranks)
        self._give_up_incomplete()

    def resolve(self, save: Save) -> None:
        """Note that no rank's part of a checkpoint is wanted any more."""
        if save.is_of_all:
            self._resolved.add((save.step, save.turn))

    def _is_complete(self, save: Save) -> bool:
        return save.ranks >= self._hosts.keys()

    def _missing(self, save: Save) -> set[int]:
        return self._hosts.keys() - save.ranks

    def _of_all(self) -> list[Save]:
        return [each for each in self._waiting if each.is_of_all]

    def _put_whole_ones_before(self, save: Save) -> None:
        at = self._waiting.index(save)
        after = self._waiting[at + 1 :]
        whole = [each for each in after if not each.is_of_all]
        self._waiting[at:] = [*whole, save, *(each for each in after if each.is_of_all)]

    def _skip_older_than(self, newest: Save) -> None:
        for older in self._waiting[: self._waiting.index(newest)]:
            if self._is_complete(older):
                self._drop(older)
                self._notes.saved_in_haste(older.step)

    def _refuse_mixed(self, step: int, guess: int) -> None:
        """Give up what some ranks save for themselves and rank 0 for all, neither of them told."""
        if (step, guess) not in self._guessed_alone:
            return
        mixed = [each for each in self._waiting if (each.step, each.guess) == (step, guess)]
        for save in mixed:
            if save.is_of_all and 0 not in save.ranks:
                for each in mixed:
                    self._drop(each)
                is_stored = all(each.is_of_all for each in mixed)
                self._notes.mixed(save.step, save.ranks, is_stored=is_stored)
                self._on_change()
                return

    def _give_up_incomplete(self) -> None:
        for save in self._of_all():
            gone = self.gone.keys() - save.ranks
            if gone:
                self._give_up(save, gone, "; ".join(self.gone[rank] for rank in sorted(gone)))

    def _give_up(self, save: Save, missing: Iterable[int], why: str) -> None:
        self._drop(save)
        self._notes.incomplete(save.step, missing, why)
        self._on_change()

    def _drop(self, save: Save) -> None:
        self._waiting.remove(save)
        self.resolve(save)
        self._drop_elsewhere(save)
