"""A DataFrame's rows, dealt out to the ranks as blocks in pieces. Runs in: a Spark task.

Spark hands rows to Python in batches that it counts, not weighs (maxRecordsPerBatch), so a block
travels as many small rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from horovodrunner.data.columns import Column, NullPolicy, merged
from horovodrunner.data.shares import dealt, first_target
from horovodrunner.data.writing import BlockBuilder
from horovodrunner.errors import DataError

__all__ = ["CONTROL", "PIECE_SCHEMA", "DealJob", "deal_rows"]

PIECE_SCHEMA = "place int, dataset int, part int, number int, rows int, data binary"
"""One piece of a block: the place decides which task gets it; sorted by dataset, part and number,
the data is one file; where a block begins, `rows` says how many it has, and elsewhere 0."""

CONTROL = -1
"""In the place of a data set's number: what the task has to know, as JSON."""

_MOST_BLOCK_BYTES = 4 * 2**20
_LEAST_BLOCK_BYTES = 64 * 2**10
_WAITING_BYTES = 64 * 2**20
"""So much may wait for its blocks to be full, for all targets together."""


@dataclass(frozen=True)
class DealJob:
    """What every task that deals out rows of one data set is told.

    Parameters
    ----------
    dataset
        Its number in the run.
    columns
        What to store of it.
    places
        For each target, the value that makes Spark bring a row there.
    piece_bytes
        How much of a block one row carries.
    nulls
        What becomes of nulls, by column name.
    """

    dataset: int
    columns: tuple[Column, ...]
    places: tuple[int, ...]
    piece_bytes: int
    nulls: Mapping[str, NullPolicy] = field(default_factory=dict)

    @property
    def block_bytes(self) -> int:
        """About how large a block is to be."""
        return min(_MOST_BLOCK_BYTES, max(_LEAST_BLOCK_BYTES, _WAITING_BYTES // len(self.places)))


def deal_rows(job: DealJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Deal out one partition of a DataFrame; for ``mapInArrow``.

    Parameters
    ----------
    job
        What to deal out, and to whom.
    batches
        The partition's rows.

    Yields
    ------
    pyarrow.RecordBatch
        Pieces, see ``PIECE_SCHEMA``; then which lengths the arrays have, or the problem there was.
    """
    from pyspark import TaskContext

    context = TaskContext.get()
    part = context.partitionId() if context is not None else 0
    targets = len(job.places)
    builders = [BlockBuilder(job.columns, job.nulls, job.block_bytes) for _ in range(targets)]
    numbers = [0] * targets
    next_target = first_target(part, targets)

    def pieces(target: int, blocks: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for block in blocks:
            batch = _pieces(job, target, part, numbers[target], block)
            numbers[target] += batch.num_rows
            yield batch

    try:
        for batch in batches:
            start = 0
            for target, count in enumerate(dealt(next_target, batch.num_rows, targets)):
                yield from pieces(target, builders[target].add(batch.slice(start, count)))
                start += count
            next_target = (next_target + batch.num_rows) % targets
        for target, builder in enumerate(builders):
            yield from pieces(target, builder.rest())
        lengths = functools.reduce(merged, (each.lengths for each in builders))
        found = {"dataset": job.dataset, "lengths": lengths}
    except DataError as error:
        found = {"problem": str(error)}
    yield _control(job.places[first_target(part, targets)], part, found)


def _pieces(
    job: DealJob, target: int, part: int, first_number: int, block: pa.RecordBatch
) -> pa.RecordBatch:
    message = block.serialize()
    count = -(-message.size // job.piece_bytes)
    offsets = np.minimum(np.arange(count + 1) * job.piece_bytes, message.size).astype(np.int32)
    rows = np.zeros(count, np.int32)
    rows[0] = block.num_rows
    return _batch(
        np.full(count, job.places[target], np.int32),
        np.full(count, job.dataset, np.int32),
        np.full(count, part, np.int32),
        np.arange(first_number, first_number + count, dtype=np.int32),
        rows,
        pa.Array.from_buffers(pa.binary(), count, [None, pa.py_buffer(offsets), message]),
    )


def _control(place: int, part: int, found: object) -> pa.RecordBatch:
    numbers = ([place], [CONTROL], [part], [0], [0])
    data = pa.array([json.dumps(found).encode()], pa.binary())
    return _batch(*(np.array(each, np.int32) for each in numbers), data)


def _batch(*columns: Sequence[int] | pa.Array) -> pa.RecordBatch:
    names = [each.split()[0] for each in PIECE_SCHEMA.split(", ")]
    return pa.RecordBatch.from_arrays([pa.array(each) for each in columns], names)
