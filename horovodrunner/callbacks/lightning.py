"""LogCallback for Lightning's Trainer. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from horovodrunner.callbacks.bases import base_classes
from horovodrunner.flows.logs.training_log import TrainingLog, count_or_none

__all__ = ["LogCallback"]


class LogCallback:
    """Tells the driver when epochs begin and end, with the metrics that the module logs.

    For ``Trainer(callbacks=[LogCallback()])`` of ``lightning.pytorch`` or ``pytorch_lightning``.
    Every rank sends lines, with what ``self.log(...)`` was given there.

    Parameters
    ----------
    per_batch_log
        A line after each batch, too.
    """

    def __new__(cls, per_batch_log: bool = False) -> LogCallback:
        """Make an instance whose class has Lightning's own base class."""
        bases = base_classes(("lightning.pytorch", "pytorch_lightning"), "Callback")
        instance: LogCallback = object.__new__(_complete(cls, bases))
        return instance

    def __init__(self, per_batch_log: bool = False) -> None:
        super().__init__()
        self._per_batch_log = per_batch_log
        self._log = TrainingLog()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to the workers as a new one."""
        return type(self)._chosen_class, (self._per_batch_log,)  # type: ignore[attr-defined]

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Say that an epoch begins; Lightning calls it."""
        self._log.epoch_begins(trainer.current_epoch, count_or_none(trainer.max_epochs))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how a batch went, if that is wanted; Lightning calls it."""
        if self._per_batch_log:
            batches = count_or_none(trainer.num_training_batches)
            self._log.batch_ends(batch_idx, batches, _once(trainer.callback_metrics))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Say how an epoch went, its validation included; Lightning calls it."""
        self._log.epoch_ends(_once(trainer.callback_metrics))


def _complete(chosen: type, bases: tuple[type, ...]) -> type:
    return type(chosen.__name__, (chosen, *bases), {"_chosen_class": chosen})


def _once(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out loss_step and loss_epoch where there is loss."""
    return {
        name: value
        for name, value in metrics.items()
        if not (name.endswith(("_step", "_epoch")) and name.rpartition("_")[0] in metrics)
    }
