"""What the CheckpointCallbacks of frameworks share. Runs in: the worker."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovodrunner import checkpoint
from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
from horovodrunner.metrics import number_of
from horovodrunner.processes.worker.context import current_context, notice

__all__ = ["Found", "Schedule", "find", "is_first", "read", "save", "write"]


class Schedule:
    """When to save: every so many epochs, and every so many steps if that is wanted."""

    def __init__(self, every_epochs: int, every_steps: int | None) -> None:
        self._epochs = checked.integer("every_epochs", every_epochs, at_least=1)
        self._steps = every_steps
        if every_steps is not None:
            self._steps = checked.integer("every_steps", every_steps, at_least=1)

    @property
    def is_by_steps(self) -> bool:
        """Whether there are checkpoints within an epoch."""
        return self._steps is not None

    def has_epoch(self, done: int) -> bool:
        """Return whether to save when so many epochs are done."""
        return done % self._epochs == 0

    def has_step(self, before: int, after: int) -> bool:
        """Return whether to save now that the number of steps done has risen."""
        return self._steps is not None and before // self._steps < after // self._steps


def is_first() -> bool:
    """Return whether this is rank 0, or no run at all."""
    context = current_context()
    return context is None or context.spec.rank == 0


def write(path: Path, value: Any) -> None:
    """Write a value of plain objects and arrays."""
    path.write_bytes(pickle.dumps(value))


def read(path: Path) -> Any:
    """Read what `write` wrote."""
    return pickle.loads(path.read_bytes())  # noqa: S301 - the run's own checkpoint


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from."""

    shared: Path
    """Rank 0's files."""
    own: Path
    """This rank's files, or rank 0's where the number of ranks is another."""
    ranks_before: int
    ranks: int

    @property
    def is_of_this_rank(self) -> bool:
        """Whether `own` is this rank's."""
        return self.ranks_before == self.ranks

    def scaled(self, batches: int) -> int:
        """Return how many batches of each rank now are as many as these were."""
        return batches * self.ranks_before // self.ranks


def find(needs: str) -> Found | None:
    """Return the latest checkpoint; a CheckpointError if it has no file of that name."""
    latest, context = checkpoint.latest(), current_context()
    if latest is None or context is None:
        return None
    before, now = latest.world_size or 1, int(context.spec.environment["WORLD_SIZE"])
    shared = latest.of_rank(0)
    if not (shared / needs).exists():
        held = ", ".join(sorted(each.name for each in shared.iterdir()))
        raise CheckpointError(
            f"the checkpoint of step {latest.step} has no {needs}, only {held}, so it was not "
            "saved by this callback: HorovodRunner(..., resume=False) starts anew"
        )
    if before != now:
        notice(
            "checkpoint.ranks",
            f"the checkpoint is of {before} rank{'s' * (before != 1)} and this run has {now}: "
            "model and optimizer go on, but every rank has new random numbers, and an epoch that "
            "was begun goes on at about the same place in the data",
        )
    return Found(shared, latest if before == now else shared, before, now)


def save(
    step: int, metrics: Mapping[str, Any] | None = None
) -> contextlib.AbstractContextManager[Path]:
    """Save what every rank writes, with the numbers among the metrics."""
    numbers: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        with contextlib.suppress(ArgumentTypeError, ArgumentValueError):
            numbers[name] = number_of(name, value)
    return checkpoint.save(step, ranks="all", metrics=numbers)
