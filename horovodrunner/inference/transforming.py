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
from horovodrunner.inference.ahead import ReadAhead
from horovodrunner.inference.batching import Arrays, Batch
from horovodrunner.inference.inputs import InputError, as_one_array

__all__ = ["Transform", "transformed"]

Transform = Callable[[dict[str, Any]], Mapping[str, Any]]

_transforming: _Transforming
"""What a process of the pool calls."""


@contextlib.contextmanager
def transformed(
    batches: Iterable[Arrays],
    transform: Transform,
    names: Sequence[str],
    *,
    workers: int,
    prefetch: int,
    find_all: bool,
) -> Iterator[Iterator[Batch]]:
    """Call the transform for each batch, some ahead of who takes them.

    Parameters
    ----------
    batches
        Arrays of rows, one for each name.
    transform
        Takes a dict of arrays and gives another one, whose values are the model's inputs.
    names
        Names of the arrays.
    workers
        Processes that call it; 0: a thread.
    prefetch
        Batches that may wait.
    find_all
        Whether all rows on which the transform fails are to be found, or the first one only.

    Yields
    ------
    iterator of Batch
        The model's inputs, for as long as the context is not left.
    """
    calls = _Transforming(transform, tuple(names), find_all)
    if workers:
        pool = _pool(calls, workers)
        made: Iterator[Batch] = _in_processes(pool, batches, workers + prefetch)
        with ReadAhead(made, 1) as ahead:
            yield iter(ahead)
    else:
        with ReadAhead(map(calls, batches), prefetch) as ahead:
            yield iter(ahead)


class _Transforming:
    """Calls the transform, and with parts of the batch where it fails."""

    def __init__(self, transform: Transform, names: tuple[str, ...], find_all: bool) -> None:
        self._transform = transform
        self._names = names
        self._find_all = find_all

    def __call__(self, arrays: Arrays) -> Batch:
        rows = len(arrays[0])
        parts: list[tuple[int, Arrays]] = []
        reasons: dict[int, str] = {}
        waiting = [(0, rows)]
        while waiting:
            start, stop = waiting.pop()
            try:
                cut = arrays
                if self._find_all:
                    cut = tuple(as_one_array(each[start:stop]) for each in arrays)
                elif (start, stop) != (0, rows):
                    cut = tuple(each[start:stop] for each in arrays)
                parts.append((start, self._made(cut)))
            except InputError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever the user's function raises
                if stop - start > 1:
                    half = (start + stop) // 2
                    waiting += [(half, stop), (start, half)]
                    continue
                reasons[start] = f"the transform failed: {type(error).__name__}: {error}"
                if not self._find_all:
                    return Batch((), rows, np.arange(0), reasons)
        if not reasons and len(parts) == 1:
            return Batch(parts[0][1], rows)
        parts, unusual = _of_one_kind(parts)
        if unusual and not self._find_all:
            raise InputError(next(iter(unusual.values())))
        reasons.update(unusual)
        kept = [np.arange(start, start + len(made[0])) for start, made in parts]
        joined = tuple(np.concatenate(each) for each in zip(*(made for _, made in parts)))  # noqa: B905
        return Batch(joined, rows, np.concatenate(kept) if kept else np.arange(0), reasons)

    def _made(self, arrays: Arrays) -> Arrays:
        made = self._transform(dict(zip(self._names, arrays, strict=True)))
        if not isinstance(made, Mapping) or not made:
            raise InputError(
                f"batch_transform gave {type(made).__name__}: it is to give a dict of the model's "
                "inputs, which goes by name and array"
            )
        inputs = tuple(np.asarray(each) for each in made.values())
        for name, each in zip(made, inputs, strict=True):
            if each.ndim == 0 or len(each) != len(arrays[0]):
                raise InputError(
                    f"batch_transform was given {len(arrays[0])} rows and gave {name!r} the shape "
                    f"{each.shape}: its first dimension is to be the rows"
                )
        return inputs


def _of_one_kind(
    parts: list[tuple[int, Arrays]],
) -> tuple[list[tuple[int, Arrays]], dict[int, str]]:
    """Leave out what the transform has made of some rows, if it cannot stand beside the rest."""
    counts: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for _, made in parts:
        counts[tuple(each.shape[1:] for each in made)] += len(made[0])
    if len(counts) < 2:
        return parts, {}
    ((usual, _),) = counts.most_common(1)
    kept, unusual = [], {}
    for start, made in parts:
        shapes = tuple(each.shape[1:] for each in made)
        if shapes == usual:
            kept.append((start, made))
            continue
        for row in range(start, start + len(made[0])):
            unusual[row] = (
                f"the transform gave the shape {', '.join(map(str, shapes))} for this row, and "
                f"{', '.join(map(str, usual))} for most rows of its batch"
            )
    return kept, unusual


# ---- processes


_pools: dict[tuple[bytes, int], ProcessPoolExecutor] = {}
"""Of this Python worker: the last one that was used."""


def _pool(calls: _Transforming, workers: int) -> ProcessPoolExecutor:
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
