"""Loaders of torch tensors over a reader. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from horovodrunner.compat.absent import PETASTORM, refuse_names
from horovodrunner.errors import DataError
from horovodrunner.validation import integer

__all__ = ["BatchedDataLoader", "DataLoader"]

__getattr__ = refuse_names("petastorm.pytorch", PETASTORM)

_Rows = dict[str, Any]
_PROMOTED = {"uint16": "int32", "uint32": "int64", "bool": "uint8"}


class _Loader:
    """Cuts what a reader gives into batches; the last one may have fewer rows.

    The reader says how many epochs there are. With a `shuffling_queue_capacity`, rows are mixed
    among about so many, in an order that the reader's seed chooses; all shards have the same number
    of batches either way.
    """

    def __init__(self, reader: Any, batch_size: int, shuffling_queue_capacity: int) -> None:
        self.reader = reader
        self.batch_size = integer("batch_size", batch_size, at_least=1)
        self.shuffling_queue_capacity = integer(
            "shuffling_queue_capacity", shuffling_queue_capacity, at_least=0
        )
        self._random = np.random.default_rng(getattr(reader, "seed", None))
        self._is_running = False
        self._was_iterated = False

    def __iter__(self) -> Iterator[Any]:
        if self._is_running:
            raise DataError(
                "this loader is being iterated over: end that, or make another reader and loader"
            )
        if self._was_iterated:
            self.reader.reset()
        self._was_iterated = self._is_running = True
        try:
            capacity = self.shuffling_queue_capacity
            for rows in _batches(self.reader, self.batch_size, capacity, self._random):
                yield self._collated(rows)
        finally:
            self._is_running = False

    def _collated(self, rows: _Rows) -> Any:
        raise NotImplementedError

    def __enter__(self) -> _Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.reader.stop()
        self.reader.join()


class DataLoader(_Loader):
    """Batches of a reader as dicts of tensors, or what `collate_fn` makes of a list of rows."""

    def __init__(
        self,
        reader: Any,
        batch_size: int = 1,
        collate_fn: Callable[[list[_Rows]], Any] | None = None,
        shuffling_queue_capacity: int = 0,
    ) -> None:
        super().__init__(reader, batch_size, shuffling_queue_capacity)
        self.collate_fn = collate_fn

    def _collated(self, rows: _Rows) -> Any:
        import torch

        if self.collate_fn is None:
            return {name: torch.as_tensor(values) for name, values in rows.items()}
        return self.collate_fn([_taken(rows, index) for index in range(_count(rows))])


class BatchedDataLoader(_Loader):
    """Batches of a reader as dicts of tensors, or what `transform_fn` makes of a column's array."""

    def __init__(
        self,
        reader: Any,
        batch_size: int = 1,
        transform_fn: Callable[[Any], Any] | None = None,
        shuffling_queue_capacity: int = 0,
    ) -> None:
        super().__init__(reader, batch_size, shuffling_queue_capacity)
        self.transform_fn = transform_fn

    def _collated(self, rows: _Rows) -> Any:
        import torch

        make = self.transform_fn or torch.as_tensor
        return {name: make(values) for name, values in rows.items()}


def _batches(
    reader: Any, batch_size: int, capacity: int, generator: np.random.Generator
) -> Generator[_Rows, None, None]:
    kept: _Rows = {}
    at_least = max(0, capacity - 1)
    for row_group in reader:
        kept = _joined(kept, {name: _promoted(name, v) for name, v in row_group._asdict().items()})
        if capacity:
            kept = _taken(kept, generator.permutation(_count(kept)))
        first = 0
        while _count(kept) - first - at_least >= batch_size:
            yield _taken(kept, slice(first, first + batch_size))
            first += batch_size
        kept = _taken(kept, slice(first, None))
    for first in range(0, _count(kept), batch_size):
        yield _taken(kept, slice(first, first + batch_size))


def _count(rows: _Rows) -> int:
    return len(next(iter(rows.values()))) if rows else 0


def _joined(first: _Rows, second: _Rows) -> _Rows:
    if not _count(first):
        return second
    return {name: np.concatenate([first[name], second[name]]) for name in second}


def _taken(rows: _Rows, chosen: Any) -> _Rows:
    return {name: values[chosen] for name, values in rows.items()}


def _promoted(name: str, values: Any) -> Any:
    """Return numbers that torch has."""
    values = np.asarray(values)
    if values.dtype.kind in "OUSmM":
        raise DataError(
            f"column {name!r} has values of the type {values.dtype}, of which torch has no "
            "tensors: leave it out (schema_fields), or make numbers of it (TransformSpec)"
        )
    return values.astype(_PROMOTED.get(values.dtype.name, values.dtype), copy=False)
