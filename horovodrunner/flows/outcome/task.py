"""Which failure is the run's, found on partition 0. Runs in: the task (np < 0: the driver)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from horovodrunner.flows.outcome.outcome import Failure, FailureKind, Outcome
from horovodrunner.formatting import cut, ranks_in_words
from horovodrunner.placement.topology import Slot
from horovodrunner.wire.events import Ended, Handlers

__all__ = ["RunOutcome"]

MAX_CONSEQUENCES = 1000
CONSEQUENCE_CHARACTERS = 500
"""How many failures are told beside the first cause, and how much of each."""

_logger = logging.getLogger(__name__)


class RunOutcome:
    """Collects how the ranks end; the first failure ends all the others."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._hosts = {slot.rank: slot.host for slot in slots}
        self._outcomes: dict[int, Outcome] = {}
        self._failures: list[Failure] = []
        self.stopping = asyncio.Event()
        """Set as soon as every worker is to end."""
        self.all_ended = asyncio.Event()
        """Set when every rank has ended."""
        self.handlers: Handlers = {
            Ended: lambda event: self.ended(event.rank, Outcome.from_bytes(event.outcome))
        }

    def ended(self, rank: int, outcome: Outcome) -> None:
        """Note how a rank ended."""
        _logger.debug("rank %d has ended: %s", rank, outcome.failure or "well, or stopped")
        if outcome.failure is not None:
            self.failed(outcome.failure)
        self._outcomes.setdefault(rank, outcome)
        if self._outcomes.keys() >= self._hosts.keys():
            self.all_ended.set()

    def failed(self, failure: Failure) -> None:
        """Note a failure, of a rank or of the run's machinery, and end every worker."""
        self._failures.append(failure)
        self.stopping.set()

    def lost(
        self, ranks: Sequence[int], summary: str, kind: FailureKind = FailureKind.LOST
    ) -> None:
        """Note that nothing more will be heard of some ranks."""
        for rank in ranks:
            if rank not in self._outcomes:
                failure = Failure(rank, self._hosts[rank], summary, kind=kind)
                self.ended(rank, Outcome(failure=failure))

    async def wait_for_end(self, grace: float) -> None:
        """Wait until every rank has ended, or for so many seconds once they all are to end."""
        ended = asyncio.create_task(self.all_ended.wait())
        stopping = asyncio.create_task(self.stopping.wait())
        try:
            await asyncio.wait([ended, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                await asyncio.wait([ended], timeout=grace)
        finally:
            ended.cancel()
            stopping.cancel()

    def summary(self, waiting_in: Mapping[str, Sequence[int]]) -> Outcome | None:
        """Return why the run failed, if it did; `waiting_in` groups ranks by collective."""
        if not self._failures:
            return None
        # Peer-loss errors are symptoms: one is the cause only when nothing else failed.
        causes = [f for f in self._failures if not f.after_peer_loss] or self._failures
        cause = causes[0]
        others = [f for f in self._failures if f is not cause][:MAX_CONSEQUENCES]
        if cause.after_peer_loss:
            cause = self._with_early_leavers(cause, waiting_in)
        return Outcome(failure=cause, consequences=tuple(map(_in_brief, others)))

    def _with_early_leavers(
        self, cause: Failure, waiting_in: Mapping[str, Sequence[int]]
    ) -> Failure:
        left = {rank for rank, outcome in self._outcomes.items() if outcome.success is not None}
        if not left:
            return cause
        waiting: dict[str, set[int]] = {}
        for failure in self._failures:
            if failure.rank is not None:
                waiting.setdefault(failure.collective, set()).add(failure.rank)
        for collective, ranks in waiting_in.items():
            waiting.setdefault(collective, set()).update(ranks)
        waits = ", ".join(
            f"{ranks_in_words(ranks)} waited in {collective or 'a collective'}"
            for collective, ranks in waiting.items()
        )
        note = (
            f"{ranks_in_words(left)} returned from main while {waits}. All ranks must take part in "
            "the same collective operations: a callback that stops training (EarlyStopping) must "
            "see the same numbers on all, so MetricAverageCallback goes before it"
        )
        return replace(cause, summary=f"{note}. {cause.summary}")


def _in_brief(failure: Failure) -> Failure:
    """Keep what is shown of a consequence: all ranks' together have to fit a frame."""
    summary = cut(failure.summary, CONSEQUENCE_CHARACTERS)
    return replace(failure, summary=summary, traceback="", exception=b"", last_lines="")
