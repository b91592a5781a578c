"""One rank's batches of an epoch. Runs in: the worker."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_args

import numpy as np
import pyarrow as pa

from horovodrunner import validation as checked
from horovodrunner.data.columns import Column
from horovodrunner.data.formats import Bounds, Format
from horovodrunner.data.order import EpochOrder
from horovodrunner.data.steps import EpochSteps, OwnRowsSteps, Remainder
from horovodrunner.data.stored import Block, BlockReader
from horovodrunner.deprecated import warn_renamed
from horovodrunner.errors import ArgumentValueError
from horovodrunner.prefetch import map_in_threads
from horovodrunner.processes.worker.context import current_context, log_to_driver

__all__ = ["Batches", "ReadOptions", "own_rank_and_size"]

_Batch = TypeVar("_Batch")

PIECE_BYTES = 8 * 2**20
"""About so much is gathered at once when rows come in random order; some three of them wait."""

_GATHERING_THREADS = 2
_STEPS_AT_ONCE = 2**16
_OLD_REMAINDERS = {"share": "split", "join": "uneven"}
_logged: set[str] = set()


@dataclass(frozen=True)
class ReadOptions:
    """Which rows a rank reads, and in what order; checked when it is made."""

    rank: int
    size: int
    batch_size: int
    shuffle: bool
    seed: int
    epoch: int
    remainder: Remainder
    shuffle_window: int

    def __post_init__(self) -> None:
        remainder: Any = self.remainder
        old = checked.plain(remainder)
        if isinstance(old, str) and old in _OLD_REMAINDERS:
            remainder = _OLD_REMAINDERS[old]
            warn_renamed(f'remainder="{old}"', f'remainder="{remainder}"', stacklevel=4)
        for name, value in {
            "batch_size": checked.integer("batch_size", self.batch_size, at_least=1),
            "shuffle": checked.boolean("shuffle", self.shuffle),
            "seed": checked.integer("seed", self.seed),
            "epoch": checked.integer("epoch", self.epoch, at_least=0),
            "remainder": checked.choice("remainder", remainder, get_args(Remainder)),
            "shuffle_window": checked.integer("shuffle_window", self.shuffle_window, at_least=1),
        }.items():
            object.__setattr__(self, name, value)


def own_rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks, from its environment."""
    for rank, size in (("HOROVOD_RANK", "HOROVOD_SIZE"), ("RANK", "WORLD_SIZE")):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


class Batches(Generic[_Batch]):
    """Iterates over one rank's batches, an epoch at a time.

    Each iteration is one epoch; the next one has another order when rows are shuffled. All ranks
    that iterate in the same way get rows that no other rank gets, and the same number of batches.
    """

    def __init__(
        self,
        reader: BlockReader,
        options: ReadOptions,
        make: Format,
        *,
        transform: Callable[[Any], Any] | None = None,
        threads: int = 0,
    ) -> None:
        self._reader = reader
        self._options = options
        self._make = make
        self._transform = transform
        self._threads = checked.integer("threads", threads, at_least=0)
        self.epoch = options.epoch
        self._start = 0
        self._current = self._steps(0)  # what cannot work is refused before anything is read
        self._taken = 0

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration, or the one that is going on, is in."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = checked.integer("epoch", epoch, at_least=0)

    def __len__(self) -> int:
        """Count this rank's batches of a whole epoch."""
        return len(self._steps(0))

    def __iter__(self) -> Iterator[_Batch]:
        """Iterate over an epoch, or over the rest of it after :meth:`load_state_dict`."""
        start, self._start = self._start, 0
        steps = self._current = self._steps(start)
        self._taken = 0
        self._log(steps)
        for number, batch in enumerate(self._batches(steps, 0, 1), 1):
            self._taken = number
            yield batch
        self.epoch += 1
        self._current, self._taken = self._steps(0), 0

    @property
    def columns(self) -> tuple[Column, ...] | None:
        """The columns of every batch; None when a transform makes something else."""
        return self._reader.columns if self._transform is None else None

    @property
    def rows_of_every_batch(self) -> int | None:
        """How many rows every batch has; None when the last one may have fewer."""
        may_be_short = self._steps(0).left_over or self._reader.manifest.rows_per_rank
        if self._options.remainder in ("split", "uneven") and may_be_short:
            return None
        return self._options.batch_size

    def first(self) -> _Batch:
        """Return the first batch of this epoch, without beginning it."""
        batches = self._batches(self._steps(0), 0, len(self))
        try:
            return next(batches)
        finally:
            batches.close()

    def state_dict(self) -> dict[str, int]:
        """Return how far the iteration has come.

        Returns
        -------
        dict
            ``epoch``, and ``position``: how many rows of it all ranks together have taken. The same
            on every rank, and all that :meth:`load_state_dict` needs, whatever the world's size.
            Of rows that travelled with the run, ``position`` counts each rank's own, and ``ranks``
            says how many ranks they were dealt out to.
        """
        state = {"epoch": self.epoch, "position": self._current.position_after(self._taken)}
        ranks = len(self._reader.manifest.rows_per_rank)
        return {**state, "ranks": ranks} if ranks else state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another iteration was: the next one gives what is left of that epoch.

        Parameters
        ----------
        state
            What :meth:`state_dict` gave, in this run or another, with any number of ranks; with
            the same number when the rows travel with the run.

        Raises
        ------
        ArgumentValueError
            If it is not such a state, or of a larger data set, or of rows that were dealt out in
            another way.
        """
        rows_per_rank = self._reader.manifest.rows_per_rank
        rows = max(rows_per_rank, default=self._reader.manifest.rows)
        try:
            epoch, position = (checked.integer(name, state[name]) for name in ("epoch", "position"))
            dealt_to = checked.integer("ranks", state.get("ranks", 0))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ArgumentValueError(
                f"{checked.shown(state)} is not what state_dict() gives: "
                f"{{'epoch': 0, 'position': 0}} ({error})"
            ) from error
        if epoch < 0 or not 0 <= position <= rows:
            raise ArgumentValueError(
                f"{state!r} cannot be gone on from: the data set has {rows} rows, so it is the "
                "state of another one"
            )
        if dealt_to != len(rows_per_rank):
            then, now = (
                f"dealt out to {ranks} ranks" if ranks else "read from storage that all ranks share"
                for ranks in (dealt_to, len(rows_per_rank))
            )
            raise ArgumentValueError(
                f"{state!r} cannot be gone on from: it is of rows that were {then}, and here they "
                f"are {now}, so that every rank has other rows. Begin the epoch anew: epoch={epoch}"
            )
        self.epoch = epoch
        self._start = position
        self._current, self._taken = self._steps(position), 0

    def _steps(self, start: int) -> EpochSteps:
        options, rows = self._options, self._reader.manifest.rows
        batch_size, remainder = options.batch_size, options.remainder
        if rows_per_rank := self._reader.manifest.rows_per_rank:
            return OwnRowsSteps(rows, batch_size, 0, 1, remainder, start, rows_per_rank)
        return EpochSteps(rows, batch_size, options.rank, options.size, remainder, start)

    def _log(self, steps: EpochSteps) -> None:
        """Log once how many rows each rank gets."""
        text = f"horovodrunner.data: {steps.summary()}"
        is_rank_0 = own_rank_and_size()[0] == 0
        if is_rank_0 and current_context() is not None and text not in _logged:
            _logged.add(text)
            log_to_driver(text)

    def _batches(self, steps: EpochSteps, first: int, stride: int) -> Generator[_Batch, None, None]:
        """Iterate over every `stride`-th batch from the `first` one on."""
        batches = self._untransformed(steps, range(first, len(steps), stride))
        if self._transform is None:
            return batches
        return map_in_threads(self._transform, batches, self._threads)

    def _untransformed(self, steps: EpochSteps, numbers: range) -> Generator[_Batch, None, None]:
        options, reader = self._options, self._reader
        order = EpochOrder(
            reader.block_rows,
            shuffle=options.shuffle,
            seed=options.seed,
            epoch=self.epoch,
            window_rows=max(1, options.shuffle_window // reader.row_bytes),
        )
        pieces = _in_random_order if options.shuffle else _in_stored_order
        for block, bounds in pieces(reader, order, steps, numbers):
            yield from self._make(block, reader.columns, bounds)


_Piece = tuple[Block, Bounds]


def _bounds_of(steps: EpochSteps, numbers: range) -> Iterator[tuple[Any, Any]]:
    """Yield where batches begin and end, as positions of the epoch, many at once."""
    for at in range(0, len(numbers), _STEPS_AT_ONCE):
        chosen = np.array(numbers[at : at + _STEPS_AT_ONCE], np.int64)
        starts = steps.start + chosen * steps.global_batch + steps.rank * steps.batch_size
        ends = starts + steps.batch_size
        for place in np.flatnonzero(chosen >= steps.whole).tolist():
            starts[place], ends[place] = steps.positions(int(chosen[place]))
        yield starts, ends


def _in_stored_order(
    reader: BlockReader, order: EpochOrder, steps: EpochSteps, numbers: range
) -> Iterator[_Piece]:
    """Yield blocks and the batches that lie within them; only batches across borders are copied."""
    open_block = functools.lru_cache(1)(reader.open)
    gather = _Gatherer(reader, order, most_open=2)
    block_starts = np.concatenate([[0], np.cumsum(reader.block_rows)])
    for starts, ends in _bounds_of(steps, numbers):
        first = np.searchsorted(block_starts, starts, side="right") - 1
        last = np.searchsorted(block_starts, ends - 1, side="right") - 1
        within = (first == last) & (ends <= order.rows)
        # a group is a row of batches within the same block, or one batch that crosses a border
        after_one = np.append(False, ~within[:-1])
        group = np.flatnonzero((np.diff(first, prepend=-1) != 0) | ~within | after_one)
        for begin, end in itertools.pairwise([*group.tolist(), len(first)]):
            if not within[begin]:
                yield gather((starts[begin:end], ends[begin:end]))
                continue
            index = int(first[begin])
            shift = block_starts[index]
            bounds = (starts[begin:end] - shift).tolist(), (ends[begin:end] - shift).tolist()
            yield open_block(index), list(zip(*bounds, strict=True))


class _Gatherer:
    """Copies the rows of a few batches from all over the data set; for several threads."""

    def __init__(self, reader: BlockReader, order: EpochOrder, most_open: int) -> None:
        self._order = order
        self._open = functools.lru_cache(most_open)(reader.open)
        self._opening = threading.Lock()  # a block is opened, and fetched from a URL, but once
        self._own = threading.local()

    def __call__(self, limits: tuple[Any, Any]) -> _Piece:
        """Copy block by block, in the order of the file, and then into the order of the epoch."""
        starts, ends = limits
        bounds = np.concatenate([[0], np.cumsum(ends - starts)])
        positions = np.repeat(starts - bounds[:-1], ends - starts) + np.arange(bounds[-1])
        blocks, chosen = self._order.by_block(positions)
        scratch: dict[str, Any] = self._own.__dict__
        others: dict[str, list[Any]] = {}
        start = 0
        for index, rows in blocks:
            with self._opening:
                block = self._open(index)
            end = start + len(rows)
            for name, array in block.dense.items():
                if name not in scratch or len(scratch[name]) < len(chosen):
                    scratch[name] = np.empty((len(chosen), *array.shape[1:]), array.dtype)
                array.take(rows, axis=0, out=scratch[name][start:end], mode="clip")
            for name, array in block.others.items():
                others.setdefault(name, []).append(array.take(pa.array(rows)))
            start = end
        piece = Block(
            {name: array.take(chosen, axis=0) for name, array in scratch.items()},
            {
                name: pa.concat_arrays(found).take(pa.array(chosen))
                for name, found in others.items()
            },
        )
        return piece, list(itertools.pairwise(bounds.tolist()))


def _in_random_order(
    reader: BlockReader, order: EpochOrder, steps: EpochSteps, numbers: range
) -> Iterator[_Piece]:
    """Let threads gather the rows of the next few batches while one is used."""
    batches = max(1, PIECE_BYTES // (reader.row_bytes * steps.batch_size))
    limits = (
        (starts[at : at + batches], ends[at : at + batches])
        for starts, ends in _bounds_of(steps, numbers)
        for at in range(0, len(starts), batches)
    )
    gather = _Gatherer(reader, order, most_open=2 * order.most_blocks_in_a_window)
    return map_in_threads(gather, limits, _GATHERING_THREADS)
