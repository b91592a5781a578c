"""All ranks agree upon the call of should_save_now() at which they save. Runs in: the task.

::

    somebody ── a checkpoint is wanted ───────▶ partition 0
                ◀─ how many calls were there? ─ it asks every rank; their next call waits
                ── 16; 17; 16 ────────────────▶
                ◀─ save at call 18 ────────────

The answers come from the workers' control threads, so that it does not matter where main is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import Protocol

from horovodrunner.wire.events import (
    CallsCounted,
    CountCalls,
    Ended,
    Handlers,
    SaveAt,
    SaveWanted,
    Sink,
)

__all__ = ["SaveAgreement"]

GATHER_SECONDS = 0.3
"""Schedulers signal all processes of a machine, or of a job, at about the same time."""

HOLD_SECONDS = 5.0
"""How long ranks may be held up by one that does not answer."""

MOST_REASONS = 3

_logger = logging.getLogger(__name__)


class _Note(Protocol):
    def __call__(self, text: str, *, routine: bool = False) -> None: ...


class SaveAgreement:
    """Lets all ranks save at the same call whenever somebody wants a checkpoint.

    Where nobody has reached the call that was agreed upon last, the same one comes out again.
    """

    def __init__(
        self,
        ranks: Iterable[int],
        wanted: asyncio.Queue[SaveWanted],
        *,
        stopping: asyncio.Event,
        note: _Note,
    ) -> None:
        self._running = set(ranks)
        self._wanted = wanted
        self._stopping = stopping
        self._note = note
        self._question = 0
        self._calls: dict[int, int] = {}
        self._all_have_answered = asyncio.Event()
        self.handlers: Handlers = {
            SaveWanted: wanted.put_nowait,
            CallsCounted: self._take_count,
            Ended: self._take_end,
        }

    async def run(self, tell: Sink) -> None:
        """Take wishes, one after the other; `tell` sends an event to all workers."""
        while True:
            wanted = [await self._wanted.get()]
            if wanted[0].urgent:
                await asyncio.sleep(GATHER_SECONDS)
            wanted += self._waiting()
            if self._stopping.is_set() or not self._running:
                continue
            self._note(
                f"{_reasons(wanted)}: all ranks are to save a checkpoint",
                routine=not any(each.urgent for each in wanted),
            )
            self._note(_agreement(await self._agree(tell)), routine=True)

    async def _agree(self, tell: Sink) -> int:
        """Return the call at which all ranks save, once they are told."""
        while True:
            self._question += 1
            self._calls.clear()
            self._all_have_answered.clear()
            self._look()
            tell(CountCalls(self._question))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._all_have_answered.wait(), HOLD_SECONDS)
                call = max(self._calls.values(), default=0) + 1
                tell(SaveAt(self._question, call))
                return call
            _logger.debug("not all ranks answer: only %s", sorted(self._calls))
            tell(SaveAt(self._question))  # the others go on meanwhile
            await self._all_have_answered.wait()

    def _waiting(self) -> list[SaveWanted]:
        return [self._wanted.get_nowait() for _ in range(self._wanted.qsize())]

    def _take_count(self, event: CallsCounted) -> None:
        if event.question == self._question:
            self._calls[event.rank] = event.calls
            self._look()

    def _take_end(self, event: Ended) -> None:
        self._running.discard(event.rank)
        self._look()

    def _look(self) -> None:
        if self._calls.keys() >= self._running:
            self._all_have_answered.set()


def _reasons(wanted: Iterable[SaveWanted]) -> str:
    """Join what is to be told.

    >>> _reasons([SaveWanted("rank 0 was sent SIGTERM"), SaveWanted("rank 0 was sent SIGTERM")])
    'rank 0 was sent SIGTERM'
    """
    reasons = list(dict.fromkeys(each.why for each in wanted))
    more = len(reasons) - MOST_REASONS
    return "; ".join(reasons[:MOST_REASONS]) + (f"; and {more} more" if more > 0 else "")


def _agreement(call: int) -> str:
    if call == 1:
        return "all ranks save at their first call of checkpoint.should_save_now()"
    return f"all ranks save at their call {call} of checkpoint.should_save_now()"
