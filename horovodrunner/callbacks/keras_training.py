"""A training by Keras's ``fit()``, as it is saved and goes on. Runs in: the worker."""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from horovodrunner import checkpoint
from horovodrunner.callbacks import keras_state as state
from horovodrunner.callbacks import saving
from horovodrunner.errors import ArgumentTypeError, CheckpointError
from horovodrunner.random_state import RandomState

__all__ = ["Training"]


class Training:
    """What a CheckpointCallback knows of the training it is in."""

    def __init__(self, callback: Any, schedule: saving.Schedule) -> None:
        self._callback = callback
        self._schedule = schedule
        self._random = RandomState()
        self._model: Any = None
        self._list: Any = None
        self._found: saving.Found | None = None
        self._is_asked = False
        self._position: dict[str, Any] | None = None  # to go on from, until that epoch begins
        self._others: list[Any] | None = None  # the callbacks, while batches are passed over
        self._initial: dict[str, dict[str, bytes]] = {}
        self._steps_before = 0  # this epoch
        self._epoch = self._batch = self._counted = 0
        self._is_due = False
        self._random_at_epoch: dict[str, Any] = {}

    def is_of(self, model: Any) -> None:
        """Take the model, and the last place among the callbacks: to see what they have done."""
        import keras

        if not isinstance(model, keras.Model):
            raise ArgumentTypeError(
                f"{type(self._callback).__name__} is for models of Keras {keras.__version__}, and "
                f"this is a {type(model).__module__}.{type(model).__name__}: save it with "
                "horovodrunner.checkpoint.save()"
            )
        self._model = model
        self._list = found = _callback_list(self._callback)
        others = [each for each in found.callbacks if each is not self._callback]
        found.callbacks = [*others, self._callback]  # a new list: Keras iterates over the old one

    def begins(self, epochs: int | None) -> None:
        """Go on from the latest checkpoint, if there is one that no fit() has gone on from."""
        self._initial = {
            name: {key: pickle.dumps(value) for key, value in state.values_of(callback).items()}
            for name, callback in self._named_callbacks()
        }
        self._ask()
        if self._position is None:
            return
        self._model._initial_epoch = self._position["epoch"]  # as Keras's BackupAndRestore does
        if not self._position["batch"] or self._position["epoch"] >= (epochs or 0):
            self._restore(self._position)

    def _ask(self) -> None:
        if self._is_asked:
            return
        self._is_asked = True
        self._found = saving.find(state.WEIGHTS)
        if self._found is not None:
            self._position = state.position_in(self._found.own)
            if not self._found.is_of_this_rank:
                self._position["batch"] = self._found.scaled(self._position["batch"])

    @property
    def initial_epoch(self) -> int:
        """The epoch that fit() begins with."""
        self._ask()
        return 0 if self._position is None else int(self._position["epoch"])

    def _restore(self, position: dict[str, Any], in_epoch: bool = False) -> None:
        found = self._found
        if found is None:
            return
        state.load_weights(found.shared, self._model, position["built"])
        callbacks = state.callbacks_in(found.own)
        for name, callback in self._named_callbacks():
            for key, value in callbacks.get(name, {}).items():
                setattr(callback, key, value)
        if found.is_of_this_rank:
            state.load_own(self._model, position, in_epoch)
            self._random.load_state_dict(position["random"])

    def epoch_begins(self, epoch: int) -> None:
        """Pass over the batches that were trained, if it is the epoch to go on in."""
        position, self._position = self._position, None
        self._epoch, self._batch = epoch, 0
        if position is None:
            if self._schedule.is_by_steps:
                self._random_at_epoch = self._random.state_dict()
            return
        batches = position["batch"]
        self._steps_before = position["steps"] - batches
        self._counted = position["steps"]
        if not batches:
            self._random_at_epoch = position["random"]
            return
        if self._found is not None and self._found.is_of_this_rank:
            self._random.load_state_dict(position["random_at_epoch"])
        self._random_at_epoch = self._random.state_dict()
        self._others = self._list.callbacks
        self._list.callbacks = [self._callback]
        _pass_over(
            self._model,
            batches,
            then=lambda: self._restore(position, in_epoch=True),
            before_next=lambda: self._let_others_go_on(batches),
        )

    def _let_others_go_on(self, batch: int) -> None:
        self._list.callbacks, self._others = self._others, None
        self._list.on_train_batch_begin(batch)

    def batch_begins(self, batch: int, batches: int | None) -> None:
        """Count it; Keras may train several at once."""
        after = batch + int(self._model.steps_per_execution)
        self._batch = after if batches is None else min(after, batches)

    def batch_ends(self, batches: int | None) -> None:
        """Save, if it is time; after an epoch's last batch, that is when the epoch ends."""
        if self._others is not None:
            return
        before, self._counted = self._counted, self._steps_before + self._batch
        is_wanted = checkpoint.should_save_now()  # once a batch, on every rank
        if is_wanted or self._schedule.has_step(before, self._counted):
            if self._batch == batches:
                self._is_due = True
            else:
                self._save(self._epoch, self._batch)

    def epoch_ends(self, epoch: int, logs: Any) -> None:
        """Save, if it is time."""
        if self._others is not None:  # Keras did not know how many batches there are
            self._list.callbacks, self._others = self._others, None
            self._list.on_epoch_end(epoch, logs)
            return
        self._steps_before += self._batch
        self._counted = self._steps_before
        if self._is_due or self._schedule.has_epoch(epoch + 1):
            self._is_due, self._batch = False, 0
            self._save(epoch + 1, 0, logs)

    def ends(self) -> None:
        """Let the next fit() of this model begin where it is told to."""
        self._model._initial_epoch = None

    def _save(self, epoch: int, batch: int, metrics: Any = None) -> None:
        if hasattr(self._model, "jax_state_sync"):
            self._model.jax_state_sync()
        steps = self._steps_before + batch
        position = {
            "epoch": epoch,
            "batch": batch,
            "steps": steps,
            "random": self._random.state_dict(),
            "random_at_epoch": self._random_at_epoch if batch else {},
        }
        with saving.save(steps, metrics) as directory:
            state.save(directory, self._model, self._changed_values(), position)

    def _changed_values(self) -> dict[str, dict[str, Any]]:
        """Return the callbacks' attributes that training changed; the others are settings."""
        return {
            name: {
                key: value
                for key, value in state.values_of(callback).items()
                if pickle.dumps(value) != self._initial.get(name, {}).get(key)
            }
            for name, callback in self._named_callbacks()
        }

    def _named_callbacks(self) -> Iterator[tuple[str, Any]]:
        seen: Counter[str] = Counter()
        for callback in self._list.callbacks if self._others is None else self._others:
            if callback is not self._callback:
                name = type(callback).__name__
                yield f"{name}-{seen[name]}", callback
                seen[name] += 1


def _callback_list(callback: Any) -> Any:
    """Return the list that calls ``callback.set_model()``; Keras tells a callback of no other."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if type(found).__name__ == "CallbackList" and callback in found.callbacks:
            return found
        frame = frame.f_back
    raise CheckpointError(
        f"{type(callback).__name__} is not among the callbacks of fit(): pass it to "
        "model.fit(..., callbacks=[...])"
    )


def _pass_over(
    model: Any, batches: int, then: Callable[[], None], before_next: Callable[[], None]
) -> None:
    """Let ``fit()`` pass over so many batches of the epoch that it begins.

    `then` is called after the last of them, before the next one is drawn from the data, and
    `before_next` before the first one that is trained on.
    """
    import keras

    train, backend = model.train_function, keras.backend.backend()
    at_once = int(model.steps_per_execution)
    seen = 0

    def pass_over(*args: Any) -> Any:
        nonlocal seen
        if seen >= batches:
            model.train_function = train
            before_next()
            return train(*args)
        logs: Any = {} if len(args) == 1 else ({}, args[0])
        if backend == "tensorflow" and seen == 0:
            logs = train(*args)  # TensorFlow makes metrics when it trains, and `then` sets them
        elif backend != "torch":  # where args has the batch itself
            for _ in range(at_once):
                next(args[-1])
        seen += at_once
        if seen >= batches:
            then()
            now = model.get_metrics_result()
            logs = now if len(args) == 1 else (now, args[0])
        return logs

    model.train_function = pass_over
