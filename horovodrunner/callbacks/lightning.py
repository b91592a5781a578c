"""LogCallback and MetricsLogger for Lightning's Trainer. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from horovodrunner.callbacks.bases import (
    FrameworkCallback,
    Reporter,
    WithFrameworkBase,
    base_classes,
)
from horovodrunner.flows.logs.training_log import count_or_none

__all__ = ["LogCallback", "MetricsLogger"]


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


def _once(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out loss_step and loss_epoch where there is loss."""
    return {
        name: value
        for name, value in metrics.items()
        if not (name.endswith(("_step", "_epoch")) and name.rpartition("_")[0] in metrics)
    }
