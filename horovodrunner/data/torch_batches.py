"""Batches as torch tensors, with loader processes if wanted. Runs in: the worker."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from horovodrunner.data.batches import Batches, ReadOptions
from horovodrunner.data.formats import NumpyFormat
from horovodrunner.data.order import EpochSteps
from horovodrunner.data.ragged import Ragged
from horovodrunner.data.stored import BlockReader

__all__ = ["TorchBatches", "as_tensors"]


def as_tensors(value: Any) -> Any:
    """Make tensors of NumPy arrays, within dicts, lists and tuples, too.

    Parameters
    ----------
    value
        What a batch, or a transform's result, consists of.

    Returns
    -------
    object
        Tensors share the arrays' memory. Dates become days, timestamps and intervals microseconds
        (int64); strings and bytes become lists.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "mM":
            value = value.view(np.int64)
        if value.dtype.kind in "OUS":
            return value.tolist()
        return torch.from_numpy(value)
    if isinstance(value, Ragged):
        return Ragged(as_tensors(value.values), as_tensors(value.offsets))
    if isinstance(value, dict):
        return {name: as_tensors(each) for name, each in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(as_tensors(each) for each in value)
    return value


class TorchBatches(Batches[Any], IterableDataset):  # type: ignore[misc]
    """One rank's batches as tensors; also a dataset for a DataLoader with ``batch_size=None``.

    Parameters
    ----------
    reader
        Opens the blocks.
    options
        Which rows, and in what order.
    transform
        Called with each batch of NumPy arrays.
    threads
        How many threads call it.
    collate_fn
        Called with each batch of tensors.
    loader
        Arguments for a DataLoader that makes the batches: num_workers, pin_memory and so on.
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
        convert = as_tensors if transform is None else _unchanged
        self._loader = loader or {}
        if transform is not None or collate_fn is not None:
            transform = _Chain(transform, collate_fn)
        super().__init__(
            reader,
            options,
            NumpyFormat(reader.columns, convert),
            transform=transform,
            threads=threads,
        )

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is None:
            return super().__iter__()
        start, self._start = self._start, 0  # in a process of somebody's own DataLoader
        return self.part(self._steps(start))

    def part(self, steps: EpochSteps) -> Generator[Any, None, None]:
        """Iterate over what this process makes of an epoch: all of it, or a loader process's share.

        Parameters
        ----------
        steps
            The epoch.

        Returns
        -------
        generator
            Every n-th batch in one of n loader processes.
        """
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return super()._batches(steps, first, stride)

    def _batches(self, steps: EpochSteps, first: int, stride: int) -> Generator[Any, None, None]:
        if not self._loader:
            return super()._batches(steps, first, stride)
        return self._from_loader(steps)

    def _from_loader(self, steps: EpochSteps) -> Generator[Any, None, None]:
        with warnings.catch_warnings():
            # pin_memory without a GPU warns in every epoch; it has no effect then
            warnings.filterwarnings("ignore", message=".*pin_memory.*", category=UserWarning)
            batches = iter(DataLoader(_Epoch(self, steps), batch_size=None, **self._loader))
        yield from batches


class _Epoch(IterableDataset):  # type: ignore[misc]
    """What a DataLoader of ours iterates over."""

    def __init__(self, batches: TorchBatches, steps: EpochSteps) -> None:
        self._batches = batches
        self._steps = steps

    def __iter__(self) -> Iterator[Any]:
        return self._batches.part(self._steps)


def _unchanged(value: Any) -> Any:
    return value


class _Chain:
    """Transform, tensors, collate: picklable, for loader processes that are spawned."""

    def __init__(
        self, transform: Callable[[Any], Any] | None, collate_fn: Callable[[Any], Any] | None
    ) -> None:
        self._transform = transform
        self._collate = collate_fn

    def __call__(self, batch: Any) -> Any:
        if self._transform is not None:
            batch = as_tensors(self._transform(batch))
        return batch if self._collate is None else self._collate(batch)
