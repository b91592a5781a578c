"""Which ranks wait for which, from what they tell about themselves. Runs in: the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from horovodrunner.formatting import ranks_in_words

__all__ = ["RankState", "Stall", "StallWatch"]


@dataclass(frozen=True)
class RankState:
    """What a rank last told about itself.

    Parameters
    ----------
    heard_at
        When, in seconds of the monotonic clock.
    where
        File, line and function of main's innermost frame.
    waits_in
        The collective main is in, or "".
    surely
        False when that call may be computing as well.
    seconds
        How long the call had lasted then.
    """

    heard_at: float
    where: str = ""
    waits_in: str = ""
    surely: bool = True
    seconds: float = 0.0


@dataclass(frozen=True)
class Stall:
    """Ranks that wait for others.

    Parameters
    ----------
    seconds
        How long the longest wait has lasted.
    text
        Who waits where, and for whom.
    missing
        The ranks that are waited for, as far as they are known.
    """

    seconds: float
    text: str
    missing: tuple[int, ...]


class StallWatch:
    """Collects what the ranks tell and finds out who is missing.

    Parameters
    ----------
    size
        Number of ranks.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._states: dict[int, RankState] = {}
        self._returned: set[int] = set()

    def heard(self, rank: int, state: RankState) -> None:
        """Note what a rank tells.

        Parameters
        ----------
        rank
            The rank.
        state
            What it tells.
        """
        self._states[rank] = state

    def ended(self, rank: int) -> None:
        """Note that a rank has left main.

        Parameters
        ----------
        rank
            The rank.
        """
        self._returned.add(rank)

    def waiting_in(self) -> dict[str, list[int]]:
        """Group the ranks that wait by the collective they wait in.

        Returns
        -------
        dict of list of int
            Ranks by collective.
        """
        groups: dict[str, list[int]] = {}
        for rank, state in sorted(self._states.items()):
            if state.waits_in and rank not in self._returned:
                groups.setdefault(state.waits_in, []).append(rank)
        return groups

    def find(self, now: float, threshold: float) -> Stall | None:
        """Look for ranks that have waited for others, or been silent, for too long.

        Parameters
        ----------
        now
            The monotonic clock, in seconds.
        threshold
            How many seconds are too long.

        Returns
        -------
        Stall or None
            What is found.
        """
        here = {r: s for r, s in self._states.items() if r not in self._returned}
        silent = {r: now - s.heard_at for r, s in here.items() if now - s.heard_at >= threshold}
        waiting = {r: s for r, s in here.items() if s.waits_in and r not in silent}
        # Without anybody who waits, ranks that compute are not missed.
        missing = [r for r in range(self._size) if r not in waiting] if waiting else sorted(silent)
        waits = {r: s.seconds + now - s.heard_at for r, s in waiting.items()}
        if not missing and not any(state.surely for state in waiting.values()):
            return None  # all ranks are in calls that compute as well
        longest = max([*waits.values(), *silent.values()], default=0.0)
        if longest < threshold:
            return None
        text = self._who_is_missing(missing, silent)
        if waiting:
            text = f"{_who_waits(waiting)}; {text}"
        return Stall(longest, text, tuple(missing))

    def _who_is_missing(self, missing: Sequence[int], silent: Mapping[int, float]) -> str:
        if not missing:
            return "they wait in different collectives, or in the same one in another order"
        parts = []
        for rank in missing[:8]:
            state = self._states.get(rank)
            if rank in self._returned:
                what = "has returned from main"
            elif rank in silent:
                what = (
                    f"has not answered for {silent[rank]:.0f} s (stopped, or stuck outside Python)"
                )
            elif state is None:
                what = "has not called main yet"
            else:
                what = f"is at {state.where}" if state.where else "is elsewhere"
            parts.append(f"rank {rank} {what}")
        more = f", and {len(missing) - 8} more" if len(missing) > 8 else ""
        return "missing: " + ", ".join(parts) + more


def _who_waits(waiting: Mapping[int, RankState]) -> str:
    places: dict[tuple[str, str], set[int]] = {}
    for rank, state in waiting.items():
        places.setdefault((state.waits_in, state.where), set()).add(rank)
    parts = [
        f"{ranks_in_words(ranks)} {'waits' if len(ranks) == 1 else 'wait'} in {collective}"
        + (f" ({where})" if where else "")
        for (collective, where), ranks in list(places.items())[:8]
    ]
    return ", ".join(parts)
