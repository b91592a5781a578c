"""Keras 3 callbacks with Horovod's names and signatures. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import keras

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError
from horovodrunner.keras.backend import collectives, hvd
from horovodrunner.keras.optimizer import is_distributed
from horovodrunner.keras.options import key
from horovodrunner.processes.worker.context import log_to_driver


class _Callback(keras.callbacks.Callback):  # type: ignore[misc]
    def set_model(self, model: Any) -> None:
        """Take the model; an ArgumentTypeError if it is another Keras's."""
        if not isinstance(model, keras.Model):
            raise ArgumentTypeError(
                f"{type(self).__name__} is for models of Keras {keras.__version__}, and this is a "
                f"{type(model).__module__}.{type(model).__name__}: for tf_keras set "
                "TF_USE_LEGACY_KERAS=1 before TensorFlow is imported"
            )
        super().set_model(model)


class BroadcastGlobalVariablesCallback(_Callback):
    """Set every rank's weights and optimizer states to the root's.

    Before the first batch, and after it for what the first batch built. Every optimizer that is an
    attribute of the model counts. Metrics and random number states stay the rank's own.

    Parameters
    ----------
    root_rank
        The rank that sends.
    device
        Where, as in ``tf.device``; not with torch.
    local_variables
        A variable, or several, that stay the rank's own.
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.device = device
        self.broadcast_done = False
        self._local: set[Hashable] = set()
        self._sent: set[Hashable] = set()
        if local_variables is None:
            local_variables = ()
        elif not isinstance(local_variables, (list, tuple, set, frozenset)):
            local_variables = (local_variables,)
        for variable in local_variables:
            self.register_local_var(variable)

    def register_local_var(self, variable: Any) -> None:
        """Leave a variable of the model or of its optimizer as it is."""
        self._local.add(key(variable))

    def on_train_begin(self, logs: Any = None) -> None:
        self._warn_of_a_plain_optimizer()
        if not self.model.built:
            return
        optimizer = self.model.optimizer
        if optimizer is not None and not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        self._broadcast()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self.broadcast_done:
            self._broadcast()
            self.broadcast_done = True

    def _warn_of_a_plain_optimizer(self) -> None:
        optimizers = _optimizers(self.model)
        if hvd.size() == 1 or hvd.rank() != 0 or any(map(is_distributed, optimizers)):
            return
        log_to_driver(
            f"HorovodRunner: warning: the model's optimizer ({type(self.model.optimizer).__name__})"
            " is not distributed: unless your train_step averages the gradients itself, the ranks "
            "train apart. Wrap it in hvd.DistributedOptimizer(), or load the model with "
            "hvd.load_model()"
        )

    def _broadcast(self) -> None:
        variables: list[Any] = []
        # Not model.variables: that has the seeds of dropout, which had better differ by rank.
        for owner in (self.model.weights, *(each.variables for each in _optimizers(self.model))):
            for variable in owner:
                found = key(variable)
                if found not in self._local and found not in self._sent:
                    self._sent.add(found)
                    variables.append(variable)
        if variables:
            collectives.broadcast(variables, self.root_rank, self.device)


class MetricAverageCallback(_Callback):
    """Average the metrics over the ranks at the end of each epoch.

    Put it before callbacks that are to see the averages. Every rank counts the same, however many
    samples it had.

    Parameters
    ----------
    device
        Where, as in ``tf.device``; not with torch.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()
        self.device = device

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not logs:
            return
        names = sorted(logs)
        # The names are in the collective's: ranks with other metrics are not averaged in.
        averages = collectives.average(
            [float(logs[name]) for name in names], "metrics." + ".".join(names), self.device
        )
        logs.update(zip(names, averages, strict=True))


class LearningRateScheduleCallback(_Callback):
    r"""Set the learning rate to ``initial_lr * multiplier(epoch)`` in a range of epochs.

    Parameters
    ----------
    initial_lr
        The learning rate at the start of the training.
    multiplier
        A function of the epoch, or a number :math:`m` for :math:`m^{epoch - start\_epoch}`.
    start_epoch, end_epoch
        The first epoch to adjust, and the first one not to adjust any more.
    staircase
        Adjust at the start of each epoch, with a whole number; otherwise at each batch, with
        ``epoch + batch / steps_per_epoch``.
    momentum_correction
        Scale the velocities of optimizers with momentum as the rate changes (Goyal et al.,
        "Accurate, Large Minibatch SGD", arXiv:1706.02677, remark 2).
    steps_per_epoch
        Number of batches in an epoch; taken from Keras by default.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If a number is none, or `initial_lr` is None.
    """

    def __init__(  # noqa: PLR0917 - Horovod's signature
        self,
        initial_lr: float | None = None,
        multiplier: float | Callable[[float], float] | None = None,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if initial_lr is None:
            raise ArgumentValueError(
                f"{type(self).__name__} has no initial_lr: give it the optimizer's learning rate, "
                "initial_lr=0.001 * hvd.size() for instance"
            )
        if multiplier is None:
            raise ArgumentValueError(
                f"{type(self).__name__} has no multiplier: give it a number or a function of the "
                "epoch, multiplier=0.1 for instance"
            )
        self.initial_lr = checked.number("initial_lr", initial_lr)
        self.start_epoch = checked.number("start_epoch", start_epoch)
        self.end_epoch = None if end_epoch is None else checked.number("end_epoch", end_epoch)
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = 0
        if callable(multiplier):
            self.multiplier = multiplier
        else:
            base = checked.number("multiplier", multiplier)
            self.multiplier = lambda epoch: base ** (epoch - self.start_epoch)

    def on_train_begin(self, logs: Any = None) -> None:
        if self.staircase or self.steps_per_epoch:
            return
        self.steps_per_epoch = self.params.get("steps")
        if not self.steps_per_epoch:
            raise ArgumentValueError(
                f"Keras does not know how many batches an epoch has: {type(self).__name__}("
                "..., steps_per_epoch=...)"
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.current_epoch < self.start_epoch:
            return
        if self.end_epoch is not None and self.current_epoch >= self.end_epoch:
            return
        if not self.staircase:
            self._adjust(self.current_epoch + batch / (self.steps_per_epoch or 1))
        elif batch == 0:
            self._adjust(self.current_epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if logs is not None:
            logs["lr"] = self._rate()

    def _rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def _adjust(self, epoch: float) -> None:
        before, after = self._rate(), self.initial_lr * self.multiplier(epoch)
        optimizer = self.model.optimizer
        optimizer.learning_rate = after
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not self.momentum_correction or before in (0.0, after) or not optimizer.built:
            return
        if not getattr(optimizer, "momentum", 0.0):
            return
        # Keras 3 compiles the coefficient itself in, so it cannot be changed; to scale what it is
        # multiplied with comes to the same.
        for name in ("momentums", "_moments"):
            for velocity in getattr(optimizer, name, None) or ():
                if velocity is not None:
                    velocity.assign(velocity * (after / before))


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    r"""Raise the learning rate from ``initial_lr / size`` to ``initial_lr``, batch by batch.

    In epoch :math:`e`, batches counted, it is
    :math:`\frac{lr}{size}(\frac{size - 1}{warmup} e + 1)`
    (Goyal et al., "Accurate, Large Minibatch SGD", arXiv:1706.02677, section 2.2).

    Parameters
    ----------
    initial_lr
        The learning rate to arrive at.
    warmup_epochs
        Number of epochs until then.
    momentum_correction, steps_per_epoch
        As for :class:`LearningRateScheduleCallback`.
    verbose
        1 to print when it has arrived.
    """

    def __init__(
        self,
        initial_lr: float | None = None,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        epochs = checked.number("warmup_epochs", warmup_epochs)

        def multiplier(epoch: float) -> float:
            # A batch's rate is that of its end, so that the last one arrives.
            epoch += 1.0 / (self.steps_per_epoch or 1)
            size: int = hvd.size()
            return (epoch * (size - 1) / epochs + 1) / size

        super().__init__(
            initial_lr,
            multiplier,
            start_epoch=0,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        if self.verbose and self.end_epoch == epoch + 1 and hvd.rank() == 0:
            message = f"Epoch {epoch + 1}: finished learning rate warmup to {self._rate():g}."
            print(message)  # noqa: T201 - as Keras prints


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):  # type: ignore[misc]
    """Save the best model so far; where to is set as ``filepath`` before the training.

    Parameters
    ----------
    monitor, verbose, save_weights_only, mode, save_freq
        As for ``keras.callbacks.ModelCheckpoint``.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: Any = "epoch",
    ) -> None:
        # Keras 3 looks at the suffix at once, and Horovod's signature has no path.
        self._unset = "unset.weights.h5" if save_weights_only else "unset.keras"
        super().__init__(
            filepath=self._unset,
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
        )

    def on_train_begin(self, logs: Any = None) -> None:
        if self.filepath == self._unset:
            raise ArgumentValueError(
                "BestModelCheckpoint does not know where to save: set its filepath before fit()"
            )
        super().on_train_begin(logs)


def _optimizers(model: Any) -> list[Any]:
    """List the optimizers that are attributes of a model: a GAN has two."""
    found = {id(model.optimizer): model.optimizer}
    for value in vars(model).values():
        if isinstance(value, keras.optimizers.Optimizer):
            found.setdefault(id(value), value)
    inner = {id(getattr(each, "inner_optimizer", None)) for each in found.values()}
    return [each for each in found.values() if each is not None and id(each) not in inner]
