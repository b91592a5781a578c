"""Runs of this process get slots in the order in which they came. Runs in: the driver.

Spark starts a barrier stage when all its slots are free at once, and whatever fits before it: small
stages would overtake a large one for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from horovodrunner.errors import StartTimeoutError
from horovodrunner.flows.going import GoingRun
from horovodrunner.flows.logs.driver import Console
from horovodrunner.processes.driver.resources import TaskRequest

__all__ = ["Turn"]

FIRST_NOTE_SECONDS = 2.0
"""A wait that is over by then is not told."""

LOOK_SECONDS = 1.0
"""How often the slots are counted: executors come and go."""

MAX_NAMED = 4

_lock = threading.Lock()
_queues: dict[str, list[Turn]] = {}
"""The runs that wait for slots of a Spark application, or hold some, in the order they came."""


class Turn:
    """A run's turn to take slots of a Spark application; it keeps them when it is restarted."""

    def __init__(self, run: GoingRun, wake: Callable[[], None]) -> None:
        self.title = run.title
        self.size = 0
        self.kind: tuple[float, float] = (0, 0)
        self.has_started = False
        self._wake = wake
        self._application: str | None = None

    def join(self, application: str) -> None:
        """Stand in line, unless it does already."""
        if self._application is None:
            self._application = application
            with _lock:
                _queues.setdefault(application, []).append(self)

    def wait(
        self,
        size: int,
        request: TaskRequest,
        total: Callable[[], int | None],
        *,
        waiting_since: float,
        start_timeout: float,
        console: Console,
    ) -> None:
        """Wait until nobody is before it, and as many slots as it needs are not held by others.

        `total` counts slots; where it cannot, Spark alone knows whether they are free.
        """
        self.size, self.kind = size, (request.cpus, request.gpus)
        next_note, last_note = time.monotonic() + FIRST_NOTE_SECONDS, ""
        while not self.has_started:
            slots = total()
            with _lock:
                ahead, holders = self._in_the_way(slots)
            if not (ahead or holders):
                return
            now = time.monotonic()
            text = _describe(size, slots, ahead, holders)
            if now >= waiting_since + start_timeout:
                raise StartTimeoutError(
                    f"the run did not start within {start_timeout:g} s: it was {text}. Start fewer "
                    "runs at once, or raise start_timeout"
                )
            if now >= next_note and text != last_note:
                last_note = text
                console.note(text)
            console.show(LOOK_SECONDS)

    def start(self) -> None:
        """Let the next one try: this one has its slots."""
        if not self.has_started:
            with _lock:
                self.has_started = True
                self._wake_others()

    def leave(self) -> None:
        """Give the slots or the place in the line back."""
        if self._application is None:
            return
        with _lock:
            queue = _queues[self._application]
            queue.remove(self)
            self._wake_others()
            if not queue:
                del _queues[self._application]
        self._application = None

    def _wake_others(self) -> None:
        for each in _queues.get(self._application or "", []):
            if each is not self and not each.has_started:
                each._wake()

    def _in_the_way(self, slots: int | None) -> tuple[list[Turn], list[Turn]]:
        """Return who is to start before it, and who holds slots that it needs."""
        queue = _queues[self._application or ""]
        ahead = [each for each in queue[: queue.index(self)] if not each.has_started]
        # What tasks of another kind leave free, Spark has to tell.
        holders = [each for each in queue if each.has_started and each.kind == self.kind]
        is_enough = slots is None or sum(each.size for each in holders) + self.size <= slots
        return ahead, [] if is_enough else holders


def _describe(size: int, slots: int | None, ahead: Sequence[Turn], holders: Sequence[Turn]) -> str:
    of = "" if slots is None else f" of {slots}"
    text = f"waiting for {size}{of} slot{'s' * ((slots or size) != 1)}"
    if holders:
        text += f", held by {_named(holders)}"
    if ahead:
        text += f"; {_named(ahead)} {'starts' if len(ahead) == 1 else 'start'} first"
    return text


def _named(turns: Sequence[Turn]) -> str:
    names = [each.title for each in turns[:MAX_NAMED]]
    if more := len(turns) - len(names):
        names.append(f"{more} more")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
