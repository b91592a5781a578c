"""Partition 0's side alone, beside more and more tasks that join, report and leave.

The hub, the coordinator and the assignment of slots are the real ones, on a loopback socket with
the handshake. The other tasks are coroutines of one other process, each with the real link to
partition 0; there are no worker processes. Both processes share this machine's cores, so the
seconds hold the clients' work, too: the processor time of both is told.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import secrets
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import Case, Figures
from horovodrunner.core.job import Outcome, Success
from horovodrunner.core.topology import Member
from horovodrunner.task.channel import HubLink, SilentDriver
from horovodrunner.task.checkpoints import LatestDecision
from horovodrunner.task.coordinator import Coordinator
from horovodrunner.task.horovodrun import Rendezvous, assign_slots
from horovodrunner.task.hub import Hub

SIZES = (32, 128, 512, 1024)
RANKS_ON_A_HOST = 8
LINES = 5
BEATS = 3
END_SECONDS = 120.0


def members(size: int) -> list[Member]:
    """Give what so many tasks of a cluster would tell each other, eight on each host.

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


class _Driver(SilentDriver):
    """Notes when all ranks run main."""

    def __init__(self, times: _Times) -> None:
        super().__init__(lambda lines: None)
        self._times = times

    def note(self, text: str) -> None:
        if text.endswith("running main"):
            self._times.started = time.monotonic()


async def _coordinate(size: int, token: bytes) -> dict[str, float]:
    lines: list[bytes] = []
    times = _Times()
    hub = Hub(token, lines.append)
    port = await hub.open("127.0.0.1", None)
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
    coordinator = Coordinator(slots, _Driver(times), lines.append)
    hub.begin(coordinator, slots, LatestDecision(None, members(size), lambda text: None))
    joining = asyncio.create_task(hub.watch_joining())
    began = time.monotonic()
    process.stdin.write(b"go\n")
    coordinator.started(0)
    coordinator.ended(0, Outcome(success=Success(0)))
    await joining
    times.joined = time.monotonic()
    await coordinator.wait_for_end(END_SECONDS)
    times.ended = time.monotonic()
    await hub.wait_for_leaving(END_SECONDS)
    left = time.monotonic()
    spent = _cpu_seconds() - before
    client = json.loads(await process.stdout.readline())
    await process.wait()
    await hub.close()
    assert coordinator.verdict() is None, coordinator.verdict()
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
    link = await HubLink.open("127.0.0.1", port, token, partition)
    listening = asyncio.create_task(link.listen(lambda: None))
    link.started(rank)
    for number in range(LINES):
        link.lines(rank, "stdout", f"line {number} of a rank that trains\n".encode())
    state = {"where": "train.py:42 in main", "waits_in": "allreduce", "surely": True}
    for _ in range(BEATS):
        link.state(rank, {**state, "seconds": 0.5})
        await asyncio.sleep(0)
    link.ended(rank, Outcome(success=Success(rank)))
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


def rendezvous_seconds(size: int) -> float:
    """Measure the requests of Gloo's workers, in as many threads as there may be at once.

    Each worker stores its address for every other one in Horovod's scopes and reads theirs; with
    one store a pair that would be the square of the number of workers. What counts here is the
    cost of a worker that stores one value and reads one.
    """
    slots = assign_slots(members(size))
    rendezvous = Rendezvous("127.0.0.1")
    rendezvous.set_plan(slots)
    base = f"http://127.0.0.1:{rendezvous.port}/global"
    command = [sys.executable, "-m", "benchmarks.coordinator", base, str(size)]
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        rendezvous.close()
    return float(done.stdout)


def _be_gloo(base: str, size: int) -> float:
    failures: list[Exception] = []

    def client(rank: int) -> None:
        try:
            url = f"{base}/{rank}"
            put = urllib.request.Request(url, data=os.urandom(150), method="PUT")
            with urllib.request.urlopen(put) as answer:
                answer.read()
            with urllib.request.urlopen(url) as answer:
                assert len(answer.read()) == 150
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(rank,)) for rank in range(size)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]
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
    for _ in range(rounds):
        for size in sizes:
            found = asyncio.run(_coordinate(size, secrets.token_bytes(32)))
            found["assign_slots"] = _timed(assign_slots, members(size))
            found["rendezvous"] = rendezvous_seconds(size)
            for name, seconds in found.items():
                values.setdefault(f"{size}: {name}", []).append(seconds)
    lines = [Figures(name, "s", values[name]) for name in sorted(values, key=_number)]
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
    if sys.argv[1].startswith("http"):
        print(_be_gloo(sys.argv[1], int(sys.argv[2])))
    else:
        secret = bytes.fromhex(sys.stdin.readline())
        asyncio.run(_be_agents(int(sys.argv[1]), int(sys.argv[2]), secret))
