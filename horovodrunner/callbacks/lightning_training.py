"""A training by Lightning's ``Trainer``, as it is saved and goes on. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from horovodrunner import checkpoint
from horovodrunner.callbacks import saving
from horovodrunner.errors import ArgumentValueError
from horovodrunner.random_state import RandomState

__all__ = ["Training"]

_STATE = "lightning.ckpt"
_RANK = "rank.pkl"


class Training:
    """What a CheckpointCallback knows of the training it is in."""

    def __init__(self, schedule: saving.Schedule) -> None:
        self._schedule = schedule
        self._random = RandomState()
        self._is_asked = False
        self._position: dict[str, Any] | None = None  # to go on from
        self._begins_epoch = False  # with a state of the random numbers that was restored
        self._counted = 0
        self._is_due = self._is_wanted = False
        self._random_at_epoch: dict[str, Any] = {}

    def is_set_up(self, trainer: Any) -> None:
        """Have Lightning restore the latest checkpoint, as with ``fit(ckpt_path=...)``."""
        if self._is_asked:
            return
        self._is_asked = True
        found = saving.find(_STATE)
        if found is None:
            return
        import torch

        # Lightning restores what it finds there, and asks for ckpt_path before any callback.
        trainer._checkpoint_connector._loaded_checkpoint = torch.load(
            found.shared / _STATE, map_location="cpu", weights_only=False
        )
        self._position = saving.read(found.own / _RANK)
        if not found.is_of_this_rank:
            self._position |= {"random": {}, "random_at_epoch": {}}

    def fit_starts(self, trainer: Any) -> None:
        """Set the random numbers to those that the first epoch's data was prepared with."""
        if self._position is None:
            self._random_at_epoch = self._random.state_dict()
            return
        if trainer.ckpt_path:
            raise ArgumentValueError(
                f"ckpt_path={trainer.ckpt_path!r}: trainer.fit() was told to go on from there, and "
                "CheckpointCallback from the run's latest checkpoint; leave ckpt_path out, or "
                "start anew with HorovodRunner(..., resume=False)"
            )
        if self._position["batch"] and self._position["epoch"] == 0:
            self._random.load_state_dict(self._position["random_at_epoch"])

    def starts(self, trainer: Any) -> None:
        """Go on exactly there."""
        position, self._position = self._position, None
        self._counted = trainer.global_step
        if position is None:
            return
        fit, batches = trainer.fit_loop, position["batch"]
        for scheduler, value in position["plateaus"]:
            trainer.lr_scheduler_configs[scheduler].scheduler.step(value)
        if batches and not _resumes_itself(fit):
            if position["epoch"] > 0:
                self._random.load_state_dict(position["random_at_epoch"])
                _set_epoch(fit, position["epoch"])
                iter(fit._data_fetcher)
            fetched = fit._data_fetcher.fetched
            for _ in range(batches):
                next(fit._data_fetcher)
            fit._data_fetcher.fetched = fetched  # Lightning adds them itself
        self._begins_epoch = not batches
        self._random_at_epoch = position["random_at_epoch"]
        self._random.load_state_dict(position["random"])

    def epoch_starts(self, trainer: Any) -> None:
        """Note the random numbers, which the order of the data follows from."""
        if self._schedule.is_by_steps and trainer.current_epoch > 0:
            self._random_at_epoch = self._random.state_dict()
        if self._begins_epoch:
            # Lightning has made this iterator before there was a state to make it with.
            self._begins_epoch = False
            iter(trainer.fit_loop._data_fetcher)

    def batch_ends(self, trainer: Any) -> None:
        """Save, if it is time; after an epoch's last batch, that is when the epoch ends."""
        before, self._counted = self._counted, trainer.global_step
        self._is_wanted |= checkpoint.should_save_now()  # once a batch, on every rank
        if self._counted == before:  # gradients are being added up
            return
        if self._is_wanted or self._schedule.has_step(before, self._counted):
            self._is_wanted = False
            if trainer.is_last_batch:
                self._is_due = True
            else:
                self._save(trainer, trainer.fit_loop.batch_idx + 1, "step")

    def epoch_ends(self, trainer: Any, metrics: Mapping[str, Any]) -> None:
        """Save, if it is time."""
        # Or schedules that wait for a metric miss the end of the epoch that was gone on in.
        trainer.fit_loop.restarting = False
        if self._is_due or self._schedule.has_epoch(trainer.current_epoch + 1):
            self._is_due = False
            self._save(trainer, 0, "epoch", metrics)

    def _save(
        self, trainer: Any, batch: int, interval: str, metrics: Mapping[str, Any] | None = None
    ) -> None:
        position = {
            "epoch": trainer.current_epoch,
            "batch": batch,
            "random": self._random.state_dict(),
            "random_at_epoch": self._random_at_epoch if batch else {},
            "plateaus": _steps_to_come(trainer, interval),
        }
        with saving.save(trainer.global_step, metrics) as directory:
            # The other ranks take part, and write nothing.
            trainer.save_checkpoint(directory / _STATE)
            saving.write(directory / _RANK, position)


def _resumes_itself(fit: Any) -> bool:
    loaders = fit._combined_loader.flattened
    return all(hasattr(loader, "load_state_dict") for loader in loaders)


def _set_epoch(fit: Any, epoch: int) -> None:
    """Do what Lightning does only when the first batch has been drawn."""
    for loader in fit._combined_loader.flattened:
        batches = getattr(loader, "batch_sampler", None)
        for sampler in (getattr(loader, "sampler", None), getattr(batches, "sampler", None)):
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)


def _steps_to_come(trainer: Any, interval: str) -> list[tuple[int, float]]:
    """List the schedules that wait for a metric, and take their step after this checkpoint."""
    done = 1 + (trainer.current_epoch if interval == "epoch" else trainer.fit_loop.batch_idx)
    return [
        (number, float(trainer.callback_metrics[config.monitor]))
        for number, config in enumerate(trainer.lr_scheduler_configs)
        if config.reduce_on_plateau
        and config.interval == interval
        and done % config.frequency == 0
        and config.monitor in trainer.callback_metrics
    ]
