"""The best checkpoint: what the user says of it, and what is told. Runs in: the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError
from horovodrunner.flows.checkpoints.manifest import Manifest
from horovodrunner.flows.checkpoints.retention import Best, Retention
from horovodrunner.flows.logs.training_log import format_logs
from horovodrunner.flows.observer import Observer
from horovodrunner.formatting import printable
from horovodrunner.wire.events import CheckpointStored

__all__ = ["BestNotes", "checked_retention"]

MAX_NAMES = 10
"""So many names of metrics are listed."""


def checked_retention(newest: Any, best: Any, every: Any, location: Any) -> Retention:
    """Check what a runner was told of the checkpoints that are kept, and where."""
    for name, value in (("keep_best", best), ("keep_every", every)):
        if value is not None and location is None:
            raise ArgumentValueError(
                f"{name}={checked.shown(value)} needs checkpoint_dir, where checkpoints are kept: "
                'HorovodRunner(..., checkpoint_dir="checkpoints")'
            )
    return Retention(
        checked.integer("keep_checkpoints", newest, at_least=1),
        None if best is None else _checked_best(best),
        None if every is None else checked.integer("keep_every", every, at_least=1),
    )


def _checked_best(value: Any) -> Best:
    if not isinstance(value, (tuple, list)) or len(value) not in (2, 3):
        raise ArgumentTypeError(
            f"keep_best={checked.shown(value)}: give a metric and which end of it is best, "
            '("val_loss", "min"), or with how many are kept, ("val_loss", "min", 3)'
        )
    metric = checked.text("keep_best[0]", value[0])
    if not metric:
        raise ArgumentValueError(f"keep_best={value!r}: the metric's name must not be empty")
    mode = checked.choice("keep_best[1]", value[1], ("min", "max"))
    count = checked.integer("keep_best[2]", value[2], at_least=1) if len(value) == 3 else 1
    return Best(metric, mode, count)


class BestNotes(Observer):
    """Notes on the driver that a new best checkpoint is stored, or that one cannot be compared.

    `stored` lists those that the run may go on from.
    """

    title = "telling which checkpoint is the best"

    def __init__(
        self, best: Best, stored: Callable[[], Iterable[Manifest]], note: Callable[..., object]
    ) -> None:
        self._best = best
        self._stored = stored
        self._note = note
        self._has_warned = False
        self._values: dict[int, float] = {}
        self.handlers = {CheckpointStored: self._take}

    def begin(self, attempt: int) -> None:
        """Look, once, at what is stored."""
        if attempt == 1:
            for manifest in self._stored():
                self._know(manifest.step, self._best.value_of(manifest.metrics))

    def _take(self, event: CheckpointStored) -> None:
        self._know(event.step, None)  # it is replaced
        if self._best.metric not in event.metrics:
            if not self._values and not self._has_warned:
                self._has_warned = True
                self._note(self._describe_lack(event))
            return
        value = self._best.value_of(event.metrics)
        if value is None:
            return
        if all(self._best.is_better(value, other) for other in self._values.values()):
            number = format_logs({self._best.metric: value})
            self._note(f"step {event.step} is the best so far: {number}", routine=True)
        self._know(event.step, value)

    def _know(self, step: int, value: float | None) -> None:
        self._values.pop(step, None)
        if value is not None:
            self._values[step] = value

    def _describe_lack(self, event: CheckpointStored) -> str:
        name = self._best.metric
        names = ", ".join(map(printable, [*event.metrics][:MAX_NAMES]))
        return (
            f"the checkpoint of step {event.step} has no {name!r} and is never the best (it has "
            f"{names or 'no metrics'}; said once): report it before the checkpoint is saved, "
            f"metrics.report({name}=...), or give it to checkpoint.save(step, "
            f"metrics={{{name!r}: ...}})"
        )
