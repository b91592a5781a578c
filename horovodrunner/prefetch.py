"""Results made in threads ahead of whoever takes them, in order. Runs in: every process."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

__all__ = ["Prefetcher", "map_in_threads", "read_ahead"]

Result = TypeVar("Result")


class Prefetcher(Iterator[Result], Generic[Result]):
    """Iterate over ``map(function, items)``, made in threads and in order.

    `ahead` results are being made, or wait, while the last one taken is used. An error is raised
    in the place of its result. Whoever takes the results also iterates over the items.
    """

    def __init__(
        self,
        function: Callable[[Any], Result],
        items: Iterable[Any],
        *,
        ahead: int,
        threads: int = 1,
        waits_for_threads: bool = True,
    ) -> None:
        self._function = function
        self._items = iter(items)
        self._ahead = ahead
        self._most_threads = threads
        self._threads: list[threading.Thread] = []
        # Of all queues and conditions, an interrupt of the main thread leaves only these unlocked.
        self._calls: SimpleQueue[Any] = SimpleQueue()
        self._answers: deque[SimpleQueue[Any]] = deque()
        # Also called at exit: pyarrow must not be at work in a thread while Python ends.
        self._end = weakref.finalize(
            self, _end_threads, self._calls, self._threads, waits_for_threads
        )
        self._make(ahead)

    def __enter__(self) -> Prefetcher[Result]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __next__(self) -> Result:
        self._make(self._ahead + 1)
        if not self._answers:
            raise StopIteration
        result: Result
        result, error = self._answers.popleft().get()
        if error is None:
            return result
        try:
            raise error
        finally:
            del error  # or it would hold this frame, and that the error

    def close(self) -> None:
        """End the threads: those that wait at once, the others when they have their result."""
        self._items = iter(())
        self._answers.clear()
        self._end()

    def _make(self, results: int) -> None:
        missing = results - len(self._answers)
        for item in itertools.islice(self._items, max(0, missing)):
            answer: SimpleQueue[Any] = SimpleQueue()
            self._calls.put((item, answer))
            self._answers.append(answer)
            if len(self._threads) < self._most_threads:
                # A daemon: one that waits for Spark's next batch must not keep the process.
                thread = threading.Thread(
                    target=_call,
                    args=(self._function, self._calls),
                    name="horovodrunner-prefetch",
                    daemon=True,
                )
                thread.start()
                self._threads.append(thread)


def _call(function: Callable[[Any], Any], calls: SimpleQueue[Any]) -> None:
    while (call := calls.get()) is not None:
        item, answer = call
        try:
            answer.put((function(item), None))
        except BaseException as error:  # noqa: BLE001 - raised where the result is taken
            answer.put((None, error))
        del call, item, answer  # not to be held while the next one is waited for


def _end_threads(calls: SimpleQueue[Any], threads: Sequence[threading.Thread], waits: bool) -> None:
    with suppress(Empty):
        while True:
            _, answer = calls.get_nowait()
            answer.put((None, StopIteration()))  # to another thread, which may wait for it
    for _ in threads:
        calls.put(None)
    if waits:
        for thread in threads:
            thread.join()


def map_in_threads(
    function: Callable[[Any], Result], items: Iterable[Any], threads: int
) -> Generator[Result, None, None]:
    """Iterate over ``map(function, items)`` with as many results ahead as there are threads.

    Examples
    --------
    >>> list(map_in_threads(str, range(3), threads=2))
    ['0', '1', '2']
    """

    def call(item: Any) -> Result:
        try:
            return function(item)
        except StopIteration as error:  # would end the iteration as if there were no more items
            raise RuntimeError(f"{function!r} raised StopIteration") from error

    if not threads:
        yield from map(call, items)
        return
    with Prefetcher(call, items, ahead=threads, threads=threads) as results:
        yield from results


def read_ahead(items: Iterable[Result], ahead: int) -> Prefetcher[Result]:
    """Iterate over the items in a thread of its own, from now on.

    Closing does not wait for the thread, which may be waiting for Spark.

    Examples
    --------
    >>> with read_ahead(range(3), ahead=2) as numbers:
    ...     list(numbers)
    [0, 1, 2]
    """
    # The StopIteration of `next` is what ends the results, too.
    iterators = itertools.repeat(iter(items))
    return Prefetcher(next, iterators, ahead=ahead, waits_for_threads=False)
