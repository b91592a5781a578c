"""What partition 0 knows of where the ranks are: progress, stalls. Runs in: the task."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from horovodrunner.flows.logs.task import MergedLog
from horovodrunner.flows.outcome.outcome import Failure, FailureKind
from horovodrunner.flows.outcome.task import RunOutcome
from horovodrunner.flows.telemetry.phases import Spans
from horovodrunner.formatting import cut, ranks_in_words
from horovodrunner.placement.topology import Slot
from horovodrunner.wire.events import (
    Beat,
    Ended,
    Handlers,
    Lines,
    RankPhases,
    RankStates,
    Sink,
    Stack,
    Started,
)

__all__ = ["Stall", "StallWatch", "Telemetry"]

STALL_WARNING_SECONDS = 60.0
"""A rank that has waited so long in one collective is warned about."""

WAITING_SECONDS = 2.0
"""A rank that has been in one collective for so long is shown as waiting."""

STATES_SECONDS = 1.0
"""What the ranks do is told the driver at most so often."""

STACKS_SECONDS = 5.0
"""How long the ranks may take to show their stacks."""

STACKS_CHARACTERS = 1_000_000
"""Of all ranks' stacks together, in an error; the log has all of them whole."""

_MAX_NAMED = 8

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stall:
    """Ranks that wait for others, and those that are missing."""

    seconds: float
    text: str
    missing: tuple[int, ...]


class StallWatch:
    """Finds out from the ranks' beats who waits for whom."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._beats: dict[int, tuple[float, Beat]] = {}
        self._returned: set[int] = set()

    def heard(self, beat: Beat, now: float) -> None:
        """Note what a rank says of itself."""
        self._beats[beat.rank] = now, beat

    def ended(self, rank: int) -> None:
        """Note that a rank has left main."""
        self._returned.add(rank)

    def waiting_in(self) -> dict[str, list[int]]:
        """Group the ranks that wait by the collective they wait in."""
        groups: dict[str, list[int]] = {}
        for rank, (_, beat) in sorted(self._beats.items()):
            if beat.waits_in and rank not in self._returned:
                groups.setdefault(beat.waits_in, []).append(rank)
        return groups

    def waiting_for(self, seconds: float) -> dict[int, str]:
        """Return the collectives that ranks have been in for so long, by rank."""
        return {
            rank: beat.waits_in
            for rank, (_, beat) in self._beats.items()
            if beat.waits_in and beat.seconds >= seconds and rank not in self._returned
        }

    def find(self, now: float, threshold: float) -> Stall | None:
        """Look for ranks that have waited for others, or been silent, for so many seconds."""
        here = {r: beat for r, beat in self._beats.items() if r not in self._returned}
        silent = {r: now - at for r, (at, _) in here.items() if now - at >= threshold}
        waiting = {r: b for r, (_, b) in here.items() if b.waits_in and r not in silent}
        # Without anybody who waits, ranks that compute are not missed.
        missing = [r for r in range(self._size) if r not in waiting] if waiting else sorted(silent)
        if not missing and not any(beat.surely for beat in waiting.values()):
            return None  # all ranks are in calls that compute as well
        waits = [beat.seconds + now - here[r][0] for r, beat in waiting.items()]
        longest = max([*waits, *silent.values()], default=0.0)
        if longest < threshold:
            return None
        text = self._who_is_missing(missing, silent)
        if waiting:
            text = f"{_who_waits(waiting)}; {text}"
        return Stall(longest, text, tuple(missing))

    def _who_is_missing(self, missing: Sequence[int], silent: Mapping[int, float]) -> str:
        if not missing:
            return "they wait in different collectives, or in the same one in another order"
        parts = [f"rank {rank} {self._whereabouts(rank, silent)}" for rank in missing[:_MAX_NAMED]]
        if more := missing[_MAX_NAMED:]:
            parts.append(f"and {len(more)} more")
        return "missing: " + ", ".join(parts)

    def _whereabouts(self, rank: int, silent: Mapping[int, float]) -> str:
        if rank in self._returned:
            return "has returned from main"
        if rank in silent:
            return f"has not answered for {silent[rank]:.0f} s (stopped, or stuck outside Python)"
        if rank not in self._beats:
            return "has not called main yet"
        where = self._beats[rank][1].where
        return f"is at {where}" if where else "is elsewhere"


def _who_waits(waiting: Mapping[int, Beat]) -> str:
    places: dict[tuple[str, str], set[int]] = {}
    for rank, beat in waiting.items():
        places.setdefault((beat.waits_in, beat.where), set()).add(rank)
    parts = [
        f"{ranks_in_words(ranks)} {'waits' if len(ranks) == 1 else 'wait'} in {collective}"
        + (f" ({where})" if where else "")
        for (collective, where), ranks in list(places.items())[:_MAX_NAMED]
    ]
    return ", ".join(parts)


class Telemetry:
    """Follows the ranks on partition 0, warns of a stall, and ends a run that stalls for long."""

    def __init__(
        self,
        slots: Sequence[Slot],
        log: MergedLog,
        outcome: RunOutcome,
        spans: Spans,
        to_driver: Sink,
    ) -> None:
        self._to_driver = to_driver
        self._told_states: tuple[str, ...] = ("starting",) * len(slots)
        self._states_may_differ = asyncio.Event()
        self._hosts = {slot.rank: slot.host for slot in slots}
        self._log = log
        self._outcome = outcome
        self._watch = StallWatch(len(slots))
        self._started: set[int] = set()
        self._ended: set[int] = set()
        self._stacks: dict[int, str] = {}
        self._all_stacks = asyncio.Event()
        self.handlers: Handlers = {
            Started: self._take_start,
            Beat: self._take_beat,
            Stack: self._take_stack,
            Ended: self._take_end,
            RankPhases: lambda event: spans.add_all(event.spans, event.rank),
        }

    def waiting_in(self) -> dict[str, list[int]]:
        """Group the ranks that wait by the collective they wait in."""
        return self._watch.waiting_in()

    async def watch(self, stall_timeout: float | None, show_stacks: Callable[[], None]) -> None:
        """Warn when ranks wait for others, and fail the run when they do so for too long."""
        pause = min(STALL_WARNING_SECONDS, stall_timeout or STALL_WARNING_SECONDS) / 8
        has_warned = False
        while not self._outcome.stopping.is_set():
            await asyncio.sleep(pause)
            now = time.monotonic()
            if stall_timeout and (stall := self._watch.find(now, stall_timeout)):
                show_stacks()
                await self._fail(stall, stall_timeout)
                return
            stall = self._watch.find(now, STALL_WARNING_SECONDS)
            if stall and not has_warned:
                self._log.say(f"no progress for {stall.seconds:.0f} s: {stall.text}")
            has_warned = stall is not None

    async def _fail(self, stall: Stall, stall_timeout: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_stacks.wait(), STACKS_SECONDS)
        if self._outcome.stopping.is_set():
            return  # something failed meanwhile, and that is the cause
        stacks = dict(sorted(self._stacks.items()))
        for rank, text in stacks.items():
            lines = text.rstrip().encode(errors="backslashreplace") + b"\n"
            self._log.lines(Lines(rank, "stack", lines))
        rank = stall.missing[0] if stall.missing else 0
        most = STACKS_CHARACTERS // max(1, len(stacks))
        self._outcome.failed(
            Failure(
                rank,
                self._hosts[rank],
                f"the run made no progress for stall_timeout={stall_timeout:g} s: {stall.text}",
                kind=FailureKind.STALL,
                stacks={str(rank): cut(text, most) for rank, text in stacks.items()},
            )
        )

    def _take_beat(self, beat: Beat) -> None:
        self._watch.heard(beat, time.monotonic())
        self._states_may_differ.set()

    async def tell_states(self) -> None:
        """Tell the driver what the ranks do, whenever it has changed, until cancelled."""
        while True:
            await self._states_may_differ.wait()
            self._states_may_differ.clear()
            states = self._states()
            if states != self._told_states:
                self._told_states = states
                self._to_driver(RankStates(states))
            await asyncio.sleep(STATES_SECONDS)

    def _states(self) -> tuple[str, ...]:
        waiting = self._watch.waiting_for(WAITING_SECONDS)
        return tuple(
            "starting"
            if rank not in self._started
            else "ended"
            if rank in self._ended
            else f"waiting in {waiting[rank]}"
            if rank in waiting
            else "training"
            for rank in sorted(self._hosts)
        )

    def _take_start(self, event: Started) -> None:
        _logger.debug("rank %d has called main", event.rank)
        self._started.add(event.rank)
        self._take_beat(Beat(event.rank))
        if len(self._started) == len(self._hosts):
            verb = "is" if len(self._started) == 1 else "are"
            self._log.note(f"{ranks_in_words(self._started)} {verb} running main", routine=True)

    def _take_end(self, event: Ended) -> None:
        self._watch.ended(event.rank)
        self._ended.add(event.rank)
        self._states_may_differ.set()

    def _take_stack(self, event: Stack) -> None:
        self._stacks[event.rank] = bytes(event.text).decode(errors="replace")
        if {*self._stacks, *self._ended} >= self._hosts.keys():
            self._all_stacks.set()
