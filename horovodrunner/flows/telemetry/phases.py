"""When each phase of a run's launch began and ended, on all ranks. Runs in: every process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Phase", "Spans", "format_phases"]


@dataclass(frozen=True)
class Phase:
    """One phase of a run, of all ranks: from the first that began to the last that ended.

    Parameters
    ----------
    name
        What was done.
    began, ended
        Seconds since the epoch; the machines' clocks are taken to agree.
    last_rank
        The rank that ended last; None where no rank is concerned.
    """

    name: str
    began: float
    ended: float
    last_rank: int | None = None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


class Spans:
    """Collects phases; the same phase of several ranks becomes one."""

    def __init__(self) -> None:
        self._phases: dict[str, Phase] = {}

    def add(self, name: str, began: float, ended: float, rank: int | None = None) -> None:
        known = self._phases.get(name)
        if known is None:
            self._phases[name] = Phase(name, began, ended, rank)
            return
        last = rank if ended > known.ended else known.last_rank
        self._phases[name] = Phase(name, min(began, known.began), max(ended, known.ended), last)

    def add_all(self, spans: Mapping[str, Sequence[float]], rank: int | None = None) -> None:
        for name, (began, ended) in spans.items():
            self.add(name, float(began), float(ended), rank)

    def phases(self) -> tuple[Phase, ...]:
        """Return all phases in the order in which they began."""
        return tuple(sorted(self._phases.values(), key=lambda phase: phase.began))


def format_phases(phases: Iterable[Phase], since: float) -> str:
    """Return phases as a table that counts from `since`.

    >>> print(format_phases([Phase("pickle", 10.0, 10.25), Phase("main", 10.5, 13.0, 1)], 10.0))
    phase            from      to    took
    pickle           0.00    0.25    0.25 s
    main             0.50    3.00    2.50 s, rank 1 last
    """
    lines = [f"{'phase':<14}{'from':>7} {'to':>7} {'took':>7}"]
    for phase in phases:
        last = "" if phase.last_rank is None else f", rank {phase.last_rank} last"
        began, ended = phase.began - since, phase.ended - since
        lines.append(f"{phase.name:<14}{began:7.2f} {ended:7.2f} {phase.seconds:7.2f} s{last}")
    return "\n".join(lines)
