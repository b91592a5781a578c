"""Writes what is known of a run into its directory. Runs in: the driver."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Any

from horovodrunner.flows.metrics.records import Bar, Point
from horovodrunner.flows.metrics.series import Moments
from horovodrunner.flows.profile.driver import Stacks, speedscope
from horovodrunner.flows.rundir import layout
from horovodrunner.flows.rundir.masking import Mask
from horovodrunner.flows.rundir.steps import StepClock
from horovodrunner.wire.events import Lines, Message, Note, Placed, Profile, Usage

__all__ = ["RecordWriter"]

MAX_LOG_BYTES = 64 * 1024 * 1024
"""Of a rank's output, the last so many bytes are kept, and up to as many before them."""

MAX_LINES = 500_000
"""After so many lines of numbers every second one is left out, then three of four, and so on."""

MAX_OPEN_STEPS = 2000
"""Steps that not all ranks have reported yet; the earliest is written as it is."""

_ALL_RANKS = -1


class RecordWriter:
    """Keeps the files of one run; its methods may take as long as a disk takes."""

    def __init__(self, directory: Path, facts: Mapping[str, Any], size: int, mask: Mask) -> None:
        self.directory = directory
        self._facts: dict[str, Any] = {"format": layout.FORMAT, **facts}
        self._size = size
        self._mask = mask
        self.attempt = 1
        self._ranks: dict[int, _Rank] = {}
        self._history = _Thinned(directory / layout.HISTORY)
        self._usage = _Thinned(directory / layout.USAGE)
        self._open_steps: dict[tuple[int, int], _Step] = {}
        self._has_news = False
        (directory / layout.OUTPUT).mkdir(parents=True, exist_ok=True)
        self.know()

    def know(self, **facts: Any) -> None:
        """Add facts about the run to those known, or change them."""
        self._facts.update(facts)
        layout.write_json(self.directory / layout.RUN, self._facts)

    def begin(self, attempt: int) -> None:
        """Note that an attempt is launched."""
        self.attempt = attempt
        self._write_open_steps()
        for rank in self._ranks.values():
            rank.clock.begin()
        attempts = [*self._facts.get("attempts", ()), {"number": attempt, "began": time.time()}]
        self.know(attempts=attempts)

    def attempt_failed(self, cause: str) -> None:
        """Note what ended the attempt."""
        attempts = [dict(each) for each in self._facts.get("attempts", ())]
        if attempts:
            attempts[-1] |= {"ended": time.time(), "cause": self._mask.text(cause)}
            self.know(attempts=attempts)

    def placed(self, event: Placed) -> None:
        """Note which rank is on which host."""
        self._size = len(event.ranks)
        for _, rank, host in event.ranks:
            self._rank(rank).host = host
        self.know(placement=[[rank, host] for _, rank, host in event.ranks], placed=time.time())

    def lines(self, event: Lines) -> None:
        """Keep what a rank printed."""
        self._log(layout.output_of(event.rank), bytes(event.lines))

    def message(self, event: Message) -> None:
        """Keep what a rank sent with log_to_driver."""
        self._log(layout.output_of(event.rank), event.text.encode(errors="replace") + b"\n")

    def note(self, event: Note) -> None:
        """Keep a line of the run's own."""
        when = time.strftime("%H:%M:%S", time.gmtime())
        self._log(layout.RUN_LOG, f"{when} {event.text}\n".encode(errors="replace"))

    def records(self, number: int, records: Iterable[Point | Bar]) -> None:
        """Keep what a rank reported, and how fast it is."""
        rank = self._rank(number)
        for record in records:
            rank.clock.take(record)
            if isinstance(record, Bar):
                rank.draw(replace(record, description=self._mask.text(record.description)))
            else:
                self._add(record)
        self._history.write()
        self._has_news = True

    def usage(self, event: Usage) -> None:
        """Keep what a rank and its host use."""
        self._usage.add(vars(event), event.rank)
        self._usage.write()

    def profile(self, event: Profile) -> None:
        """Keep where a rank's time went."""
        rank = self._rank(event.rank)
        rank.seconds[self.attempt] = event.seconds
        rank.waited[self.attempt] = event.waited
        rank.may_have_waited[self.attempt] = event.may_have_waited
        self._has_news = True
        if (stacks := Stacks.of(event)) is None or not stacks.seconds:
            return
        title = f"rank {event.rank}"
        rank.stacks[f"{title}, attempt {self.attempt}"] = stacks
        content = dumps(speedscope(rank.stacks, title)).encode()
        layout.replace_file(self.directory / layout.stacks_of(event.rank), content)

    def flush(self) -> None:
        """Write what is not written at once."""
        if self._has_news:
            self._has_news = False
            ranks = {str(number): rank.summary() for number, rank in sorted(self._ranks.items())}
            layout.write_json(self.directory / layout.RANKS, ranks)
        os.utime(self.directory / layout.RUN)  # a sign of life

    def checkpoints(self, found: Iterable[Mapping[str, Any]]) -> None:
        """Note which checkpoints there are; those that are gone were there."""
        gone = {"is_kept": False, "is_best": False}
        known = {each["path"]: {**each, **gone} for each in self._known_checkpoints()}
        known |= {each["path"]: {**each, "is_kept": True} for each in found}
        listed = sorted(known.values(), key=lambda each: str(each["time"]))
        if listed != self._known_checkpoints():
            self.know(checkpoints=listed)

    def keep_file(self, path: Path) -> None:
        """Take a file of the driver's into the record, without a copy where that can be."""
        if not path.is_file():
            return
        target = self.directory / layout.TIMELINES / path.name
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        _link_or_copy(path, target)

    def keep_artifacts(self, directory: Path) -> None:
        """Take what ranks have left, without a copy where that can be."""
        target = self.directory / layout.ARTIFACTS
        shutil.copytree(directory, target, copy_function=_link_or_copy, dirs_exist_ok=True)

    def end(self, outcome: Mapping[str, Any], phases: Sequence[Sequence[Any]]) -> None:
        """Note how the run ended."""
        self._write_open_steps()
        self._has_news = True
        self.flush()
        self.know(outcome=outcome, phases=phases)

    def hidden(self, text: str) -> str:
        """Return a text without secrets."""
        return self._mask.text(text)

    def _known_checkpoints(self) -> list[dict[str, Any]]:
        return list(self._facts.get("checkpoints", ()))

    def _rank(self, number: int) -> _Rank:
        return self._ranks.setdefault(number, _Rank())

    def _log(self, name: str, content: bytes) -> None:
        path = self.directory / name
        layout.append(path, self._mask.hide(content))
        if path.stat().st_size > MAX_LOG_BYTES:
            path.replace(path.with_name(f"{path.stem}.before{path.suffix}"))

    def _add(self, point: Point) -> None:
        if point.rank == 0 or point.is_kept:
            line = {
                "step": point.step,
                "rank": point.rank,
                "attempt": point.attempt,
                "time": point.time,
                "values": dict(point.values),
            }
            self._history.add(line, point.rank)
        if self._size == 1:
            return
        key = (point.attempt, point.step)
        step = self._open_steps.setdefault(key, _Step())
        step.add(point)
        if len(step.ranks) >= self._size:
            self._write_step(key)
        elif len(self._open_steps) > MAX_OPEN_STEPS:
            self._write_step(next(iter(self._open_steps)))

    def _write_open_steps(self) -> None:
        for key in list(self._open_steps):
            self._write_step(key)
        self._history.write()

    def _write_step(self, key: tuple[int, int]) -> None:
        step = self._open_steps.pop(key)
        line = {"step": key[1], "attempt": key[0], "ranks": len(step.ranks), **step.statistics()}
        self._history.add(line, _ALL_RANKS)


class _Step:
    """What the ranks reported at one step."""

    def __init__(self) -> None:
        self.ranks: set[int] = set()
        self._moments: dict[str, Moments] = {}

    def add(self, point: Point) -> None:
        self.ranks.add(point.rank)
        for name, value in point.values.items():
            self._moments.setdefault(name, Moments()).add(value)

    def statistics(self) -> dict[str, dict[str, float]]:
        return {
            statistic: {name: getattr(each, statistic) for name, each in self._moments.items()}
            for statistic in ("mean", "min", "max")
        }


class _Rank:
    """What is known of one rank; times by attempt."""

    def __init__(self) -> None:
        self.host = ""
        self.clock = StepClock()
        self.bar: Bar | None = None
        self.seconds: dict[int, float] = {}
        self.waited: dict[int, Mapping[str, float]] = {}
        self.may_have_waited: dict[int, Mapping[str, float]] = {}
        self.stacks: dict[str, Stacks] = {}

    def draw(self, bar: Bar) -> None:
        """Note the state of a bar; the outermost one says how far the rank is."""
        if self.bar is None or self.bar.has_ended or bar.number <= self.bar.number:
            self.bar = bar

    def summary(self) -> dict[str, Any]:
        bar = self.bar
        return {
            "host": self.host,
            "bar": None if bar is None else [bar.description, bar.done, bar.total],
            "seconds": sum(self.seconds.values()),
            "waited": _sums(self.waited.values()),
            "may_have_waited": _sums(self.may_have_waited.values()),
            **self.clock.summary(),
        }


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _sums(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for part in parts:
        for name, seconds in part.items():
            sums[name] = sums.get(name, 0.0) + seconds
    return sums


class _Thinned:
    """A file of lines that grows more and more slowly."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._taken = 0
        self._seen: dict[int, int] = {}

    def add(self, content: Mapping[str, Any], key: int) -> None:
        """Take a line, or leave it out; all keys have their turns."""
        seen = self._seen[key] = self._seen.get(key, -1) + 1
        every = 2 ** (self._taken // MAX_LINES)
        if seen % every == 0:
            self._taken += 1
            self._waiting.append(dumps(content) + "\n")

    def write(self) -> None:
        """Write what was taken."""
        if self._waiting:
            layout.append(self._path, "".join(self._waiting).encode())
            self._waiting.clear()
