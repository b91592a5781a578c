"""Reads what a run's directory holds, however the run ended. Runs in: driver and command line.

A file may be missing, or end in the middle of a line; what it says is shown, and never trusted.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from horovodrunner.errors import ConfigurationError
from horovodrunner.flows.rundir import layout

__all__ = ["Metric", "Rank", "RunData", "Samples", "read_run"]

MAX_SAMPLES = 800
"""So many points of a line are drawn."""

TAIL_BYTES = 16 * 1024
TAIL_LINES = 100
MAX_TAILS = 16
MAX_HOT = 12
ALIVE_SECONDS = 60.0
"""A run whose directory was written to within this time may still go on."""


class Samples:
    """Rows of numbers, of which as many are kept as can be drawn."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, ...]] = []
        self._last: tuple[float, ...] | None = None
        self._seen = 0
        self._every = 1

    def add(self, *row: float) -> None:
        self._last = row
        if self._seen % self._every == 0:
            self._rows.append(row)
        self._seen += 1
        if len(self._rows) > 2 * MAX_SAMPLES:
            del self._rows[1::2]
            self._every *= 2

    @property
    def rows(self) -> list[tuple[float, ...]]:
        """The rows that are kept, the last one among them."""
        if self._last is not None and (not self._rows or self._rows[-1] is not self._last):
            return [*self._rows, self._last]
        return list(self._rows)

    def column(self, number: int) -> list[tuple[float, float]]:
        """Return one column over the first one."""
        return [(row[0], row[number]) for row in self.rows]


@dataclass
class Metric:
    """What was reported by one name: (step, value) of rank 0, (step, min, max) of all ranks."""

    values: Samples = field(default_factory=Samples)
    span: Samples = field(default_factory=Samples)
    lowest: float = float("inf")
    highest: float = float("-inf")
    last: float = float("nan")
    odd: int = 0
    """So many values are NaN or infinite."""


@dataclass
class Rank:
    """What is known of one rank; `usage` has (time, percent of a core, bytes)."""

    number: int
    host: str = ""
    seconds: float = 0.0
    waited: dict[str, float] = field(default_factory=dict)
    may_have_waited: dict[str, float] = field(default_factory=dict)
    step_seconds: float | None = None
    step_p95: float | None = None
    last_step: int | None = None
    bar: tuple[str, int, int | None] | None = None
    usage: Samples = field(default_factory=Samples)
    peak_memory: int = 0
    cpu_sum: float = 0.0
    cpu_count: int = 0
    hot: list[tuple[str, float]] = field(default_factory=list)
    tail: str = ""

    @property
    def waited_seconds(self) -> float:
        return sum(self.waited.values())


@dataclass
class RunData:
    """All that the report shows; `hosts` has (time, percent, used, total), `gpus` the same."""

    directory: Path
    facts: Mapping[str, Any]
    status: str
    ended: float
    """When it ended, or gave the last sign of life."""
    ranks: dict[int, Rank] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    hosts: dict[str, Samples] = field(default_factory=dict)
    gpus: dict[tuple[str, int], Samples] = field(default_factory=dict)
    log: str = ""
    files: list[tuple[str, int]] = field(default_factory=list)

    @property
    def began(self) -> float:
        return _float(self.facts.get("began"))

    def rank(self, number: int) -> Rank:
        return self.ranks.setdefault(number, Rank(number))


def read_run(directory: Path) -> RunData:
    """Read the record in a directory; ConfigurationError if there is none."""
    facts = layout.read_json(directory / layout.RUN)
    if not isinstance(facts, dict):
        raise ConfigurationError(
            f"{directory} has no {layout.RUN}: name the directory of one run, such as "
            "runs/20260131-101500-1f0c22ab"
        )
    status, ended = _status(directory, facts)
    run = RunData(directory, facts, status, ended)
    for number, host in _pairs(facts.get("placement")):
        run.rank(int(number)).host = str(host)
    _read_ranks(run)
    _read_history(run)
    _read_usage(run)
    for rank in run.ranks.values():
        rank.hot = _hot_lines(layout.read_json(directory / layout.stacks_of(rank.number)))
    _read_output(run)
    run.files = [
        (path.relative_to(directory).as_posix(), path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != layout.REPORT and not layout.is_unfinished(path)
    ]
    return run


def _status(directory: Path, facts: Mapping[str, Any]) -> tuple[str, float]:
    outcome = facts.get("outcome")
    outcome = outcome if isinstance(outcome, dict) else {}
    status = str(outcome.get("status", "running"))
    if status != "running":
        return status, _float(outcome.get("ended"))
    last = max(
        (path.stat().st_mtime for path in directory.glob("*") if path.name != layout.REPORT),
        default=_float(facts.get("began")),
    )
    return ("running" if _is_alive(facts.get("driver"), last) else "lost"), last


def _is_alive(driver: Any, last_sign: float) -> bool:
    """Return whether the driver may still be there."""
    if not isinstance(driver, dict):
        return False
    if driver.get("host") == socket.gethostname():
        pid = driver.get("pid")
        return isinstance(pid, int) and (pid == os.getpid() or _has_begun(pid, last_sign))
    return time.time() - last_sign < ALIVE_SECONDS


def _has_begun(pid: int, before: float) -> bool:
    """Return whether a process is there that was there at some time."""
    try:
        return psutil.Process(pid).create_time() <= before
    except psutil.Error:
        return False


def _read_ranks(run: RunData) -> None:
    found = layout.read_json(run.directory / layout.RANKS)
    for name, facts in found.items() if isinstance(found, dict) else ():
        if not (name.isdecimal() and isinstance(facts, dict)):
            continue
        rank = run.rank(int(name))
        rank.host = str(facts.get("host") or rank.host)
        rank.seconds = _float(facts.get("seconds"))
        rank.waited = _floats(facts.get("waited"))
        rank.may_have_waited = _floats(facts.get("may_have_waited"))
        if "median" in facts:
            rank.step_seconds, rank.step_p95 = _float(facts["median"]), _float(facts.get("p95"))
        if isinstance(facts.get("last_step"), int):
            rank.last_step = facts["last_step"]
        bar = facts.get("bar")
        if isinstance(bar, list) and len(bar) == 3:
            total = bar[2] if isinstance(bar[2], int) else None
            rank.bar = (str(bar[0]), int(_float(bar[1])), total)


def _read_history(run: RunData) -> None:
    for line in layout.read_lines(run.directory / layout.HISTORY):
        if not isinstance(line, dict):
            continue
        step = _float(line.get("step"))
        if line.get("rank") == 0:
            for name, value in _floats(line.get("values")).items():
                metric = run.metrics.setdefault(name, Metric())
                metric.values.add(step, value)
                metric.last = value
                if value - value == 0:  # neither NaN nor infinite
                    metric.lowest = min(metric.lowest, value)
                    metric.highest = max(metric.highest, value)
                else:
                    metric.odd += 1
        elif "ranks" in line:
            lows, highs = _floats(line.get("min")), _floats(line.get("max"))
            for name in lows.keys() & highs.keys() & run.metrics.keys():
                run.metrics[name].span.add(step, lows[name], highs[name])


def _read_usage(run: RunData) -> None:
    for line in layout.read_lines(run.directory / layout.USAGE):
        if not isinstance(line, dict) or not isinstance(line.get("rank"), int):
            continue
        rank, at = run.rank(line["rank"]), _float(line.get("time"))
        cpu, memory = _float(line.get("cpu_percent")), _float(line.get("memory"))
        rank.usage.add(at, cpu, memory)
        rank.peak_memory = max(rank.peak_memory, int(memory))
        rank.cpu_sum, rank.cpu_count = rank.cpu_sum + cpu, rank.cpu_count + 1
        host = str(line.get("host"))
        rank.host = rank.host or host
        run.hosts.setdefault(host, Samples()).add(
            at,
            _float(line.get("host_cpu_percent")),
            _float(line.get("host_memory_used")),
            _float(line.get("host_memory_total")),
        )
        for gpu in line.get("gpus") or ():
            if isinstance(gpu, list) and len(gpu) == 4:
                number, percent, used, total = map(_float, gpu)
                samples = run.gpus.setdefault((host, int(number)), Samples())
                samples.add(at, percent, used, total)


def _hot_lines(file: Any) -> list[tuple[str, float]]:
    """Return the places where most time went, from a speedscope file's last profile."""
    try:
        frames = file["shared"]["frames"]
        profile = file["profiles"][-1]
        seconds: dict[str, float] = {}
        for stack, weight in zip(profile["samples"], profile["weights"], strict=True):
            if stack:
                label = _place(frames[stack[-1]])
                seconds[label] = seconds.get(label, 0.0) + float(weight)
    except (TypeError, KeyError, IndexError, ValueError):
        return []
    return sorted(seconds.items(), key=lambda each: -each[1])[:MAX_HOT]


def _place(frame: Mapping[str, Any]) -> str:
    file = str(frame.get("file", ""))
    shown = file if file.startswith("<") else "/".join(file.split("/")[-3:])
    return f"{frame.get('name')} ({shown}:{frame.get('line')})" if file else str(frame["name"])


def _read_output(run: RunData) -> None:
    run.log = _tail(run.directory / layout.RUN_LOG)
    failed = (run.facts.get("outcome") or {}).get("error", {}).get("rank")
    order = sorted(run.ranks, key=lambda number: (number != failed, number))
    for number in order[:MAX_TAILS]:
        run.ranks[number].tail = _tail(run.directory / layout.output_of(number))


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read(TAIL_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return ""
    if size > TAIL_BYTES:
        del lines[0]
    return "\n".join(lines[-TAIL_LINES:])


def _pairs(value: Any) -> Iterator[tuple[Any, Any]]:
    items: Iterable[Any] = value if isinstance(value, list) else ()
    for item in items:
        if isinstance(item, list) and len(item) == 2 and isinstance(item[0], int):
            yield item[0], item[1]


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _floats(value: Any) -> dict[str, float]:
    found = value if isinstance(value, dict) else {}
    return {name: float(each) for name, each in found.items() if isinstance(each, (int, float))}
