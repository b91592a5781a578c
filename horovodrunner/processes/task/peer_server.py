"""Where the other tasks connect to partition 0. Runs in: the task."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence

from horovodrunner.flows.checkpoints.task import LatestDecision
from horovodrunner.placement.topology import Slot
from horovodrunner.processes.task.coordinator import Coordinator, RankEvents
from horovodrunner.processes.task.network import REACH_EACH_OTHER, on_free_port
from horovodrunner.wire.connection import Connection, FrameServer
from horovodrunner.wire.frames import Frame
from horovodrunner.wire.job import FailureKind, Outcome

__all__ = ["Hub"]

JOIN_SECONDS = 20.0
"""How long partition 0 waits for its peers' tasks to connect after the gather step."""


class Hub:
    """Listens for the other tasks.

    It opens before the gather step, because its port is part of what is gathered.

    Parameters
    ----------
    token
        The run's secret.
    log
        Takes lines about refused connections.
    size
        How many tasks may come, all of them right after the gather step.
    """

    def __init__(self, token: bytes, log: Callable[[bytes], None], size: int) -> None:
        self._server = FrameServer(
            token, self._serve, lambda why: log(f"HorovodRunner: {why}\n".encode()), peers=size
        )
        self._coordinator: Coordinator | None = None
        self._latest: LatestDecision | None = None
        self._port = 0
        self._slots: Sequence[Slot] = ()
        self._ranks: dict[int, list[int]] = {}
        self._peers: set[int] = set()
        self._ready = asyncio.Event()
        self._joined: set[int] = set()
        self._left: set[int] = set()
        self._all_joined = asyncio.Event()
        self._all_left = asyncio.Event()

    async def open(self, host: str, ports: tuple[int, int] | None) -> int:
        """Start to listen.

        Parameters
        ----------
        host
            Address to bind.
        ports
            First and last port to choose from, or None for any.

        Returns
        -------
        int
            The port.
        """
        bound = on_free_port(ports, lambda port: socket.create_server((host, port)))
        self._port = await self._server.start(host, bound)
        return self._port

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
        for slot in slots:
            self._ranks.setdefault(slot.partition, []).append(slot.rank)
        self._peers = set(self._ranks) - {0}
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
                        f"{slot.host} ({slot.address}) did not reach rank 0's task on "
                        f"{self._slots[0].host} ({self._slots[0].address}:{self._port}) within "
                        f"{JOIN_SECONDS:g} s; {REACH_EACH_OTHER}",
                        kind=FailureKind.SETUP,
                    )
            self._left |= self._peers - self._joined  # nobody needs to wait for them to leave
            self._note_presence()

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
        lost = self._ranks.get(partition, [])
        coordinator.lost(lost, "contact with its task was lost; the executor may have died")
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

    def _note_presence(self) -> None:
        # Each comes and leaves once: comparing the sets every time would take the square of it.
        if len(self._joined) >= len(self._peers) and self._joined >= self._peers:
            self._all_joined.set()
        if len(self._left) >= len(self._peers) and self._left >= self._peers:
            self._all_left.set()


def _pass_on(frame: Frame, events: RankEvents) -> None:
    rank = int(frame.header.get("rank", -1))
    if frame.kind == "lines":
        events.lines(rank, str(frame.header["stream"]), bytes(frame.body))
    elif frame.kind == "message":
        events.message(rank, bytes(frame.body))
    elif frame.kind == "notice":
        events.notice(rank, str(frame.header["key"]), bytes(frame.body))
    elif frame.kind == "started":
        events.started(rank)
    elif frame.kind == "state":
        events.state(rank, frame.header)
    elif frame.kind == "times":
        events.times(rank, frame.header["spans"])
    elif frame.kind == "stack":
        events.stack(rank, bytes(frame.body).decode(errors="replace"))
    elif frame.kind == "ended":
        events.ended(rank, Outcome.from_frame(frame.header["outcome"], frame.body))
