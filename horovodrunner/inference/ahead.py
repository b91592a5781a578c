"""Preparing what comes next while this is computed. Runs in: Spark's Python workers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["ReadAhead"]

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Iterates in a thread of its own, some items ahead of whoever takes them.

    An error of the iteration is raised where the items are taken, after those before it. Leaving
    the context ends the thread when it next has an item, or at once while it waits for room.

    Parameters
    ----------
    items
        What to iterate over; from now on only the thread does.
    depth
        Items that may wait to be taken; the thread holds one more.

    Examples
    --------
    >>> with ReadAhead(range(3), depth=1) as numbers:
    ...     list(numbers)
    [0, 1, 2]
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._depth = depth
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        # A daemon: a thread that waits for Spark's next batch cannot be called back.
        threading.Thread(
            target=self._fill, args=(items,), name="horovodrunner-read-ahead", daemon=True
        ).start()

    def __enter__(self) -> ReadAhead[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    break
                item = self._waiting.popleft()
                self._changed.notify_all()
            yield item
            del item  # not to be held while the next one is waited for
        if self._error is not None:
            raise self._error

    def _fill(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
                del item
        except BaseException as error:  # noqa: BLE001 - raised where the items are taken
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, item: T) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._depth or self._closed)
            if not self._closed:
                self._waiting.append(item)
                self._changed.notify_all()
            return not self._closed
