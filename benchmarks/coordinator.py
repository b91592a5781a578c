"""Partition 0's side alone, beside more and more tasks that join, report and leave.

The peer server, the ends of the flows and the assignment of slots are the real ones, on a loopback
socket with the handshake. The other tasks are coroutines of one other process, each with the real
link to partition 0; there are no worker processes. Both processes share this machine's cores, so
the seconds hold the clients' work, too: the processor time of both is told.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import secrets
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
from horovod.runner.http.http_server import RendezvousServer

from benchmarks.report import Case, Figures
from horovodrunner.flows.checkpoints.task.latest import LatestDecision
from horovodrunner.flows.logs.task import MergedLog
from horovodrunner.flows.outcome.outcome import Outcome, Success
from horovodrunner.flows.outcome.task import RunOutcome
from horovodrunner.flows.telemetry.phases import Spans
from horovodrunner.flows.telemetry.task import Telemetry
from horovodrunner.placement.rendezvous import Rendezvous
from horovodrunner.placement.topology import Member, assign_slots
from horovodrunner.processes.task.peers import PeerLink, PeerServer
from horovodrunner.wire.events import Beat, Ended, Event, Lines, Note, Started, dispatcher

SIZES = (32, 128, 512, 1024)
RANKS_ON_A_HOST = 8
LINES = 5
BEATS = 3
READS = 4
AT_ONCE = 128
END_SECONDS = 120.0


def members(size: int) -> list[Member]:
    """Return what so many tasks of a cluster would tell each other, eight on each host.

    Parameters
    ----------
    size
        How many.

    Returns
    -------
    list of Member
        By partition.
    """
    return [
        Member(
            partition=partition,
            host_id=f"{partition % (size // RANKS_ON_A_HOST):032x}",
            host=f"host-{partition % (size // RANKS_ON_A_HOST)}",
            address="127.0.0.1",
            interface="lo",
            gpus=(str(partition // (size // RANKS_ON_A_HOST)),),
        )
        for partition in range(size)
    ]


@dataclass
class _Times:
    joined: float = 0.0
    started: float = 0.0
    ended: float = 0.0


async def _coordinate(size: int, token: bytes) -> dict[str, float]:
    lines: list[bytes] = []
    times = _Times()
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listening.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.coordinator", str(port), str(size)]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(token.hex().encode() + b"\n")
    await process.stdout.readline()  # it has imported everything
    before = _cpu_seconds()
    slots = assign_slots(members(size))

    def take(event: Event) -> None:
        if isinstance(event, Note) and event.text.endswith("running main"):
            times.started = time.monotonic()

    log = MergedLog(lines.append, take)
    outcome = RunOutcome(slots)
    telemetry = Telemetry(slots, log, outcome, Spans())
    flows = [log.handlers, outcome.handlers, telemetry.handlers]
    emit = dispatcher(flows, otherwise=take)
    latest = LatestDecision(None, members(size), lambda text: None)
    server = PeerServer(
        token,
        listening,
        slots,
        emit,
        outcome=outcome,
        latest=latest,
        on_lost=lambda ranks: None,
        log=lines.append,
    )
    await server.start()
    joining = asyncio.create_task(server.watch_joining())
    began = time.monotonic()
    process.stdin.write(b"go\n")
    emit(Started(0))
    emit(Ended(0, Outcome(success=Success(0)).to_bytes()))
    await joining
    times.joined = time.monotonic()
    await outcome.wait_for_end(END_SECONDS)
    times.ended = time.monotonic()
    await server.wait_for_leaving(END_SECONDS)
    left = time.monotonic()
    spent = _cpu_seconds() - before
    client = json.loads(await process.stdout.readline())
    await process.wait()
    await server.close()
    assert outcome.summary({}) is None, outcome.summary({})
    assert b"".join(lines).count(b"\n") == (size - 1) * LINES
    return {
        "all joined": times.joined - began,
        "all started": times.started - began,
        "all ended": times.ended - began,
        "total": left - began,
        "CPU of partition 0": spent,
        "CPU of the other tasks": float(client),
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# ---- the other process


async def _agent(port: int, token: bytes, partition: int, rank: int) -> None:
    link = await PeerLink.open("127.0.0.1", port, token, partition)
    listening = asyncio.create_task(link.listen({}))
    link.emit(Started(rank))
    for number in range(LINES):
        link.emit(Lines(rank, "stdout", f"line {number} of a rank that trains\n".encode()))
    for _ in range(BEATS):
        link.emit(Beat(rank, "train.py:42 in main", "allreduce", seconds=0.5))
        await asyncio.sleep(0)
    link.emit(Ended(rank, Outcome(success=Success(rank)).to_bytes()))
    await link.close()
    listening.cancel()


async def _be_agents(port: int, size: int, token: bytes) -> None:
    slots = assign_slots(members(size))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    before = _cpu_seconds()
    agents = [_agent(port, token, slot.partition, slot.rank) for slot in slots if slot.rank]
    await asyncio.gather(*agents)
    print(_cpu_seconds() - before, flush=True)


# ---- Horovod's rendezvous


def rendezvous(size: int) -> dict[str, float]:
    """Let so many clients send requests as Gloo's workers do: one stores a value and reads others.

    A worker of Gloo reads the value of every other one, so that a run makes the square of its
    size in requests; here each reads a few, and what counts is the requests a second. Horovod's own
    server lets five connections wait and resets or delays further ones, so four come at once there.
    Ours drops peers that connect and send nothing, as one process with 1,024 clients would.

    Parameters
    ----------
    size
        How many clients there are at once.

    Returns
    -------
    dict of float
        Requests a second of our server and of Horovod's own.
    """
    plan = assign_slots(members(size))
    ours = Rendezvous("127.0.0.1")
    ours.set_plan(plan)
    horovods = RendezvousServer(0)
    port = horovods.start()
    horovods.init(get_host_assignments([HostInfo("localhost", size)], size))
    try:
        return {
            "ours": _requests(ours.port, size, at_once=AT_ONCE),
            "Horovod's own": _requests(port, size, at_once=4),
        }
    finally:
        ours.close()
        horovods.stop()


def _requests(port: int, size: int, at_once: int) -> float:
    numbers = [str(number) for number in (port, size, at_once)]
    command = [sys.executable, "-m", "benchmarks.coordinator", "gloo", *numbers]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return size * (1 + READS) / float(done.stdout)


async def _be_gloo(port: int, size: int, at_once: int) -> float:
    room = asyncio.Semaphore(at_once)

    async def request(text: bytes) -> bytes:
        async with room:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(text)
            answer = await reader.read()
            writer.close()
            return answer

    async def client(rank: int) -> None:
        value = os.urandom(150)
        head = f"PUT /global/{rank} HTTP/1.0\r\nContent-Length: {len(value)}\r\n\r\n".encode()
        assert b" 200 " in await request(head + value)
        for _ in range(READS):
            answer = await request(f"GET /global/{rank} HTTP/1.0\r\n\r\n".encode())
            assert answer.endswith(value), answer

    began = time.perf_counter()
    await asyncio.gather(*(client(rank) for rank in range(size)))
    return time.perf_counter() - began


# ---- the table


def _timed(function: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def _allow_descriptors() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def measure(rounds: int, sizes: Sequence[int] = SIZES) -> Case:
    """Measure all sizes in turn.

    Parameters
    ----------
    rounds
        How often each is measured.
    sizes
        Numbers of tasks.

    Returns
    -------
    Case
        The table.
    """
    _allow_descriptors()
    values: dict[str, list[float]] = {}
    speeds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for size in sizes:
            found = asyncio.run(_coordinate(size, secrets.token_bytes(32)))
            found["assign_slots"] = _timed(assign_slots, members(size))
            for name, seconds in found.items():
                values.setdefault(f"{size}: {name}", []).append(seconds)
            for name, speed in rendezvous(size).items():
                speeds.setdefault(f"{size}: rendezvous, {name}", []).append(speed)
    lines = [
        Figures(name, unit, figures[name], beside)
        for figures, unit in ((values, "s"), (speeds, "requests/s"))
        for name in sorted(figures, key=_number)
        for beside in [
            f"{_number(name)}: rendezvous, Horovod's own" if name.endswith("ours") else ""
        ]
    ]
    facts = [
        f"total at {size} tasks: {1e3 * statistics.median(values[f'{size}: total']) / size:.2f} ms "
        "a task"
        for size in sizes
    ]
    return Case("coordinator", "partition 0 and tasks that join, report and leave", lines, facts)


def _number(name: str) -> int:
    return int(name.partition(":")[0])


if __name__ == "__main__":
    _allow_descriptors()
    if sys.argv[1] == "gloo":
        print(asyncio.run(_be_gloo(*map(int, sys.argv[2:]))))
    else:
        secret = bytes.fromhex(sys.stdin.readline())
        asyncio.run(_be_agents(int(sys.argv[1]), int(sys.argv[2]), secret))
