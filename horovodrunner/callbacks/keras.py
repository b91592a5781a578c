"""Callbacks for Keras 3, with any backend, and for tf_keras. Runs in: the worker."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from horovodrunner.callbacks.bases import (
    FrameworkCallback,
    Reporter,
    WithFrameworkBase,
    base_classes,
)
from horovodrunner.callbacks.keras_training import Training
from horovodrunner.callbacks.saving import Schedule
from horovodrunner.flows.logs.training_log import TrainingLog, count_or_none

__all__ = ["CheckpointCallback", "LogCallback", "MetricsCallback"]


class LogCallback(FrameworkCallback):
    """Tells the driver when epochs begin and end, with the losses and metrics that Keras logs.

    Pass it to ``model.fit(..., callbacks=[LogCallback()])``, after callbacks that change the logs
    (such as Horovod's ``MetricAverageCallback``). Every rank that has it sends lines::

        rank 0: epoch 3 of 10 begins
        rank 0: epoch 3 of 10: loss 0.2512, accuracy 0.9100 (1.2 s)

    An instance is a ``keras.callbacks.Callback`` of the Keras that is imported, Keras 3 or
    tf_keras; where none is yet, ``TF_USE_LEGACY_KERAS`` decides.

    Parameters
    ----------
    per_batch_log
        A line after each batch, too.
    """

    def __new__(cls, per_batch_log: bool = False) -> LogCallback:
        """Make an instance whose class has Keras's own base class."""
        hooks = (_BatchHook,) if per_batch_log else ()
        instance: LogCallback = cls._with_bases(*hooks, *_keras_bases())
        return instance

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Send a line; Keras calls it."""
        self._log.epoch_begins(epoch, _of(self, "epochs"))

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Send a line; Keras calls it."""
        self._log.epoch_ends(logs)


class MetricsCallback(WithFrameworkBase):
    """Reports the losses and metrics that Keras logs, and how many epochs are done.

    Pass it to ``model.fit(..., callbacks=[MetricsCallback()], verbose=0)``, after callbacks that
    change the logs (such as Horovod's ``MetricAverageCallback``). The step is the epoch, from 0;
    with `per_batch` it is the number of batches, from 0. See :mod:`horovodrunner.metrics`.

    Parameters
    ----------
    per_batch
        A point after each batch, too.
    """

    def __new__(cls, per_batch: bool = False) -> MetricsCallback:
        """Make an instance whose class has Keras's own base class."""
        hooks = (_BatchMetrics,) if per_batch else ()
        instance: MetricsCallback = cls._with_bases(*hooks, *_keras_bases())
        return instance

    def __init__(self, per_batch: bool = False) -> None:
        super().__init__()
        self._options = (per_batch,)
        self._reporter = Reporter()
        self._batches = 0 if per_batch else None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Begin a progress bar; Keras calls it."""
        self._reporter.open("epoch", _of(self, "epochs"))

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Move the bar; Keras calls it."""
        self._reporter.at(epoch)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Report a point; Keras calls it."""
        last_batch = None if self._batches is None else self._batches - 1
        self._reporter.report(epoch if last_batch is None else last_batch, logs)
        self._reporter.at(epoch + 1)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """End the bar; Keras calls it."""
        self._reporter.close()


class CheckpointCallback(WithFrameworkBase):
    """Saves the training as checkpoints, and goes on from the latest one.

    Pass it to ``model.fit(..., callbacks=[CheckpointCallback()])`` of Keras 3, on every rank and to
    one ``fit()``. What is saved and restored: the model, its optimizers with their iterations, the
    state of the other callbacks as far as it is numbers (``EarlyStopping``, ``ReduceLROnPlateau``,
    the history), the random state of every rank, the epoch, and the batch within it. After a
    restart ``fit()`` begins with that epoch, whatever its ``initial_epoch``, and passes over the
    batches that were trained.

    The step of a checkpoint is the number of batches trained. Its ``model.weights.h5`` is for
    ``model.load_weights()``. See :mod:`horovodrunner.checkpoint`.

    Parameters
    ----------
    every_epochs
        Save at the end of every so many epochs.
    every_steps
        Save after every so many batches, too, and before a machine goes
        (:func:`horovodrunner.checkpoint.should_save_now`).

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If one of the two is not an int, or not positive.
    """

    def __new__(cls, every_epochs: int = 1, every_steps: int | None = None) -> CheckpointCallback:
        """Make an instance whose class has Keras's own base class."""
        hooks = () if every_steps is None else (_BatchCheckpoint,)
        bases = base_classes(("keras",), "callbacks.Callback")
        instance: CheckpointCallback = cls._with_bases(*hooks, *bases)
        return instance

    def __init__(self, every_epochs: int = 1, every_steps: int | None = None) -> None:
        super().__init__()
        self._options = (every_epochs, every_steps)
        self._training = Training(self, Schedule(every_epochs, every_steps))

    @property
    def initial_epoch(self) -> int:
        """The epoch that ``fit()`` is about to begin with, for data that has to know it."""
        return self._training.initial_epoch

    def set_model(self, model: Any) -> None:
        """Take the model; Keras calls it."""
        super().set_model(model)  # type: ignore[misc]
        self._training.is_of(model)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Go on from the latest checkpoint; Keras calls it."""
        self._training.begins(_of(self, "epochs"))

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Pass over the batches that were trained; Keras calls it."""
        self._training.epoch_begins(epoch)

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Count; Keras calls it."""
        self._training.batch_begins(batch, _of(self, "steps"))

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save; Keras calls it."""
        self._training.epoch_ends(epoch, logs)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Leave nothing behind in the model; Keras calls it."""
        self._training.ends()


class _BatchCheckpoint:
    """Apart from the rest, because Keras is faster when no callback looks at batches' ends."""

    _training: Any

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._training.batch_ends(_of(self, "steps"))


def _keras_bases() -> list[type]:
    legacy = os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true")
    packages = ("tf_keras", "keras") if legacy else ("keras", "tf_keras")
    bases = sorted(base_classes(packages, "callbacks.Callback"), key=_is_of_tf_keras)
    return [*([_OfTfKeras] if len(bases) > 1 else []), *bases]


class _BatchMetrics:
    """Apart from the rest, because Keras is faster when no callback looks at batches."""

    _reporter: Reporter
    _batches: int

    def on_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._reporter.report(self._batches, logs)
        self._batches += 1


class _BatchHook:
    """Apart from the rest, because Keras is faster when no callback looks at batches."""

    _log: TrainingLog

    def on_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._log.batch_ends(batch, _of(self, "steps"), logs)


class _OfTfKeras:
    """What tf_keras's own base class sets when it is made.

    Beside Keras 3's it stands last and is not called: there, `model` is a property.
    """

    validation_data = None
    _chief_worker_only = None
    _supports_tf_logs = False


def _is_of_tf_keras(base: type) -> bool:
    return base.__module__.startswith("tf_keras")


def _of(callback: Any, name: str) -> int | None:
    return count_or_none((callback.params or {}).get(name))
