"""LogCallback for training loops written by hand. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from horovodrunner import validation as checked
from horovodrunner.flows.logs.training_log import TrainingLog

__all__ = ["LogCallback"]


class LogCallback:
    """Tells the driver when epochs begin and end, with the means of what the batches gave.

    Every rank that has it sends lines. Values may be numbers or tensors, which stay on their
    device until the epoch ends (with `per_batch_log`, until the batch does).

    Parameters
    ----------
    per_batch_log
        A line after each batch, too.

    Examples
    --------
    >>> log = LogCallback(per_batch_log=True)
    >>> for epoch in log.epochs(2):  # doctest: +ELLIPSIS
    ...     for loss in (0.5, 0.25):  # the batches
    ...         log.batch(loss=loss)
    ...     log.epoch(accuracy=0.75)
    epoch 1 of 2 begins
    epoch 1 of 2, batch 1: loss 0.5000
    epoch 1 of 2, batch 2: loss 0.2500
    epoch 1 of 2: loss 0.3750, accuracy 0.7500 (... s)
    epoch 2 of 2 begins
    epoch 2 of 2, batch 1: loss 0.5000
    epoch 2 of 2, batch 2: loss 0.2500
    epoch 2 of 2: loss 0.3750, accuracy 0.7500 (... s)
    """

    def __init__(self, per_batch_log: bool = False) -> None:
        self._per_batch_log = per_batch_log
        self._log = TrainingLog()
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._batches = 0
        self._sums: dict[str, tuple[Any, int]] = {}
        self._more: dict[str, Any] = {}

    def epochs(self, epochs: int, start: int = 0) -> Iterator[int]:
        """Yield ``start`` to ``epochs - 1``; an epoch left with ``break`` has no line at its end.

        An ArgumentTypeError is raised if one of the two is not an int.
        """
        start = checked.integer("start", start)
        epochs = checked.integer("epochs", epochs)
        for epoch in range(start, epochs):
            self._begin_epoch()
            self._log.epoch_begins(epoch, epochs)
            yield epoch
            means = {name: total / count for name, (total, count) in self._sums.items()}
            self._log.epoch_ends({**means, **self._more})

    def batch(self, **values: Any) -> None:
        """Take a batch's numbers, or tensors with one value; the epoch's line has the means."""
        for name, value in values.items():
            own = value.detach() if hasattr(value, "detach") else value
            total, count = self._sums.get(name, (0, 0))
            self._sums[name] = (total + own, count + 1)
        self._batches += 1
        if self._per_batch_log:
            self._log.batch_ends(self._batches - 1, None, values)

    def epoch(self, **values: Any) -> None:
        """Take what belongs to the epoch as a whole, such as an accuracy on other data."""
        self._more.update(values)
