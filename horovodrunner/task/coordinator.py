"""What partition 0 knows of all ranks: merges logs, finds the first cause. Runs in: the task."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from horovodrunner.core.connection import Connection, FrameServer
from horovodrunner.core.frames import Frame
from horovodrunner.core.job import Failure, FailureKind, Outcome
from horovodrunner.core.lines import prefix_lines
from horovodrunner.core.topology import Slot
from horovodrunner.core.words import ranks_in_words
from horovodrunner.task.checkpoints import LatestDecision
from horovodrunner.task.stall import RankState, Stall, StallWatch

__all__ = ["Coordinator", "DriverLink", "Hub", "RankEvents"]

STALL_WARNING_SECONDS = 60.0
"""A rank that has waited so long in one collective is told about."""

STACKS_SECONDS = 5.0
"""How long the ranks may take to show their stacks."""

JOIN_SECONDS = 60.0
"""How long partition 0 waits for its peers' tasks to connect after the gather step."""


class RankEvents(Protocol):
    """What can be told about a rank: to the coordinator itself, or through a connection to it."""

    def lines(self, rank: int, stream: str, lines: bytes) -> None:
        """Take whole lines that the rank printed."""

    def message(self, rank: int, message: bytes) -> None:
        """Take a ``log_to_driver`` message."""

    def started(self, rank: int) -> None:
        """Note that the rank calls main now."""

    def state(self, rank: int, fields: Mapping[str, Any]) -> None:
        """Note where the rank's main is: the fields of its ``state`` frame."""

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

    def note(self, text: str) -> None:
        """Show a line of the run's own about what happens now."""

    def placed(self, slots: Sequence[Slot]) -> None:
        """Tell which task and host has which rank."""

    def failed(self, outcome: Outcome) -> None:
        """Report the run's failure ahead of the stage's end."""

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
    """

    def __init__(
        self, slots: Sequence[Slot], driver: DriverLink, log: Callable[[bytes], None]
    ) -> None:
        self._slots = {slot.rank: slot for slot in slots}
        self._driver = driver
        self._log = log
        self._started: set[int] = set()
        self._outcomes: dict[int, Outcome] = {}
        self._failures: list[Failure] = []
        self._stop_callbacks: list[Callable[[], None]] = []
        self._stack_callbacks: list[Callable[[], None]] = []
        self._stacks: dict[int, str] = {}
        self._all_stacks = asyncio.Event()
        self._stall_watch = StallWatch(len(slots))
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

    def started(self, rank: int) -> None:
        """Note that a rank calls main."""
        self._started.add(rank)
        self._stall_watch.heard(rank, RankState(time.monotonic()))
        if len(self._started) == len(self._slots):
            verb = "is" if len(self._started) == 1 else "are"
            self._driver.note(f"{ranks_in_words(self._started)} {verb} running main")

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
            self.lines(rank, "stack", text.rstrip().encode() + b"\n")
        rank = stall.missing[0] if stall.missing else 0
        self.failed(
            Failure(
                rank,
                self._slots[rank].host,
                f"the run made no progress for stall_timeout={stall_timeout:g} s: {stall.text}",
                kind=FailureKind.STALL,
                stacks={str(rank): text for rank, text in stacks.items()},
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

    def lost(self, ranks: Sequence[int], summary: str) -> None:
        """Note that nothing more will be heard of some ranks.

        Parameters
        ----------
        ranks
            The ranks; those that had already ended are left as they are.
        summary
            Why.
        """
        for rank in ranks:
            if rank not in self._outcomes:
                failure = Failure(rank, self._slots[rank].host, summary, kind=FailureKind.LOST)
                self.ended(rank, Outcome(failure=failure))

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
        others = tuple(f for f in self._failures if f is not cause)
        if cause.after_peer_loss:
            cause = self._with_early_leavers(cause)
        return Outcome(failure=cause, consequences=others)

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
            f" ({ranks_in_words(left)} returned from main while {waits}. All ranks must take part "
            "in the same collective operations)"
        )
        return replace(cause, summary=cause.summary + note)


class Hub:
    """Where the other tasks connect to partition 0.

    It opens before the gather step, because its port is part of what is gathered.

    Parameters
    ----------
    token
        The run's secret.
    log
        Takes lines about refused connections.
    """

    def __init__(self, token: bytes, log: Callable[[bytes], None]) -> None:
        self._server = FrameServer(token, self._serve, lambda why: log(_own_line(why)))
        self._coordinator: Coordinator | None = None
        self._latest: LatestDecision | None = None
        self._slots: Sequence[Slot] = ()
        self._ready = asyncio.Event()
        self._joined: set[int] = set()
        self._left: set[int] = set()
        self._all_joined = asyncio.Event()
        self._all_left = asyncio.Event()

    async def open(self, host: str) -> int:
        """Start to listen.

        Parameters
        ----------
        host
            Address to bind.

        Returns
        -------
        int
            The port.
        """
        return await self._server.start(host)

    def begin(
        self, coordinator: Coordinator, slots: Sequence[Slot], latest: LatestDecision
    ) -> None:
        """Let the peers in.

        Parameters
        ----------
        coordinator
            Takes what they report.
        slots
            All slots of the run.
        latest
            Knows which checkpoint they start from.
        """
        self._coordinator = coordinator
        self._latest = latest
        self._slots = slots
        self._note_presence()
        self._ready.set()

    async def watch_joining(self) -> None:
        """Report the tasks that have not connected within `JOIN_SECONDS`."""
        assert self._coordinator is not None  # noqa: S101 - begin() was called
        try:
            await asyncio.wait_for(self._all_joined.wait(), JOIN_SECONDS)
        except asyncio.TimeoutError:
            for slot in self._slots:
                if slot.partition in self._peers - self._joined:
                    self._coordinator.lost(
                        [slot.rank],
                        f"its task on {slot.host} ({slot.address}) did not connect to rank 0's "
                        f"task on {self._slots[0].host} ({self._slots[0].address}) within "
                        f"{JOIN_SECONDS:g} s: check that executors reach each other's ports",
                    )

    async def wait_for_leaving(self, timeout: float) -> None:
        """Wait until every peer has sent all it had and left.

        Parameters
        ----------
        timeout
            Most seconds to wait.
        """
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_left.wait(), timeout)

    async def close(self) -> None:
        """Stop to listen and disconnect the peers."""
        await self._server.close()

    async def _serve(self, connection: Connection) -> None:
        await self._ready.wait()
        coordinator = self._coordinator
        assert coordinator is not None  # noqa: S101 - set before the event
        first = await connection.receive()
        if first is None or first.kind != "join":
            return
        partition = int(first.header["partition"])
        ranks = [slot.rank for slot in self._slots if slot.partition == partition]
        self._joined.add(partition)
        self._note_presence()
        coordinator.on_stop(lambda: connection.send("stop"))
        coordinator.on_stack_request(lambda: connection.send("stacks"))
        answers: set[asyncio.Task[None]] = set()
        while (frame := await connection.receive()) is not None:
            if frame.kind == "latest":
                answers.add(asyncio.create_task(self._answer_latest(connection, partition)))
            elif frame.kind == "fetched":
                self._fetched(partition, str(frame.header["directory"]))
            else:
                _pass_on(frame, coordinator)
        for answer in answers:
            answer.cancel()
        self._fetched(partition, "")
        coordinator.lost(ranks, "contact with its task was lost; the executor may have died")
        self._left.add(partition)
        self._note_presence()

    async def _answer_latest(self, connection: Connection, partition: int) -> None:
        assert self._latest is not None  # noqa: S101 - begin() was called
        answer = await self._latest.answer(partition)
        fields = {name: value for name, value in answer.items() if name != "manifest"}
        connection.send("latest", answer["manifest"].encode(), **fields)

    def _fetched(self, partition: int, directory: str) -> None:
        assert self._latest is not None  # noqa: S101 - begin() was called
        self._latest.fetched(partition, directory)

    @property
    def _peers(self) -> set[int]:
        return {slot.partition for slot in self._slots} - {0}

    def _note_presence(self) -> None:
        if self._joined >= self._peers:
            self._all_joined.set()
        if self._left >= self._peers:
            self._all_left.set()


def _pass_on(frame: Frame, events: RankEvents) -> None:
    rank = int(frame.header.get("rank", -1))
    if frame.kind == "lines":
        events.lines(rank, str(frame.header["stream"]), bytes(frame.body))
    elif frame.kind == "message":
        events.message(rank, bytes(frame.body))
    elif frame.kind == "started":
        events.started(rank)
    elif frame.kind == "state":
        events.state(rank, frame.header)
    elif frame.kind == "stack":
        events.stack(rank, bytes(frame.body).decode(errors="replace"))
    elif frame.kind == "ended":
        events.ended(rank, Outcome.from_frame(frame.header["outcome"], frame.body))


def _own_line(text: str) -> bytes:
    return f"HorovodRunner: {text}\n".encode()
