"""What a run looks like at a moment, in words. Runs in: the driver."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tqdm import tqdm

from horovodrunner.flows.metrics.history import History, first_in_words
from horovodrunner.flows.metrics.records import Bar
from horovodrunner.formatting import printable

__all__ = ["RUNNING", "RunState", "bar_in_words", "in_words"]

RUNNING, SUCCEEDED, FAILED, STOPPED = "running", "succeeded", "failed", "stopped"

_BAR_COLUMNS = 79


@dataclass(frozen=True)
class RunState:
    """A run at a moment."""

    state: str
    seconds: float
    bars: tuple[Bar, ...]
    ranks: tuple[str, ...]
    hosts: int
    history: History
    attempt: int = 1
    attempts: int = 1
    checkpoint: int | None = None
    cause: str = ""
    title: str = ""
    """What the run is called, if it has a name or is one of several."""

    @property
    def has_news(self) -> bool:
        """Whether main has reported anything."""
        return bool(self.bars) or self.history.last is not None

    @property
    def headline(self) -> str:
        """The state of the run and its ranks, the time it took, and attempts if several."""
        parts = [f"{self.state}, {tqdm.format_interval(self.seconds)}"]
        if self.ranks:
            parts.append(self._ranks_in_words())
        if self.attempt > 1:
            parts.append(f"attempt {self.attempt} of {self.attempts}")
        if self.checkpoint is not None:
            parts.append(f"checkpoint of step {self.checkpoint}")
        return "; ".join(parts)

    def _ranks_in_words(self) -> str:
        size = f"{len(self.ranks)} rank{'s' * (len(self.ranks) > 1)}"
        on_hosts = f" on {self.hosts} hosts" if self.hosts > 1 else ""
        if self.state != RUNNING:
            return size + on_hosts
        counts = Counter(self.ranks)
        if len(counts) == 1:
            return f"{size}{on_hosts} {self.ranks[0]}"
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        return f"{size}{on_hosts}: {states}"


def in_words(run: RunState) -> str:
    """Return all of it as lines of text."""
    lines = [bar_in_words(bar) for bar in run.bars]
    if (last := run.history.last) is not None:
        lines.append(f"step {last.step}: {first_in_words(last.values)}")
    headline = f"{run.title}: {run.headline}" if run.title else run.headline
    return "\n".join([headline, *([run.cause] if run.cause else []), *lines])


def bar_in_words(bar: Bar, columns: int = _BAR_COLUMNS) -> str:
    """Return a bar as tqdm draws it."""
    return str(
        tqdm.format_meter(
            bar.done,
            bar.total,
            max(0.0, bar.time - bar.began),
            ncols=columns,
            prefix=printable(bar.description),
            postfix=printable(bar.postfix) or None,
        )
    )
