"""Which rows of a batch something fails on. Runs in: Spark's Python workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = ["halves", "narrowed"]

T = TypeVar("T")


def halves(
    rows: int,
    attempt: Callable[[slice], T],
    caught: type[Exception] = Exception,
    fatal: tuple[type[Exception], ...] = (),
) -> Iterator[tuple[slice, T | Exception]]:
    """Attempt all rows at once and, where that fails, their halves, down to single rows.

    Yields the parts in order, each with what the attempt returned, or raised for a single row.

    >>> [(part.start, found) for part, found in halves(3, [1, 2, 3].__getitem__)]
    [(0, [1, 2, 3])]
    """
    waiting = [(0, rows)]
    while waiting:
        start, stop = waiting.pop()
        part = slice(start, stop)
        found: T | Exception
        try:
            found = attempt(part)
        except fatal:
            raise
        except caught as error:
            if stop - start > 1:
                half = (start + stop) // 2
                waiting += [(half, stop), (start, half)]
                continue
            found = error
        yield part, found


def narrowed(
    rows: int, attempt: Callable[[slice], object], error: Exception
) -> tuple[slice, Exception]:
    """Return the part on which the attempt, which failed on all rows, fails, and its error.

    It is one row, the first on which it fails; or several, with neither half of which it fails.
    Takes no more attempts than twice the bits of the number of rows.
    """
    start, stop = 0, rows
    while stop - start > 1:
        half = (start + stop) // 2
        for part in (slice(start, half), slice(half, stop)):
            try:
                attempt(part)
            except Exception as narrower:  # noqa: BLE001 - whatever the attempt raises
                start, stop, error = part.start, part.stop, narrower
                break
        else:
            break
    return slice(start, stop), error
