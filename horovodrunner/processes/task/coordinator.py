"""What partition 0 knows of all ranks: merges logs, finds the first cause. Runs in: the task."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from horovodrunner.flows.logs.lines import prefix_lines
from horovodrunner.flows.telemetry.phases import Phase, Spans
from horovodrunner.formatting import cut, ranks_in_words
from horovodrunner.placement.topology import Slot
from horovodrunner.processes.task.stall import RankState, Stall, StallWatch
from horovodrunner.wire.job import Failure, FailureKind, Outcome

__all__ = ["Coordinator", "DriverLink", "RankEvents"]

STALL_WARNING_SECONDS = 60.0
"""A rank that has waited so long in one collective is told about."""

STACKS_SECONDS = 5.0
"""How long the ranks may take to show their stacks."""

STACKS_CHARACTERS = 1_000_000
"""Of all ranks' stacks together, in an error; the log has all of them whole."""

MAX_CONSEQUENCES = 1000
CONSEQUENCE_CHARACTERS = 500
"""How many failures are told beside the first cause, and how much of each."""


class RankEvents(Protocol):
    """What can be told about a rank: to the coordinator itself, or through a connection to it."""

    def lines(self, rank: int, stream: str, lines: bytes) -> None:
        """Take whole lines that the rank printed."""

    def message(self, rank: int, message: bytes) -> None:
        """Take a ``log_to_driver`` message."""

    def notice(self, rank: int, key: str, text: bytes) -> None:
        """Take a line of this package's that is to be shown once, whichever ranks send it."""

    def started(self, rank: int) -> None:
        """Note that the rank calls main now."""

    def state(self, rank: int, fields: Mapping[str, Any]) -> None:
        """Note where the rank's main is: the fields of its ``state`` frame."""

    def times(self, rank: int, spans: Mapping[str, Sequence[float]]) -> None:
        """Note when the rank's phases began and ended."""

    def stack(self, rank: int, text: str) -> None:
        """Take the rank's Python stack, which was asked for."""

    def ended(self, rank: int, outcome: Outcome) -> None:
        """Note how the rank ended; neither success nor failure means that it was stopped."""


class DriverLink(Protocol):
    """What partition 0 tells the driver while the run goes on."""

    def lines(self, lines: bytes) -> None:
        """Show whole, prefixed lines if the verbosity asks for them."""

    def message(self, rank: int, message: bytes) -> None:
        """Show a ``log_to_driver`` message of one rank."""

    def note(self, text: str, *, routine: bool = False) -> None:
        """Show a line of the run's own about what happens now, or goes on as it should."""

    def placed(self, slots: Sequence[Slot]) -> None:
        """Tell which task and host has which rank."""

    def failed(self, outcome: Outcome) -> None:
        """Report the run's failure ahead of the stage's end."""

    def phases(self, phases: Sequence[Phase]) -> None:
        """Tell when the phases of the run began and ended."""

    def storing(self) -> None:
        """Tell that the ranks have ended and a checkpoint is still on its way."""

    async def close(self) -> None:
        """Send what is waiting and leave."""


class Coordinator:
    """Collects what all ranks report and decides how the run ended.

    Parameters
    ----------
    slots
        All slots of the run.
    driver
        The way to the driver.
    log
        Takes the merged log: whole, prefixed lines.
    spans
        Takes when the ranks' phases began and ended.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        driver: DriverLink,
        log: Callable[[bytes], None],
        spans: Spans | None = None,
    ) -> None:
        self._slots = {slot.rank: slot for slot in slots}
        self._driver = driver
        self._log = log
        self._started: set[int] = set()
        self._noticed: set[str] = set()
        self._outcomes: dict[int, Outcome] = {}
        self._failures: list[Failure] = []
        self._stop_callbacks: list[Callable[[], None]] = []
        self._stack_callbacks: list[Callable[[], None]] = []
        self._stacks: dict[int, str] = {}
        self._all_stacks = asyncio.Event()
        self._stall_watch = StallWatch(len(slots))
        self._spans = Spans() if spans is None else spans
        self.stopping = asyncio.Event()
        """Set as soon as every worker is to end."""
        self.all_ended = asyncio.Event()
        """Set when every rank has ended."""

    def on_stop(self, callback: Callable[[], None]) -> None:
        """Call a function when every worker is to end; at once if that is already so.

        Parameters
        ----------
        callback
            Stops some of the workers.
        """
        self._stop_callbacks.append(callback)
        if self.stopping.is_set():
            callback()

    def stop(self) -> None:
        """End every worker of the run."""
        if not self.stopping.is_set():
            self.stopping.set()
            for callback in self._stop_callbacks:
                callback()

    def lines(self, rank: int, stream: str, lines: bytes) -> None:
        """Merge lines of one rank into the log."""
        prefixed = prefix_lines(lines, rank, stream)
        self._log(prefixed)
        self._driver.lines(prefixed)

    def message(self, rank: int, message: bytes) -> None:
        """Pass on a ``log_to_driver`` message of one rank."""
        self._driver.message(rank, message)

    def notice(self, rank: int, key: str, text: bytes) -> None:
        """Show a line unless a rank has sent one with the same key."""
        if key not in self._noticed:
            self._noticed.add(key)
            self._say(text.decode(errors="replace"))

    def started(self, rank: int) -> None:
        """Note that a rank calls main."""
        self._started.add(rank)
        self._stall_watch.heard(rank, RankState(time.monotonic()))
        if len(self._started) == len(self._slots):
            verb = "is" if len(self._started) == 1 else "are"
            self._driver.note(f"{ranks_in_words(self._started)} {verb} running main", routine=True)

    def state(self, rank: int, fields: Mapping[str, Any]) -> None:
        """Note where a rank's main is."""
        self._stall_watch.heard(
            rank,
            RankState(
                heard_at=time.monotonic(),
                where=str(fields["where"]),
                waits_in=str(fields["waits_in"]),
                surely=bool(fields["surely"]),
                seconds=float(fields["seconds"]),
            ),
        )

    def times(self, rank: int, spans: Mapping[str, Sequence[float]]) -> None:
        """Note when a rank's phases began and ended."""
        self._spans.add_all(spans, rank)

    def on_stack_request(self, callback: Callable[[], None]) -> None:
        """Say how to ask some of the workers for their stacks.

        Parameters
        ----------
        callback
            Asks; the answers come through :meth:`stack`.
        """
        self._stack_callbacks.append(callback)

    def stack(self, rank: int, text: str) -> None:
        """Take a rank's Python stack."""
        self._stacks[rank] = text
        if {*self._stacks, *self._outcomes} >= set(self._slots):
            self._all_stacks.set()

    async def collect_stacks(self) -> dict[int, str]:
        """Ask every rank where it is.

        Returns
        -------
        dict of str
            Python stacks by rank, of those that answered in time.
        """
        self._stacks.clear()
        self._all_stacks.clear()
        for callback in self._stack_callbacks:
            callback()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_stacks.wait(), STACKS_SECONDS)
        return dict(sorted(self._stacks.items()))

    async def watch_for_stalls(self, stall_timeout: float | None) -> None:
        """Warn when ranks wait for others, and fail the run when they do so for too long.

        Parameters
        ----------
        stall_timeout
            Seconds after which the run fails; None only warns.
        """
        pause = min(STALL_WARNING_SECONDS, stall_timeout or STALL_WARNING_SECONDS) / 8
        has_warned = False
        while not self.stopping.is_set():
            await asyncio.sleep(pause)
            now = time.monotonic()
            if stall_timeout and (stall := self._stall_watch.find(now, stall_timeout)):
                await self._fail_for_stall(stall, stall_timeout)
                return
            stall = self._stall_watch.find(now, STALL_WARNING_SECONDS)
            if stall and not has_warned:
                self._say(f"no progress for {stall.seconds:.0f} s: {stall.text}")
            has_warned = stall is not None

    async def _fail_for_stall(self, stall: Stall, stall_timeout: float) -> None:
        stacks = await self.collect_stacks()
        if self.stopping.is_set():
            return  # something failed meanwhile, and that is the cause
        for rank, text in stacks.items():
            self.lines(rank, "stack", text.rstrip().encode(errors="backslashreplace") + b"\n")
        rank = stall.missing[0] if stall.missing else 0
        most = STACKS_CHARACTERS // max(1, len(stacks))
        self.failed(
            Failure(
                rank,
                self._slots[rank].host,
                f"the run made no progress for stall_timeout={stall_timeout:g} s: {stall.text}",
                kind=FailureKind.STALL,
                stacks={str(rank): cut(text, most) for rank, text in stacks.items()},
            )
        )

    def _say(self, text: str) -> None:
        """Tell the user, on the driver and in the log."""
        self._log(_own_line(text))
        self._driver.note(text)

    def ended(self, rank: int, outcome: Outcome) -> None:
        """Note how a rank ended; the first failure ends all the others."""
        if outcome.failure is not None:
            self.failed(outcome.failure)
        self._outcomes.setdefault(rank, outcome)
        self._stall_watch.ended(rank)
        if len(self._outcomes) == len(self._slots):
            self.all_ended.set()

    def failed(self, failure: Failure) -> None:
        """Note a failure, of a rank or of the run's machinery, and end every worker.

        Parameters
        ----------
        failure
            What happened.
        """
        self._failures.append(failure)
        self.stop()

    def lost(
        self, ranks: Sequence[int], summary: str, kind: FailureKind = FailureKind.LOST
    ) -> None:
        """Note that nothing more will be heard of some ranks.

        Parameters
        ----------
        ranks
            The ranks; those that had already ended are left as they are.
        summary
            Why.
        kind
            What failed.
        """
        for rank in ranks:
            if rank not in self._outcomes:
                failure = Failure(rank, self._slots[rank].host, summary, kind=kind)
                self.ended(rank, Outcome(failure=failure))

    async def wait_for_end(self, grace: float) -> None:
        """Wait until every rank has ended, or for a while once they all are to end.

        Parameters
        ----------
        grace
            Most seconds to wait after :meth:`stop`.
        """
        ended = asyncio.create_task(self.all_ended.wait())
        stopping = asyncio.create_task(self.stopping.wait())
        try:
            await asyncio.wait([ended, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                await asyncio.wait([ended], timeout=grace)
        finally:
            ended.cancel()
            stopping.cancel()

    def verdict(self) -> Outcome | None:
        """Say why the run failed.

        Returns
        -------
        Outcome or None
            The first cause and its consequences; None if no rank failed.
        """
        if not self._failures:
            return None
        # What says "my peer went away" is a cause only when nothing else is.
        causes = [f for f in self._failures if not f.after_peer_loss] or self._failures
        cause = causes[0]
        others = [f for f in self._failures if f is not cause][:MAX_CONSEQUENCES]
        if cause.after_peer_loss:
            cause = self._with_early_leavers(cause)
        return Outcome(failure=cause, consequences=tuple(map(_in_brief, others)))

    def _with_early_leavers(self, cause: Failure) -> Failure:
        left = {rank for rank, outcome in self._outcomes.items() if outcome.success is not None}
        if not left:
            return cause
        waiting: dict[str, set[int]] = {}
        for failure in self._failures:
            if failure.rank is not None:
                waiting.setdefault(failure.collective, set()).add(failure.rank)
        for collective, ranks in self._stall_watch.waiting_in().items():
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


def _own_line(text: str) -> bytes:
    return f"HorovodRunner: {text}\n".encode(errors="backslashreplace")


def _in_brief(failure: Failure) -> Failure:
    """Keep what is shown of a consequence: all ranks' together have to fit a frame."""
    summary = cut(failure.summary, CONSEQUENCE_CHARACTERS)
    return replace(failure, summary=summary, traceback="", exception=b"", last_lines="")
