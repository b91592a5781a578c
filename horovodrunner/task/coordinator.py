"""What partition 0 knows of all ranks: merges logs, finds the first cause. Runs in: the task."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from horovodrunner.core.connection import Connection, FrameServer
from horovodrunner.core.frames import Frame
from horovodrunner.core.job import Failure, Outcome
from horovodrunner.core.lines import prefix_lines
from horovodrunner.core.topology import Slot

__all__ = ["Coordinator", "DriverLink", "Hub", "RankEvents"]

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

    def failed(self, outcome: Outcome) -> None:
        """Report the run's failure ahead of the stage's end."""

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
        if len(self._started) == len(self._slots):
            self._driver.note(f"{_ranks_in_words(self._started)} running main")

    def ended(self, rank: int, outcome: Outcome) -> None:
        """Note how a rank ended; the first failure ends all the others."""
        if outcome.failure is not None:
            self.failed(outcome.failure)
        self._outcomes.setdefault(rank, outcome)
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
                failure = Failure(rank, self._slots[rank].host, summary, after_peer_loss=False)
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
        note = (
            f" ({_ranks_in_words(left)} no longer there: main had returned. All ranks must take "
            "part in the same collective operations)"
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

    def begin(self, coordinator: Coordinator, slots: Sequence[Slot]) -> None:
        """Let the peers in.

        Parameters
        ----------
        coordinator
            Takes what they report.
        slots
            All slots of the run.
        """
        self._coordinator = coordinator
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
        while (frame := await connection.receive()) is not None:
            _pass_on(frame, coordinator)
        coordinator.lost(ranks, "contact with its task was lost; the executor may have died")
        self._left.add(partition)
        self._note_presence()

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
    elif frame.kind == "ended":
        events.ended(rank, Outcome.from_frame(frame.header["outcome"], frame.body))


def _ranks_in_words(ranks: set[int]) -> str:
    if len(ranks) == 1:
        return f"rank {min(ranks)} is"
    names = [str(rank) for rank in sorted(ranks)]
    if len(names) > 8:
        return f"{len(names)} ranks are"
    return f"ranks {', '.join(names[:-1])} and {names[-1]} are"


def _own_line(text: str) -> bytes:
    return f"HorovodRunner: {text}\n".encode()
