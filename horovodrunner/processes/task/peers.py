"""Partition 0 and the other tasks, which connect to it. Runs in: the task."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence

from horovodrunner.flows.checkpoints.task.latest import LatestDecision
from horovodrunner.flows.logs.task import LineSender, own_line
from horovodrunner.flows.outcome.outcome import FailureKind
from horovodrunner.flows.outcome.task import RunOutcome
from horovodrunner.formatting import ranks_in_words
from horovodrunner.placement.topology import Slot
from horovodrunner.processes.task.network import REACH_EACH_OTHER
from horovodrunner.wire.events import (
    Event,
    Handlers,
    Join,
    LatestDecided,
    LatestFetched,
    LatestWanted,
    Sink,
    Stop,
    Storing,
    dispatcher,
    refuse,
)
from horovodrunner.wire.server import EventServer
from horovodrunner.wire.stream import Connection, connect

__all__ = ["PeerLink", "PeerServer"]

CONNECT_SECONDS = 15.0
"""Less than partition 0 waits, so that this task's log has the reason."""

STORING_SECONDS = 10.0
"""How long a peer's word that files are on their way holds good."""

JOIN_SECONDS = 20.0
"""How long partition 0 waits for its peers' tasks to connect after the gather step."""

_logger = logging.getLogger(__name__)


def contact_lost(ranks: Sequence[int]) -> str:
    """Say that a task was lost, and with it all its ranks.

    >>> contact_lost([2, 3])
    'contact with the task of ranks 2 and 3 was lost'
    """
    whose = "its task" if len(ranks) == 1 else f"the task of {ranks_in_words(ranks)}"
    return f"contact with {whose} was lost"


class PeerServer:
    """Partition 0's end: hands on the events of the other tasks' ranks.

    Peers may connect to `listening` before this exists, because its port is part of what is
    gathered; the kernel lets them wait.
    """

    def __init__(
        self,
        token: bytes,
        listening: socket.socket,
        slots: Sequence[Slot],
        emit: Sink,
        *,
        outcome: RunOutcome,
        latest: LatestDecision,
        on_lost: Callable[[Sequence[int]], None],
        log: Callable[[bytes], None],
    ) -> None:
        self._listening = listening
        self._slots = slots
        self._emit = emit
        self._outcome = outcome
        self._latest = latest
        self._on_lost = on_lost
        self._ranks: dict[int, list[int]] = {}
        for slot in slots:
            self._ranks.setdefault(slot.partition, []).append(slot.rank)
        self._not_joined = set(self._ranks) - {0}
        self._not_left = set(self._not_joined)
        self._connections: set[Connection] = set()
        self._storing_until = 0.0
        self._all_joined = asyncio.Event()
        self._all_left = asyncio.Event()
        self._note_presence()
        self._server = EventServer(
            token, self._serve, lambda why: log(own_line(why)), peers=len(slots)
        )

    async def start(self) -> None:
        """Let the peers in."""
        await self._server.start("", self._listening)

    async def watch_joining(self) -> None:
        """Report the tasks that have not connected within `JOIN_SECONDS`."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_joined.wait(), JOIN_SECONDS)
        own = self._slots[0]
        for slot in self._slots:
            if slot.partition in self._not_joined:
                self._outcome.lost(
                    [slot.rank],
                    f"{slot.host} ({slot.address}) did not reach rank 0's task on {own.host} "
                    f"({own.address}:{self._listening.getsockname()[1]}) within {JOIN_SECONDS:g} s;"
                    f" {REACH_EACH_OTHER}",
                    kind=FailureKind.SETUP,
                )
        self._not_left -= self._not_joined  # nobody needs to wait for them to leave
        self._note_presence()

    async def wait_for_joining(self) -> None:
        """Wait until all peers have connected, however long it takes."""
        await self._all_joined.wait()

    async def wait_for_leaving(self, timeout: float) -> None:
        """Wait until every peer has sent all it had and left, while files are on their way."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not self._all_left.is_set():
            left = max(deadline, self._storing_until) - loop.time()
            if left <= 0:
                return
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._all_left.wait(), left)

    def storing(self, event: Storing) -> None:
        """Note that files of a peer's ranks are on their way."""
        self._storing_until = asyncio.get_running_loop().time() + STORING_SECONDS

    def broadcast(self, event: Event) -> None:
        """Send an event to all peers."""
        for connection in self._connections:
            connection.send(event)

    async def close(self) -> None:
        """Stop listening and disconnect the peers."""
        await self._server.close()

    async def _serve(self, connection: Connection) -> None:
        first = await connection.receive()
        if not isinstance(first, Join):
            return
        partition, ranks = first.partition, self._ranks[first.partition]
        _logger.debug("partition %d has joined, with ranks %s", partition, ranks)
        answers: set[asyncio.Task[None]] = set()
        emit = dispatcher(
            [
                {
                    LatestWanted: lambda it: answers.add(
                        asyncio.create_task(self._answer(connection, partition, it))
                    ),
                    LatestFetched: lambda it: self._latest.fetched(
                        partition, it.part, it.directory
                    ),
                }
            ],
            otherwise=self._emit,
        )
        self._not_joined.discard(partition)
        self._connections.add(connection)
        self._note_presence()
        if self._outcome.stopping.is_set():
            connection.send(Stop())
        try:
            while (event := await connection.receive()) is not None:
                emit(event)
        finally:
            for answer in answers:
                answer.cancel()
            self._connections.discard(connection)
            self._latest.lost(partition)
            self._on_lost(ranks)
            self._outcome.lost(ranks, f"{contact_lost(ranks)}; the executor may have died")
            self._not_left.discard(partition)
            self._note_presence()

    async def _answer(self, connection: Connection, partition: int, wanted: LatestWanted) -> None:
        connection.send(await self._latest.answer(partition, wanted))

    def _note_presence(self) -> None:
        if not self._not_joined:
            self._all_joined.set()
        if not self._not_left:
            self._all_left.set()


class PeerLink:
    """Another task's end: events to partition 0 and from it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sender = LineSender(connection)
        self._answers: dict[tuple[int, int], asyncio.Future[LatestDecided]] = {}
        self.emit: Sink = self._sender.send
        self.close = self._sender.close

    @classmethod
    async def open(cls, host: str, port: int, token: bytes, partition: int) -> PeerLink:
        """Connect to partition 0."""
        connection = await connect(host, port, token, CONNECT_SECONDS)
        connection.send(Join(partition))
        _logger.debug("connected to partition 0 at %s:%d", host, port)
        return cls(connection)

    async def listen(self, flows: Sequence[Handlers]) -> None:
        """Take what partition 0 sends until the connection ends."""
        take = dispatcher([*flows, {LatestDecided: self._take_answer}], refuse)
        while (event := await self._connection.receive()) is not None:
            take(event)

    async def ask_latest(self, wanted: LatestWanted) -> LatestDecided:
        """Ask which checkpoint all ranks start from, and for a part of it."""
        answer: asyncio.Future[LatestDecided] = asyncio.get_running_loop().create_future()
        self._answers[wanted.rank, wanted.part] = answer
        self._connection.send(wanted)
        return await answer

    def fetched(self, part: int, directory: str) -> None:
        """Report where this task has its copy of a part of it; "" if it has none."""
        self._connection.send(LatestFetched(part, directory))

    def _take_answer(self, event: LatestDecided) -> None:
        self._answers.pop((event.rank, event.asked)).set_result(event)
