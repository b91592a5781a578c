"""The user's transform, between Spark's rows and the model. Runs in: Spark's Python workers.

It is called in a thread, while the model computes; or, where it is heavy, in processes that the
Python worker starts once and keeps for its next tasks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import cloudpickle
import numpy as np

from horovodrunner.errors import PredictionError
from horovodrunner.inference.batching import Arrays, Batch, joined, row_shapes
from horovodrunner.inference.halving import halves
from horovodrunner.inference.inputs import InputError, as_one_array
from horovodrunner.prefetch import read_ahead

__all__ = ["Transform", "Transforming", "transformed"]

Transform = Callable[[dict[str, Any]], Mapping[str, Any]]

_transforming: Transforming
"""What a process of the pool calls."""


class Transforming:
    """Calls the transform, and with parts of the batch where it fails."""

    def __init__(self, transform: Transform, names: Sequence[str], *, find_all: bool) -> None:
        self._transform = transform
        self._names = names
        self._find_all = find_all
        """Whether to find all rows on which the transform fails, or the first one only."""

    def __call__(self, rows: Arrays) -> Batch:
        numbers, *arrays = rows
        parts: list[Arrays] = []
        reasons: dict[int, str] = {}

        def attempt(part: slice) -> Arrays:
            given = [each[part] for each in arrays]
            return self._made(map(as_one_array, given) if self._find_all else given)

        for part, found in halves(len(numbers), attempt, fatal=(InputError,)):
            if not isinstance(found, Exception):
                parts.append((numbers[part], *found))
                continue
            reason = f"the transform failed: {type(found).__name__}: {found}"
            reasons[int(numbers[part.start])] = reason
            if not self._find_all:
                return Batch(numbers[:0], (), reasons)
        parts, unusual = _of_one_kind(parts)
        if unusual and not self._find_all:
            raise InputError(next(iter(unusual.values())))
        reasons |= unusual
        if not parts:
            return Batch(numbers[:0], (), reasons)
        numbers, *inputs = joined(parts)
        return Batch(numbers, tuple(inputs), reasons)

    def _made(self, given: Iterable[np.ndarray]) -> Arrays:
        batch = dict(zip(self._names, given, strict=True))
        rows = len(next(iter(batch.values())))
        made = self._transform(batch)
        if not isinstance(made, Mapping) or not made:
            raise InputError(
                f"batch_transform gave {type(made).__name__}: it is to give a dict of the model's "
                "inputs, which goes by name and array"
            )
        inputs = tuple(np.asarray(each) for each in made.values())
        for name, each in zip(made, inputs, strict=True):
            if each.ndim == 0 or len(each) != rows:
                raise InputError(
                    f"batch_transform was given {rows} rows and gave {name!r} the shape "
                    f"{each.shape}: its first dimension is to be the rows"
                )
        return inputs


def _of_one_kind(parts: list[Arrays]) -> tuple[list[Arrays], dict[int, str]]:
    """Leave out what the transform has made of some rows, if it cannot stand beside the rest."""
    counts: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for part in parts:
        counts[row_shapes(part[1:])] += len(part[0])
    if len(counts) < 2:
        return parts, {}
    ((usual, _),) = counts.most_common(1)
    unusual = {
        number: f"the transform gave the shape {', '.join(map(str, row_shapes(part[1:])))} for "
        f"this row, and {', '.join(map(str, usual))} for most rows of its batch"
        for part in parts
        for number in part[0].tolist()
        if row_shapes(part[1:]) != usual
    }
    return [part for part in parts if row_shapes(part[1:]) == usual], unusual


@contextlib.contextmanager
def transformed(
    batches: Iterable[Arrays], transforming: Transforming, *, workers: int, prefetch: int
) -> Iterator[Iterator[Batch]]:
    """Transform batches some ahead of who takes them: in processes, or with 0 in a thread."""
    if workers:
        made = _in_processes(_pool(transforming, workers), batches, workers + prefetch)
        with read_ahead(made, 1) as ahead:
            yield ahead
    else:
        with read_ahead(map(transforming, batches), prefetch) as ahead:
            yield ahead


# ---- processes


_pools: dict[tuple[bytes, int], ProcessPoolExecutor] = {}
"""Of this Python worker: the last one that was used."""


def _pool(calls: Transforming, workers: int) -> ProcessPoolExecutor:
    pickled = cloudpickle.dumps(calls)
    key = (pickled, workers)
    if key not in _pools:
        for old in _pools.values():
            old.shutdown(wait=False, cancel_futures=True)
        _pools.clear()
        _pools[key] = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _begin, (pickled,)
        )
    return _pools[key]


def _begin(pickled: bytes) -> None:
    """Get ready to transform; and end with the Python worker, which may be killed."""
    global _transforming
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _transforming = cloudpickle.loads(pickled)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _call(arrays: Arrays) -> Batch:
    return _transforming(arrays)


def _in_processes(
    pool: ProcessPoolExecutor, batches: Iterable[Arrays], most: int
) -> Iterator[Batch]:
    futures: deque[Future[Batch]] = deque()
    try:
        for arrays in batches:
            futures.append(pool.submit(_call, arrays))
            if len(futures) >= most:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    except BrokenProcessPool as error:
        _pools.clear()
        raise PredictionError(
            "a process of transform_workers ended before its time, which is what the kernel does "
            "when memory runs out: use fewer of them, or a smaller batch_size"
        ) from error
    finally:
        for future in futures:
            future.cancel()
