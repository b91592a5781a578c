"""Callbacks and a logger for Lightning's Trainer. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from horovodrunner.callbacks.bases import (
    FrameworkCallback,
    Reporter,
    WithFrameworkBase,
    base_classes,
)
from horovodrunner.callbacks.lightning_training import Training
from horovodrunner.callbacks.saving import Schedule
from horovodrunner.flows.logs.training_log import count_or_none

__all__ = ["CheckpointCallback", "LogCallback", "MetricsLogger"]


_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


class LogCallback(FrameworkCallback):
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
        bases = base_classes(_PACKAGES, "Callback")
        instance: LogCallback = cls._with_bases(*bases)
        return instance

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Send a line; Lightning calls it."""
        self._log.epoch_begins(trainer.current_epoch, count_or_none(trainer.max_epochs))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Send a line, if that is wanted; Lightning calls it."""
        if self._per_batch_log:
            batches = count_or_none(trainer.num_training_batches)
            self._log.batch_ends(batch_idx, batches, _once(trainer.callback_metrics))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Send a line, with the metrics of the validation; Lightning calls it."""
        self._log.epoch_ends(_once(trainer.callback_metrics))


class MetricsLogger(WithFrameworkBase):
    """Reports what a module logs: ``Trainer(logger=MetricsLogger())``.

    For ``lightning.pytorch`` or ``pytorch_lightning``; beside others in a list of loggers. The
    step is Lightning's global step. See :mod:`horovodrunner.metrics`.
    """

    name = "horovodrunner"
    """As Lightning asks for."""
    version = ""
    """As Lightning asks for."""

    def __new__(cls) -> MetricsLogger:
        """Make an instance whose class has Lightning's own base class."""
        instance: MetricsLogger = cls._with_bases(*base_classes(_PACKAGES, "loggers.Logger"))
        return instance

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Report a point; Lightning calls it."""
        Reporter.report(step, _once(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Take what Lightning tells of the module's arguments, and keep nothing of it."""


class CheckpointCallback(WithFrameworkBase):
    """Saves the training as checkpoints, and goes on from the latest one.

    For ``Trainer(callbacks=[CheckpointCallback()])`` of ``lightning.pytorch`` or
    ``pytorch_lightning``, on every rank, with a strategy whose rank 0 saves for all, such as DDP.
    It is a checkpoint callback of Lightning, so no ``ModelCheckpoint`` is added. What is saved and
    restored: what ``trainer.save_checkpoint()`` saves (model, optimizers, schedules, loops, other
    callbacks), the random state of every rank, and the batch within the epoch: batches that were
    trained are passed over, unless the data loader has a ``state_dict()``. ``ckpt_path`` stays out
    of ``trainer.fit()``.

    It also saves before a machine goes (:func:`horovodrunner.checkpoint.should_save_now`). The step
    of a checkpoint is the global step. Its ``lightning.ckpt`` is for
    ``load_from_checkpoint()``. See :mod:`horovodrunner.checkpoint`.

    Parameters
    ----------
    every_epochs
        Save at the end of every so many epochs.
    every_steps
        Save after every so many steps of the optimizer, too.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If one of the two is not an int, or not positive.
    """

    def __new__(cls, every_epochs: int = 1, every_steps: int | None = None) -> CheckpointCallback:
        """Make an instance whose class has Lightning's own base class."""
        bases = base_classes(_PACKAGES, "callbacks.Checkpoint")
        instance: CheckpointCallback = cls._with_bases(*bases)
        return instance

    def __init__(self, every_epochs: int = 1, every_steps: int | None = None) -> None:
        super().__init__()
        self._options = (every_epochs, every_steps)
        self._training = Training(Schedule(every_epochs, every_steps))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Load the latest checkpoint; Lightning calls it."""
        if stage == "fit":
            self._training.is_set_up(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the random state of the first epoch; Lightning calls it."""
        self._training.fit_starts(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Pass over the batches that were trained; Lightning calls it."""
        self._training.starts(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Note the random state; Lightning calls it."""
        self._training.epoch_starts(trainer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if it is time; Lightning calls it."""
        self._training.batch_ends(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Save, if it is time; Lightning calls it."""
        self._training.epoch_ends(trainer, _once(trainer.callback_metrics))


def _once(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out loss_step and loss_epoch where there is loss."""
    return {
        name: value
        for name, value in metrics.items()
        if not (name.endswith(("_step", "_epoch")) and name.rpartition("_")[0] in metrics)
    }
