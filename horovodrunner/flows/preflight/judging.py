"""What is wrong with hosts, links and GPUs, and a table of them. Runs in: the task.

Pure: what was measured comes in, sentences go out.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from horovodrunner.formatting import format_bytes
from horovodrunner.placement.topology import Slot
from horovodrunner.wire.events import Measured

__all__ = ["LARGE_BYTES", "Link", "format_table", "problems_of_links", "problems_of_ranks"]

LARGE_BYTES = 32 * 1024 * 1024
"""What a large allreduce reduces, on every rank."""

SLOWER = 10
"""So many times slower than is usual in the run is too slow."""

LEAST_ROUND_TRIP = 0.005
"""Seconds; below it no round trip is called slow, whatever the others take."""

_MAX_NAMED = 4


@dataclass(frozen=True)
class Link:
    """The way from one host to another: seconds there and back, and bytes per second."""

    source: str
    target: str
    round_trip: float = 0.0
    rate: float = 0.0
    error: str = ""


def problems_of_links(links: Sequence[Link]) -> list[str]:
    """Name the hosts that are out of reach, and the links that are far slower than the others.

    >>> fast = [Link("a", "b", 1e-4, 9e8), Link("b", "a", 1e-4, 9e8), Link("a", "c", 1e-4, 8e8)]
    >>> problems_of_links([*fast, Link("c", "a", 1e-4, 1e7)])
    ['the link from c to a carries 9.5 MiB/s, where 858.3 MiB/s are usual in this run']
    """
    if cut_off := {link: f"is cut: {link.error}" for link in links if link.error}:
        return _in_words(cut_off, links)
    usual = _usual({link: link.rate for link in links})
    quickest = -_usual({link: -link.round_trip for link in links})
    slow: dict[Link, str] = {}
    for link in links:
        if link.rate * SLOWER <= usual:
            rates = f"{format_bytes(int(link.rate))}/s, where {format_bytes(int(usual))}/s"
            slow[link] = f"carries {rates} are usual in this run"
        elif link.round_trip >= max(LEAST_ROUND_TRIP, quickest * SLOWER):
            times = f"{link.round_trip * 1e3:.1f} ms there and back, where {quickest * 1e3:.1f} ms"
            slow[link] = f"takes {times} are usual in this run"
    return _in_words(slow, links)


def problems_of_ranks(measured: Mapping[int, Measured], slots: Sequence[Slot]) -> list[str]:
    """Name the ranks whose backend or GPUs do not work."""
    problems: list[str] = []
    for slot in slots:
        found = measured.get(slot.rank)
        if found is None:
            problems.append(f"rank {slot.rank} on {slot.host} did not answer in time")
        elif found.problem:
            problems.append(f"rank {slot.rank} on {slot.host}: {found.problem}")
    return problems


def format_table(
    links: Sequence[Link], measured: Mapping[int, Measured], slots: Sequence[Slot]
) -> str:
    """Return what was found as a small table: hosts with GPUs, then links, then reductions."""
    lines = []
    for host, ranks in _ranks_by_host(slots).items():
        gpus = [measured[rank].gpus for rank in ranks if rank in measured and measured[rank].gpus]
        names = Counter(gpus[0]) if gpus else Counter[str]()
        words = ", ".join(f"{count} x {name}" for name, count in names.items()) or "no GPUs"
        lines.append(f"  {host:<28} {len(ranks)} rank{'s' * (len(ranks) > 1)}, {words}")
    if reached := [link for link in links if not link.error]:
        slowest, latest = (
            min(reached, key=lambda link: link.rate),
            max(reached, key=lambda link: link.round_trip),
        )
        rate, trip = format_bytes(int(slowest.rate)), f"{latest.round_trip * 1e3:.2f} ms"
        lines += [
            f"  {len(reached)} links between {len(_ranks_by_host(slots))} hosts",
            f"    slowest: {rate}/s, {slowest.source} to {slowest.target}",
            f"    longest way there and back: {trip}, {latest.source} to {latest.target}",
        ]
    if timed := [each for each in measured.values() if each.seconds]:
        small, large = (max(each.seconds[which] for each in timed) for which in (0, 1))
        rate = format_bytes(int(LARGE_BYTES / large)) if large else "?"
        size = format_bytes(LARGE_BYTES)
        lines += [
            f"  allreduce of {len(timed)} rank{'s' * (len(timed) > 1)} by {timed[0].backend}",
            f"    4 bytes: {small * 1e3:.2f} ms",
            f"    {size}: {large * 1e3:.0f} ms, {rate}/s",
        ]
    return "\n".join(lines)


def _usual(values: Mapping[Link, float]) -> float:
    """Return the median, or the upper one of the hosts' best links where it is higher.

    With three hosts, of which one is slow, four of six links are; with two hosts, one of two.
    """
    if not values:
        return 0.0
    best: dict[str, float] = {}
    for link, value in values.items():
        best[link.source] = max(best.get(link.source, value), value)
    return max(statistics.median(values.values()), statistics.median_high(best.values()))


def _in_words(bad: Mapping[Link, str], links: Sequence[Link]) -> list[str]:
    """Describe bad links; a host that all of them have in common is named first."""
    texts = [f"the link from {link.source} to {link.target} {why}" for link, why in bad.items()]
    hosts = {link.source for link in links}
    common = set.intersection(*({link.source, link.target} for link in bad)) if bad else set()
    if len(common) == 1 and len(bad) > 1 and len(hosts) > 2:
        texts[0] = f"{common.pop()} is on all {len(bad)} of them: {texts[0]}"
    if len(texts) > _MAX_NAMED:
        texts[_MAX_NAMED:] = [f"and {len(texts) - _MAX_NAMED} more links"]
    return texts


def _ranks_by_host(slots: Sequence[Slot]) -> dict[str, list[int]]:
    hosts: dict[str, list[int]] = {}
    for slot in slots:
        hosts.setdefault(f"{slot.host} ({slot.address})", []).append(slot.rank)
    return hosts
