"""Which checkpoints are kept. Runs in: every process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from horovodrunner.flows.checkpoints.manifest import Manifest

__all__ = ["Best", "Retention"]


class _HasMetrics(Protocol):
    @property
    def metrics(self) -> Mapping[str, float]: ...


_Checkpoint = TypeVar("_Checkpoint", bound=_HasMetrics)


@dataclass(frozen=True)
class Best:
    """The checkpoints with the lowest (``"min"``) or highest (``"max"``) value of a metric."""

    metric: str
    mode: str
    count: int = 1

    def value_of(self, metrics: Mapping[str, float]) -> float | None:
        """Return the metric's value; None if it is not there, or NaN, which is never the best."""
        value = metrics.get(self.metric, math.nan)
        return None if math.isnan(value) else value

    def is_better(self, value: float, other: float) -> bool:
        """Return whether a value is better than another one."""
        return value < other if self.mode == "min" else value > other

    def among(self, newest_first: Sequence[_Checkpoint]) -> list[_Checkpoint]:
        """Return the best ones, the very best first; of equally good ones the newer first.

        >>> Best("loss", "min").among([])
        []
        """
        rated = [
            (value, each)
            for each in newest_first
            if (value := self.value_of(each.metrics)) is not None
        ]
        rated.sort(key=lambda pair: pair[0] if self.mode == "min" else -pair[0])
        return [each for _, each in rated[: self.count]]


@dataclass(frozen=True)
class Retention:
    """The newest checkpoints are kept, beside them the best, and each n-th step's."""

    newest: int = 3
    best: Best | None = None
    every: int | None = None

    def too_old(self, newest_first: Sequence[Manifest]) -> list[Manifest]:
        """Return those that are not kept."""
        kept = {each.step for each in newest_first[: self.newest]}
        if self.best is not None:
            kept |= {each.step for each in self.best.among(newest_first)}
        return [
            each
            for each in newest_first
            if each.step not in kept and (self.every is None or each.step % self.every)
        ]
