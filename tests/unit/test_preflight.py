"""What is wrong with hosts, links and GPUs, and who is let on to main."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from horovodrunner.flows.preflight import task, worker
from horovodrunner.flows.preflight.judging import (
    Link,
    format_table,
    problems_of_links,
    problems_of_ranks,
)
from horovodrunner.flows.preflight.task import PreflightCheck, Prober
from horovodrunner.placement.topology import Member, Slot, assign_slots
from horovodrunner.wire.events import Event, Job, LinksProbed, Measure, Measured, Probe, Proceed
from horovodrunner.wire.stream import Connection

TOKEN = b"t" * 32
FAST, SLOW = 1e9, 5e7


def links(hosts: str, slow: Iterable[str] = (), **rates: float) -> list[Link]:
    """Make both directions of all pairs of hosts; `slow` are pairs such as ``"ab"``."""
    return [
        Link(one, other, 1e-4, SLOW if one + other in slow else rates.get(one + other, FAST))
        for one, other in itertools.permutations(hosts, 2)
    ]


def members(count: int, ports: Iterable[int] = ()) -> list[Member]:
    found = [*ports] or [0] * count
    return [
        Member(i, f"id-{i}", "abcd"[i], "127.0.0.1", "lo", preflight_ports=(found[i], 0, 0))
        for i in range(count)
    ]


def slots(count: int) -> list[Slot]:
    return assign_slots(members(count))


@pytest.mark.parametrize("hosts", ["", "a", "ab", "abc", "abcdefgh"])
def test_links_that_are_alike_are_well(hosts: str) -> None:
    assert problems_of_links(links(hosts)) == []
    assert problems_of_links([Link(it.source, it.target, 0.3, 10.0) for it in links(hosts)]) == []


def test_a_link_is_named_with_both_hosts_and_the_rates() -> None:
    (text,) = problems_of_links(links("abcd", slow=["bd"]))
    assert text == (
        "the link from b to d carries 47.7 MiB/s, where 953.7 MiB/s are usual in this run"
    )
    (text,) = problems_of_links(links("ab", slow=["ba"]))  # one direction of the only pair
    assert text.startswith("the link from b to a carries")


@pytest.mark.parametrize("hosts", ["abc", "abcd", "abcdefgh"])
def test_a_host_that_all_slow_links_have_in_common_is_named_first(hosts: str) -> None:
    slow = [pair for one in hosts[:-1] for pair in (one + hosts[-1], hosts[-1] + one)]
    first, *others = problems_of_links(links(hosts, slow))
    assert first.startswith(f"{hosts[-1]} is on all {len(slow)} of them: the link from ")
    assert len(others) <= 4


def test_nine_times_slower_is_not_ten() -> None:
    for hosts in ("abcd", "ab"):
        assert problems_of_links(links(hosts, ab=FAST / 9)) == []
        assert len(problems_of_links(links(hosts, ab=FAST / 10))) == 1


def test_a_long_way_is_named_and_microseconds_are_not() -> None:
    near = links("abcd")
    far = Link("a", "b", 0.05, FAST)
    (text,) = problems_of_links([far, *near[1:]])
    assert (
        text == "the link from a to b takes 50.0 ms there and back, where 0.1 ms are usual in "
        "this run"
    )
    assert problems_of_links([Link("a", "b", 0.004, FAST), *near[1:]]) == []


def test_a_host_that_is_busy_for_a_moment_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of several tries counts, of each size."""
    tries: dict[int, int] = {}

    async def exchange(_: Connection, probe: Probe) -> float:
        size = len(probe.data) + probe.wanted
        tries[size] = tries.get(size, 0) + 1
        is_busy = tries[size] % 3 != 0
        return 0.5 if is_busy else 1e-4 + size / (FAST if probe.data else SLOW)

    monkeypatch.setattr(task, "_exchange", exchange)
    round_trip, rates = asyncio.run(task._measured(cast("Connection", None)))
    assert round_trip == pytest.approx(1e-4)
    assert rates == pytest.approx((FAST, SLOW))


def test_a_link_that_is_cut_is_all_that_is_told() -> None:
    found = [*links("abc", slow=["ab"]), Link("c", "a", error="10.0.0.1:5 cannot be reached: x")]
    assert problems_of_links(found) == [
        "the link from c to a is cut: 10.0.0.1:5 cannot be reached: x"
    ]


def test_ranks_that_are_silent_or_lack_gpus_are_named_with_their_host() -> None:
    measured = {0: Measured(0), 2: Measured(2, problem="it owns 2 GPUs (x), and 1 work")}
    assert problems_of_ranks(measured, slots(3)) == [
        "rank 1 on b did not answer in time",
        "rank 2 on c: it owns 2 GPUs (x), and 1 work",
    ]


def test_the_table_has_hosts_links_and_reductions() -> None:
    found = {
        rank: Measured(rank, "Horovod", (0.001, 0.032 * (rank + 1)), ("H100", "H100"))
        for rank in range(2)
    }
    assert format_table(links("ab", slow=["ba"]), found, slots(2)).splitlines() == [
        "  a (127.0.0.1)                1 rank, 2 x H100",
        "  b (127.0.0.1)                1 rank, 2 x H100",
        "  2 links between 2 hosts",
        "    slowest: 47.7 MiB/s, b to a",
        "    longest way there and back: 0.10 ms, a to b",
        "  allreduce of 2 ranks by Horovod",
        "    4 bytes: 1.00 ms",
        "    32.0 MiB: 64 ms, 500.0 MiB/s",
    ]


class Check:
    """A check of two hosts with a rank each, and what came of it."""

    def __init__(self, *, may_refuse: bool = True) -> None:
        self.notes: list[str] = []
        self.refusals: list[str] = []
        self.told: list[Event] = []
        self.it = PreflightCheck(
            members(2),
            slots(2),
            may_refuse=may_refuse,
            note=self.notes.append,
            refuse=self.refusals.append,
        )

    def run(self, *events: Event) -> None:
        async def run() -> None:
            for event in events:
                self.it.handlers[type(event)](event)
            await self.it.run(self.told.append)

        asyncio.run(run())


WELL = (
    LinksProbed(0, ((0, 1, 1e-4, FAST, ""), (1, 0, 1e-4, FAST, ""))),
    LinksProbed(1, ()),
    Measured(0),
    Measured(1),
)


def test_when_all_is_well_main_is_called() -> None:
    check = Check()
    check.run(*WELL)
    assert check.told == [Measure(), Proceed()]
    assert check.refusals == []
    assert check.notes[0].startswith("preflight: all is well\n")


def test_a_link_that_is_cut_is_refused_before_ranks_would_wait_for_each_other() -> None:
    check = Check()
    check.run(WELL[0], LinksProbed(1, ((1, 0, 0.0, 0.0, "refused"),)))
    assert check.told == []
    assert "the link from b (127.0.0.1) to a (127.0.0.1) is cut: refused" in check.refusals[0]
    assert 'preflight="warn"' in check.refusals[0].splitlines()[0]


def test_with_warn_it_is_noted_and_main_is_called() -> None:
    check = Check(may_refuse=False)
    check.run(WELL[0], LinksProbed(1, ((1, 0, 0.0, 0.0, "refused"),)), *WELL[2:])
    assert check.told == [Measure(), Proceed()]
    assert check.refusals == []
    assert "is cut: refused" in check.notes[0]


def test_hosts_and_ranks_that_do_not_answer_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "LINKS_SECONDS", 0.01)
    monkeypatch.setattr(task, "MEASURE_SECONDS", 0.01)
    check = Check()
    check.run(WELL[0])
    assert "b (127.0.0.1) did not try its links in time" in check.refusals[0]
    check = Check()
    check.run(*WELL[:3])
    assert "rank 1 on b did not answer in time" in check.refusals[0]


@asynccontextmanager
async def probers(
    count: int, token: bytes = TOKEN
) -> AsyncIterator[tuple[list[Prober], list[Member]]]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [Prober(token, lambda why: None) for _ in range(count)]
    for prober, listening in zip(found, sockets, strict=True):
        await prober.open(listening)
    try:
        yield found, members(count, [each.getsockname()[1] for each in sockets])
    finally:
        for prober in found:
            await prober.close()


def test_hosts_measure_their_links_to_all_others() -> None:
    async def run() -> list[LinksProbed]:
        async with probers(3) as (found, hosts):
            own_second = [*hosts, Member(3, "id-2", "c", "127.0.0.1", "lo")]
            told = [
                await prober.probe(hosts[number], own_second) for number, prober in enumerate(found)
            ]
            return [*told, await found[2].probe(own_second[3], own_second)]

    *told, of_second_task = asyncio.run(run())
    assert [event.partition for event in told] == [0, 1, 2]
    links = [link for event in told for link in event.links]
    ways = [(source, target) for source, target, *_ in links]
    assert sorted(ways) == [*itertools.permutations(range(3), 2)]
    assert all(0 < trip < 5 and rate > 1e6 and not error for *_, trip, rate, error in links)
    assert of_second_task == LinksProbed(3, ())


def test_a_host_that_is_gone_or_silent_or_a_stranger_is_a_link_that_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(task, "CONNECT_SECONDS", 0.3)

    async def run() -> LinksProbed:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            with socket.create_server(("127.0.0.1", 0)) as gone:
                free = gone.getsockname()[1]
            async with probers(1, b"x" * 32) as (_, (stranger,)):
                ports = (silent.getsockname()[1], free, stranger.preflight_ports[0])
                own = Member(3, "own", "d", "127.0.0.1", "lo")
                prober = Prober(TOKEN, lambda why: None)
                return await prober.probe(own, [*members(3, ports), own])

    errors = [error for *_, error in asyncio.run(run()).links]
    assert len(errors) == 3
    assert "no answer" in errors[0]
    assert "failed" in errors[1]
    assert all("cannot be reached" in error for error in errors)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with one GPU, by an nvidia-smi that says so."""
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '0, GPU-aaaa-1, NVIDIA T4'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "torch", None)
    return script


@pytest.mark.parametrize(
    ("devices", "names", "problem"),
    [
        (None, ["NVIDIA T4"], ""),
        ("", ["NVIDIA T4"], ""),
        ("0", ["NVIDIA T4"], ""),
        (" 0 ", ["NVIDIA T4"], ""),
        ("GPU-aaaa", ["NVIDIA T4"], ""),
        ("-1", ["NVIDIA T4"], ""),  # CUDA takes it for none
        ("MIG-1234", [], ""),
        ("0,1", ["NVIDIA T4"], "it owns 2 GPUs (CUDA_VISIBLE_DEVICES=0,1), and 1 work"),
        ("3", [], "it owns 1 GPUs (CUDA_VISIBLE_DEVICES=3), and 0 work"),
    ],
)
def test_gpus_are_named_and_those_that_are_missing_counted(
    devices: str | None,
    names: list[str],
    problem: str,
    smi: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    found, text = worker._gpus()
    assert found == names
    assert text.partition(":")[0] == problem


def test_a_driver_that_does_not_answer_is_told(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.write_text("#!/bin/sh\nexit 9\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "0 work: see what nvidia-smi says there" in worker._gpus()[1]


@pytest.mark.parametrize(
    ("act", "problem"),
    [
        (lambda: ("gloo", [1.0, 2.0]), ""),
        (
            lambda: os.kill(os.getpid(), signal.SIGTERM),
            "ended with SIGTERM; its standard error may say why",
        ),
        (lambda: os._exit(7), "with exit code 7; its standard error may say why"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: sys.exit("no"), "SystemExit: no"),
    ],
)
def test_whatever_the_measuring_process_does_is_told(
    act: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_reductions", act)
    monkeypatch.setattr(worker, "_gpus", lambda: ([], ""))
    found = worker.measure(Job(3, "a", {"LEFT_IN_THE_CHILD": "1"}, preflight={"A": "1"}))
    assert found.rank == 3
    assert found.problem.endswith(problem)
    assert bool(found.problem) == bool(problem)
    assert "LEFT_IN_THE_CHILD" not in os.environ


def test_one_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SECONDS", 0.2)
    monkeypatch.setattr(worker, "_gpus", signal.pause)
    found = worker.measure(Job(0, "a", {}, preflight={"A": "1"}))
    assert "its backend did not answer within 0.2 s" in found.problem
