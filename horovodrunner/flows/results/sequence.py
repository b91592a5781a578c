"""The results of all ranks, as the user has them. Runs in: the driver."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, overload

from horovodrunner.errors import PayloadError
from horovodrunner.flows.outcome.driver import open_result
from horovodrunner.flows.results.driver import ResultStore
from horovodrunner.formatting import ranks_in_words

__all__ = ["RankResults"]


class RankResults(Sequence[Any]):
    """What main returned on every rank of a run, by rank.

    A value is unpickled when it is first asked for, and is the same object from then on. Until
    then it lies in a temporary file, which is gone once nobody has these results any more.

    Examples
    --------
    >>> from horovodrunner import HorovodRunner
    >>> runner = HorovodRunner(np=-2, results="all")
    >>> runner.run(evaluate)  # doctest: +SKIP
    0.91
    >>> runner.results[1]  # doctest: +SKIP
    0.93
    >>> sum(runner.results) / len(runner.results)  # doctest: +SKIP
    0.92
    """

    def __init__(
        self,
        size: int = 0,
        open_rank: Callable[[int], Any] = lambda rank: None,
        *,
        why_none: str = "",
    ) -> None:
        self._size = size
        self._open_rank = open_rank
        self._why_none = why_none
        self._lock = threading.Lock()
        self._values: dict[int, Any] = {}

    @classmethod
    def of(cls, store: ResultStore, first: Any) -> RankResults:
        """Return the results of a run that ended well, of which rank 0's is unpickled already."""
        if missing := store.missing():
            raise PayloadError(
                f"the run ended well, but what {ranks_in_words(missing)} returned did not come"
            )
        results = cls(store.size, lambda rank: open_result(store.read(rank), rank))
        results._values[0] = first
        return results

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, rank: int) -> Any: ...

    @overload
    def __getitem__(self, rank: slice) -> list[Any]: ...

    def __getitem__(self, rank: int | slice) -> Any:
        """Return a rank's value; an IndexError says why there is none."""
        if isinstance(rank, slice):
            return [self[each] for each in range(self._size)[rank]]
        if not self._size:
            raise IndexError(f"results[{rank}]: there are none, because {self._why_none}")
        try:
            number = range(self._size)[rank]
        except IndexError:
            raise IndexError(
                f"results[{rank}]: the run had {self._size} rank{'s' * (self._size > 1)}"
            ) from None
        with self._lock:
            if number not in self._values:
                self._values[number] = self._open_rank(number)
            return self._values[number]

    def __repr__(self) -> str:
        if not self._size:
            return f"<no results: {self._why_none}>"
        return f"<results of {self._size} rank{'s' * (self._size > 1)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Take the values along, and not the file in which they lie."""
        return _of_values, ([*self], self._why_none)


def _of_values(values: list[Any], why_none: str) -> RankResults:
    results = RankResults(len(values), why_none=why_none)
    results._values.update(enumerate(values))
    return results
