"""A DataFrame's rows, distributed to the tasks of a run as blocks in pieces. Runs in: a Spark task.

Spark hands rows to Python in batches that it counts, not weighs (maxRecordsPerBatch), so a block
travels as many small rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from horovodrunner.data.columns import Column, NullPolicy, merged
from horovodrunner.data.writing import BlockBuilder, partition_id
from horovodrunner.errors import DataError

__all__ = [
    "CONTROL",
    "PIECE_SCHEMA",
    "Distribution",
    "distribute_rows",
    "first_target",
    "rows_per_target",
]

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
class Distribution:
    """What every task that distributes rows of one data set is told."""

    dataset: int
    """Its number in the run."""
    columns: tuple[Column, ...]
    places: tuple[int, ...]
    """For each target, the value that makes Spark bring a row there."""
    piece_bytes: int
    """How much of a block one row carries."""
    nulls: Mapping[str, NullPolicy] = field(default_factory=dict)

    @property
    def block_bytes(self) -> int:
        """About how large a block is to be."""
        return min(_MOST_BLOCK_BYTES, max(_LEAST_BLOCK_BYTES, _WAITING_BYTES // len(self.places)))


def first_target(part: int, targets: int) -> int:
    """Return who gets the first row of a part, so that few rows in many parts go to all in turn.

    Examples
    --------
    >>> [first_target(part, 3) for part in range(9)]
    [0, 1, 2, 1, 2, 0, 2, 0, 1]
    """
    # Without the second term, a DataFrame with rows in every `targets`-th part would go to one.
    return (part + part // targets) % targets


def rows_per_target(first: int, count: int, targets: int) -> list[int]:
    """Count what each target gets of `count` rows when the first row goes to `first`.

    Examples
    --------
    >>> rows_per_target(first=2, count=5, targets=3)
    [2, 1, 2]
    """
    each, extra = divmod(count, targets)
    return [each + ((target - first) % targets < extra) for target in range(targets)]


def distribute_rows(
    job: Distribution, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Distribute one partition of a DataFrame; for ``mapInArrow``.

    Yields pieces, see ``PIECE_SCHEMA``; then which lengths the arrays have, or the problem there
    was.
    """
    part = partition_id()
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
            for target, count in enumerate(rows_per_target(next_target, batch.num_rows, targets)):
                yield from pieces(target, builders[target].add(batch.slice(start, count)))
                start += count
            next_target = (next_target + batch.num_rows) % targets
        for target, builder in enumerate(builders):
            yield from pieces(target, builder.rest())
        lengths = functools.reduce(merged, (each.lengths for each in builders))
        found = {"dataset": job.dataset, "lengths": lengths}
    except DataError as error:
        found = {"problem": str(error)}
    place = job.places[first_target(part, targets)]
    data = pa.array([json.dumps(found).encode()], pa.binary())
    yield _batch([place], [CONTROL], [part], [0], [0], data)


def _pieces(
    job: Distribution, target: int, part: int, first_number: int, block: pa.RecordBatch
) -> pa.RecordBatch:
    message = block.serialize()
    count = -(-message.size // job.piece_bytes)
    offsets = np.minimum(np.arange(count + 1) * job.piece_bytes, message.size).astype(np.int32)
    return _batch(
        [job.places[target]] * count,
        [job.dataset] * count,
        [part] * count,
        range(first_number, first_number + count),
        [block.num_rows] + [0] * (count - 1),
        pa.Array.from_buffers(pa.binary(), count, [None, pa.py_buffer(offsets), message]),
    )


def _batch(*columns: Any) -> pa.RecordBatch:
    *numbers, data = columns
    names = [each.split()[0] for each in PIECE_SCHEMA.split(", ")]
    arrays = [pa.array(each, pa.int32()) for each in numbers]
    return pa.RecordBatch.from_arrays([*arrays, data], names)
