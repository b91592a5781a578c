"""Hosts try their links; partition 0 decides whether the run may begin. Runs in: the task.

::

    every task ── what it found of its links ──▶ partition 0, which judges them
               ◀─ measure ────────────────────── and lets the workers try their backend
               ── what each rank measured ─────▶
               ◀─ proceed ────────────────────── the workers call main
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Sequence

from horovodrunner.flows.preflight.judging import (
    Link,
    format_table,
    problems_of_links,
    problems_of_ranks,
)
from horovodrunner.placement.topology import Member, Slot
from horovodrunner.wire.events import (
    Handlers,
    LinksProbed,
    Measure,
    Measured,
    Probe,
    Proceed,
    Sink,
)
from horovodrunner.wire.server import EventServer
from horovodrunner.wire.stream import Connection, connect

__all__ = ["PreflightCheck", "Prober"]

CONNECT_SECONDS = 5.0
EXCHANGE_SECONDS = 20.0
"""A host that takes longer to answer is cut off."""

LINKS_SECONDS = 120.0
"""How long all hosts may take to try their links."""

MEASURE_SECONDS = 90.0
"""How long the ranks may take to try their backend; more than a worker gives itself."""

_BLOCKS = (256 * 1024, 1024 * 1024, 4 * 1024 * 1024, 4 * 1024 * 1024)
"""Bytes that are sent one after the other, until one took long enough to tell the rate."""

_LONG_ENOUGH = 0.05
_TRIES = 3
"""The best counts: a host that is busy for a moment is not slow."""

_ROUND_TRIPS = 12
_ROUND_TRIPS_SECONDS = 0.5
_BACKLOG = 1024


class Prober:
    """Answers the other hosts' probes and sends its own, for the first task of each host."""

    def __init__(self, token: bytes, log: Callable[[str], None]) -> None:
        self._token = token
        self._server = EventServer(token, self._answer, log)

    async def open(self, listening: socket.socket) -> None:
        """Answer at a socket that listens already."""
        await self._server.start("", listening)

    async def close(self) -> None:
        """Stop to answer."""
        await self._server.close()

    async def probe(self, own: Member, members: Sequence[Member]) -> LinksProbed:
        """Try the way to each other host; a task that is not its host's first has nothing to do.

        Every host connects to every other one. Of two, one measures both directions in turn: the
        queue of a slow one would hold up the other's answers.
        """
        first: dict[str, Member] = {}
        for member in members:
            first.setdefault(member.host_id, member)
        if first[own.host_id].partition != own.partition:
            return LinksProbed(own.partition, ())
        others = [each for each in first.values() if each.host_id != own.host_id]
        at = sum(each.partition < own.partition for each in others)
        others = others[at:] + others[:at]  # not all at the same one
        tried = await asyncio.gather(*map(self._connect, others))
        links = []
        for member, connection in zip(others, tried, strict=True):
            there, back = (own.partition, member.partition), (member.partition, own.partition)
            if isinstance(connection, str):
                links.append((*there, 0.0, 0.0, connection))
            elif own.partition > member.partition:
                await connection.close()  # the other one measures
            else:
                trip, rates, error = await self._measure(connection)
                ways = [there] if error else [there, back]
                links += [(*way, trip, rate, error) for way, rate in zip(ways, rates, strict=False)]
        return LinksProbed(own.partition, tuple(links))

    async def _connect(self, member: Member) -> Connection | str:
        port = member.preflight_ports[0]
        try:
            return await connect(member.address, port, self._token, CONNECT_SECONDS)
        except OSError as error:
            return f"{member.address}:{port} cannot be reached: {error}"

    async def _measure(self, connection: Connection) -> tuple[float, tuple[float, float], str]:
        try:
            return (*await asyncio.wait_for(_measured(connection), EXCHANGE_SECONDS), "")
        except (OSError, ValueError, asyncio.TimeoutError) as error:
            why = str(error) or f"no answer within {EXCHANGE_SECONDS:g} s"
            return 0.0, (0.0, 0.0), f"{connection.peer}: {why}"
        finally:
            await connection.close()

    async def _answer(self, connection: Connection) -> None:
        while isinstance(probe := await connection.receive(), Probe):
            connection.send(Probe(bytes(min(probe.wanted, _BLOCKS[-1]))))


async def _measured(connection: Connection) -> tuple[float, tuple[float, float]]:
    """Return seconds there and back, and bytes per second there, and back."""
    await _exchange(connection, Probe())  # the first meets what is not ready yet
    end_by = time.perf_counter() + _ROUND_TRIPS_SECONDS
    round_trip = await _exchange(connection, Probe())
    for _ in range(_ROUND_TRIPS):
        if time.perf_counter() >= end_by:
            break
        round_trip = min(round_trip, await _exchange(connection, Probe()))
    there = await _rate(connection, round_trip, lambda size: Probe(bytes(size)))
    back = await _rate(connection, round_trip, lambda size: Probe(wanted=size))
    return round_trip, (there, back)


async def _rate(connection: Connection, round_trip: float, probe: Callable[[int], Probe]) -> float:
    rate = 0.0
    for size in _BLOCKS:
        seconds = min([await _exchange(connection, probe(size)) for _ in range(_TRIES)])
        rate = max(rate, size / max(seconds - round_trip, 1e-6))
        if seconds >= _LONG_ENOUGH:
            break
    return rate


async def _exchange(connection: Connection, probe: Probe) -> float:
    began = time.perf_counter()
    connection.send(probe)
    if await connection.receive() is None:
        raise ConnectionResetError("the connection broke")
    return time.perf_counter() - began


class PreflightCheck:
    """Collects on partition 0 what all found, and lets the run begin, or refuses it."""

    def __init__(
        self,
        members: Sequence[Member],
        slots: Sequence[Slot],
        *,
        may_refuse: bool,
        note: Callable[[str], None],
        refuse: Callable[[str], None],
    ) -> None:
        self._hosts = {each.partition: f"{each.host} ({each.address})" for each in members}
        self._slots = slots
        self._may_refuse = may_refuse
        self._note = note
        self._refuse = refuse
        self._links: list[Link] = []
        self._probed: set[int] = set()
        self._measured: dict[int, Measured] = {}
        self._changed = asyncio.Event()
        self.handlers: Handlers = {
            LinksProbed: self._take_links,
            Measured: self._take_measured,
        }

    async def run(self, tell: Sink) -> None:
        """Let all that can be tried be tried, and say what came of it; `tell` reaches workers."""
        await self._wait(lambda: self._probed >= self._hosts.keys(), LINKS_SECONDS)
        problems = [
            f"{host} did not try its links in time"
            for partition, host in self._hosts.items()
            if partition not in self._probed
        ]
        problems += problems_of_links(self._links)
        if problems and self._may_refuse:
            self._refuse_for(problems)
            return
        tell(Measure())
        await self._wait(lambda: len(self._measured) == len(self._slots), MEASURE_SECONDS)
        problems += problems_of_ranks(self._measured, self._slots)
        if problems and self._may_refuse:
            self._refuse_for(problems)
            return
        self._note(f"preflight: {'; '.join(problems) or 'all is well'}\n{self._table()}")
        tell(Proceed())

    def _table(self) -> str:
        return format_table(self._links, self._measured, self._slots)

    def _refuse_for(self, problems: Sequence[str]) -> None:
        text = "; ".join(problems)
        self._note(f"preflight: {text}\n{self._table()}")
        self._refuse(
            f"preflight: {text}. Nothing was run: leave that host out, mend it, or give "
            'preflight="warn" to run all the same'
        )

    async def _wait(self, ready: Callable[[], bool], timeout: float) -> None:
        async def wait() -> None:
            while not ready():
                self._changed.clear()
                await self._changed.wait()

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(wait(), timeout)

    def _take_links(self, event: LinksProbed) -> None:
        for source, target, round_trip, rate, error in event.links:
            link = Link(self._hosts[source], self._hosts[target], round_trip, rate, error)
            self._links.append(link)
        self._probed.add(event.partition)
        self._changed.set()

    def _take_measured(self, event: Measured) -> None:
        self._measured[event.rank] = event
        self._changed.set()
