"""What a rank reports, as lines of JSON that only both ends read. Runs in: worker and driver."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from json import dumps, loads  # main may put others in their place in json
from typing import Any

__all__ = ["MAX_STEP", "Bar", "Point", "decode_records", "encode_bar", "encode_point"]

MAX_STEP = 2**53
"""Every number up to here is itself in JSON and in any column of numbers."""

_POINT, _BAR = "point", "bar"


@dataclass(frozen=True)
class Point:
    """What one rank reported at one step.

    Parameters
    ----------
    step
        The step, as it was given to :func:`horovodrunner.metrics.report` or counted by it.
    values
        The numbers by name.
    rank
        The rank that reported them.
    attempt
        1 in the first launch of the run, one more after each restart.
    time
        Seconds since the epoch, by the clock of the rank's machine.
    """

    step: int
    values: Mapping[str, float]
    rank: int = 0
    attempt: int = 1
    time: float = 0.0
    is_kept: bool = field(default=True, repr=False)
    """False for one that only counts in the summary of all ranks."""


@dataclass(frozen=True)
class Bar:
    """The state of a progress bar; bars of a rank are nested in the order of their numbers."""

    number: int
    began: float
    time: float
    description: str
    done: int
    total: int | None
    postfix: str = ""
    has_ended: bool = False


def encode_point(step: int, now: float, values: Mapping[str, float], *, is_kept: bool) -> bytes:
    """Return a point as a line."""
    return dumps([_POINT, step, now, is_kept, values]).encode() + b"\n"


def encode_bar(bar: Bar) -> bytes:
    """Return a bar's state as a line."""
    return dumps([_BAR, *vars(bar).values()]).encode() + b"\n"


def decode_records(lines: bytes, rank: int, attempt: int) -> Iterator[Point | Bar]:
    """Return what a rank reported; what is no record, such as a torn line, is left out."""
    for row in _rows(lines):
        try:
            kind, *fields = row
            if kind == _POINT:
                step, now, is_kept, values = fields
                numbers = {_text(name): float(value) for name, value in values.items()}
                yield Point(int(step), numbers, rank, attempt, float(now), bool(is_kept))
            elif kind == _BAR:
                number, began, now, text, done, total, postfix, has_ended = fields
                total = None if total is None else int(total)
                bar = Bar(int(number), float(began), float(now), _text(text), int(done), total)
                yield replace(bar, postfix=_text(postfix), has_ended=bool(has_ended))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            continue


def _rows(lines: bytes) -> Iterator[Any]:
    """Read all lines at once, which takes a third of the time; or else each by itself."""
    found = [line for line in lines.splitlines() if line]
    try:
        yield from loads(b"[%b]" % b",".join(found))
    except (ValueError, RecursionError):
        for line in found:
            with contextlib.suppress(ValueError, RecursionError):
                yield loads(line)


def _text(text: str) -> str:
    """Replace halves of characters: nothing else that gets this text could write them."""
    return text if text.isascii() else text.encode(errors="replace").decode()
