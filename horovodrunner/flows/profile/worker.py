"""Sums up samples of the main thread's stack. Runs in: the worker."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from json import dumps  # main may put another in its place in json
from types import FrameType

from horovodrunner.wire.events import Profile

__all__ = ["StackProfile"]

MAX_STACKS = 500
"""So many different stacks are told apart."""

MAX_DEPTH = 200
"""Of a deeper stack, the outermost and the innermost frames are kept."""

MAX_NAME = 300

_ENTRIES = ("horovodrunner/processes/worker/__main__.py", "horovodrunner/flows/script/worker.py")
"""What is outside of them is not main's."""

_OTHERS = ("(other stacks)", "", 0)
_LEFT_OUT = ("(frames left out)", "", 0)


class StackProfile:
    """Seconds by stack, in bounded memory, and seconds in collectives."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._frames: dict[tuple[str, str, int], int] = {}
        self._stacks: dict[tuple[int, ...], float] = {}
        self._waited: dict[str, float] = {}
        self._may_have_waited: dict[str, float] = {}

    def add(
        self, frames: Sequence[FrameType], seconds: float, waits_in: str, *, surely: bool
    ) -> None:
        """Count so many seconds for a stack, whose innermost frame is the first."""
        places = []
        for frame in frames:
            code = frame.f_code
            if code.co_filename.endswith(_ENTRIES):
                break
            places.append((code.co_name[:MAX_NAME], code.co_filename[:MAX_NAME], frame.f_lineno))
        places.reverse()
        if len(places) > MAX_DEPTH:
            half = MAX_DEPTH // 2
            places = [*places[:half], _LEFT_OUT, *places[-half:]]
        with self._lock:
            stack = self._stack_of(places)
            self._stacks[stack] = self._stacks.get(stack, 0.0) + seconds
            if waits_in:
                sums = self._waited if surely else self._may_have_waited
                sums[waits_in] = sums.get(waits_in, 0.0) + seconds

    def event(self, seconds: float) -> Profile:
        """Return what is known after so many seconds of main."""
        with self._lock:
            stacks = [[list(stack), round(each, 3)] for stack, each in self._stacks.items()]
            text = dumps({"frames": list(self._frames), "stacks": stacks})
            return Profile(
                self._rank,
                seconds,
                dict(self._waited),
                dict(self._may_have_waited),
                text.encode(errors="replace"),
            )

    def _stack_of(self, places: list[tuple[str, str, int]]) -> tuple[int, ...]:
        if len(self._stacks) < MAX_STACKS or all(each in self._frames for each in places):
            stack = tuple(map(self._number_of, places))
            if len(self._stacks) < MAX_STACKS or stack in self._stacks:
                return stack
        return (self._number_of(_OTHERS),)

    def _number_of(self, place: tuple[str, str, int]) -> int:
        return self._frames.setdefault(place, len(self._frames))
