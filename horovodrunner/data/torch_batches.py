"""Batches as torch tensors, with loader processes if wanted. Runs in: the worker."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from horovodrunner.data.batches import Batches, ReadOptions
from horovodrunner.data.formats import Format, numpy_batches
from horovodrunner.data.ragged import Ragged
from horovodrunner.data.steps import EpochSteps
from horovodrunner.data.stored import BlockReader

__all__ = ["TorchBatches", "as_tensors"]


def as_tensors(value: Any) -> Any:
    """Make tensors of NumPy arrays, within dicts, lists and tuples, too.

    Tensors share the arrays' memory. Dates become days, timestamps and intervals microseconds
    (int64); strings and bytes become lists.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "mM":
            value = value.view(np.int64)
        return value.tolist() if value.dtype.kind in "OUS" else torch.from_numpy(value)
    if isinstance(value, Ragged):
        return Ragged(as_tensors(value.values), as_tensors(value.offsets))
    if isinstance(value, dict):
        return {name: as_tensors(each) for name, each in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(as_tensors(each) for each in value)
    return value


class TorchBatches(Batches[Any], IterableDataset):  # type: ignore[misc]
    """One rank's batches as tensors; also a dataset for a DataLoader with ``batch_size=None``.

    `transform` is called with each batch of NumPy arrays, `collate_fn` with each one of tensors.
    `loader` are the arguments of a DataLoader that makes the batches; none without arguments.
    """

    def __init__(
        self,
        reader: BlockReader,
        options: ReadOptions,
        *,
        transform: Callable[[Any], Any] | None = None,
        threads: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        loader: dict[str, Any] | None = None,
    ) -> None:
        make: Format = numpy_batches
        if transform is None:
            make = functools.partial(numpy_batches, convert=as_tensors)
        if transform is not None or collate_fn is not None:
            transform = functools.partial(_transformed, transform, collate_fn)
        super().__init__(reader, options, make, transform=transform, threads=threads)
        self._loader = loader or {}

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:
            return super().__iter__()
        start, self._start = self._start, 0  # in a DataLoader's process: every n-th batch
        return super()._batches(self._steps(start), worker.id, worker.num_workers)

    def _batches(self, steps: EpochSteps, first: int, stride: int) -> Generator[Any, None, None]:
        if not self._loader:
            return super()._batches(steps, first, stride)
        return self._from_loader(steps)

    def _from_loader(self, steps: EpochSteps) -> Generator[Any, None, None]:
        epoch = copy.copy(self)
        epoch._start, epoch._loader = steps.start, {}
        with warnings.catch_warnings():
            # pin_memory without a GPU warns in every epoch; it has no effect then
            warnings.filterwarnings("ignore", message=".*pin_memory.*", category=UserWarning)
            batches = iter(DataLoader(epoch, batch_size=None, **self._loader))
        yield from batches


def _transformed(
    transform: Callable[[Any], Any] | None, collate_fn: Callable[[Any], Any] | None, batch: Any
) -> Any:
    if transform is not None:
        batch = as_tensors(transform(batch))
    return batch if collate_fn is None else collate_fn(batch)
