"""Rows become files of Arrow blocks. Runs in: a Spark task.

A file is an Arrow IPC stream, so any Arrow library reads it: the schema, then one record batch per
block. Where each block lies in its file is reported to the driver, so a reader maps just that.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from horovodrunner.data.columns import Column, NullPolicy, merged, no_lengths, stored
from horovodrunner.data.stored import StoredFile
from horovodrunner.errors import DataError
from horovodrunner.storage import Storage, open_storage

__all__ = [
    "BLOCK_BYTES",
    "END_OF_STREAM",
    "REPORT_SCHEMA",
    "BlockBuilder",
    "partition_id",
    "write_rows",
]

BLOCK_BYTES = 8 * 2**20
"""About so large is a block; one row is at least one."""

REPORT_SCHEMA = "report string"
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class BlockBuilder:
    """Collects rows until they make a block of about `block_bytes`."""

    def __init__(
        self, columns: Sequence[Column], nulls: Mapping[str, NullPolicy], block_bytes: int
    ) -> None:
        self.lengths = no_lengths(columns)
        """Lengths of the arrays of all rows so far."""
        self._columns = columns
        self._nulls = nulls
        self._block_bytes = block_bytes
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_bytes = 0

    def add(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """Take rows of the DataFrame, and yield each block that is full now."""
        if not batch.num_rows:
            return
        rows, lengths = stored(batch, self._columns, self._nulls)
        self.lengths = merged(self.lengths, lengths)
        row_bytes = max(1, rows.nbytes // rows.num_rows)
        start = 0
        while start < rows.num_rows:
            fitting = max(1, (self._block_bytes - self._waiting_bytes) // row_bytes)
            piece = rows.slice(start, fitting)
            start += piece.num_rows
            self._waiting.append(piece)
            self._waiting_bytes += piece.num_rows * row_bytes
            if self._waiting_bytes + row_bytes > self._block_bytes:
                yield from self.rest()

    def rest(self) -> Iterator[pa.RecordBatch]:
        """Yield what is left as a last block."""
        if self._waiting:
            table = pa.Table.from_batches(self._waiting).combine_chunks()
            self._waiting, self._waiting_bytes = [], 0
            yield from table.to_batches()


def partition_id() -> int:
    """Return the number of the Spark partition that is worked on; 0 without Spark."""
    from pyspark import TaskContext

    context = TaskContext.get()
    return 0 if context is None else context.partitionId()


def write_rows(
    location: str,
    columns: Sequence[Column],
    nulls: Mapping[str, NullPolicy],
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Write one partition of a DataFrame to a data set's location; for ``mapInArrow``.

    Yields one row with a JSON report, of the file or of the problem there was; nothing for a
    partition without rows.
    """
    part = partition_id()
    # Another attempt of the same task may be writing, too: the driver takes what is reported.
    name = f"part-{part:06d}-{uuid.uuid4().hex[:12]}.arrow"
    builder = BlockBuilder(columns, nulls, BLOCK_BYTES)
    blocks = itertools.chain(
        itertools.chain.from_iterable(map(builder.add, batches)), builder.rest()
    )
    report: dict[str, Any] = {"part": part}
    try:
        first = next(blocks, None)
        if first is None:
            return
        file = _write_file(open_storage(location), name, itertools.chain([first], blocks))
        report |= {"file": asdict(file), "lengths": builder.lengths}
    except DataError as error:
        report["problem"] = str(error)
    yield pa.RecordBatch.from_pydict({"report": [json.dumps(report)]})


def _write_file(storage: Storage, name: str, blocks: Iterable[pa.RecordBatch]) -> StoredFile:
    rows: list[int] = []
    offsets: list[int] = []
    stream = storage.create(name)
    try:
        for block in blocks:
            if not offsets:
                header = block.schema.serialize()
                stream.write(header)
                offsets.append(header.size)
            message = block.serialize()
            stream.write(message)
            rows.append(block.num_rows)
            offsets.append(offsets[-1] + message.size)
        stream.write(END_OF_STREAM)
        stream.close()
    except BaseException:
        with contextlib.suppress(Exception):
            stream.close()
        with contextlib.suppress(OSError):
            storage.remove_file(name)
        raise
    return StoredFile(name, offsets[-1] + len(END_OF_STREAM), tuple(rows), tuple(offsets))
