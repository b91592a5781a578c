"""Rows become files of Arrow blocks. Runs in: a Spark task.

A file is an Arrow IPC stream, so any Arrow library reads it: the schema, then one record batch per
block. Where each block lies in its file is reported to the driver, so a reader maps just that.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from horovodrunner.data.columns import NO_ARRAYS, Column, Lengths, NullPolicy, merged, stored
from horovodrunner.errors import DataError
from horovodrunner.storage import open_storage

__all__ = [
    "BLOCK_BYTES",
    "END_OF_STREAM",
    "REPORT_SCHEMA",
    "BlockBuilder",
    "WriteJob",
    "no_lengths",
    "stored_schema",
    "write_rows",
]

BLOCK_BYTES = 8 * 2**20
"""About so large is a block; one row is at least one."""

REPORT_SCHEMA = "report string"
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True)
class WriteJob:
    """What every task that writes a data set is told.

    Parameters
    ----------
    location
        Directory or URL of the data set.
    columns
        What to store.
    nulls
        What becomes of nulls, by column name.
    """

    location: str
    columns: tuple[Column, ...]
    nulls: Mapping[str, NullPolicy] = field(default_factory=dict)


def stored_schema(columns: Sequence[Column]) -> pa.Schema:
    """Give the schema of the files.

    Parameters
    ----------
    columns
        What is stored.

    Returns
    -------
    pyarrow.Schema
        One field per column; the name is the column's, with the structs it is in.
    """
    return pa.schema([pa.field(each.name, each.stored_type(), nullable=False) for each in columns])


def no_lengths(columns: Sequence[Column]) -> list[list[Lengths]]:
    """Give the lengths that the arrays of no rows at all have.

    Parameters
    ----------
    columns
        What is stored.

    Returns
    -------
    list of list
        Of each column, at each level.
    """
    return [[NO_ARRAYS] * len(each.dims) for each in columns]


class BlockBuilder:
    """Collects rows until they make a block.

    Parameters
    ----------
    columns
        What to store.
    nulls
        What becomes of nulls, by column name.
    block_bytes
        About how large a block is to be.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        nulls: Mapping[str, NullPolicy],
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.schema = stored_schema(columns)
        self.lengths = no_lengths(columns)
        self._columns = columns
        self._nulls = nulls
        self._block_bytes = block_bytes
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_bytes = 0

    def add(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """Take rows.

        Parameters
        ----------
        batch
            Rows of the DataFrame.

        Yields
        ------
        pyarrow.RecordBatch
            Each block that is full now.

        Raises
        ------
        DataError
            If they cannot be stored.
        """
        if not batch.num_rows:
            return
        arrays, lengths = stored(batch, self._columns, self._nulls)
        self.lengths = merged(self.lengths, lengths)
        rows = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
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
        """Give what is left as a last block.

        Yields
        ------
        pyarrow.RecordBatch
            At most one.
        """
        if self._waiting:
            table = pa.Table.from_batches(self._waiting).combine_chunks()
            self._waiting, self._waiting_bytes = [], 0
            (block,) = table.to_batches()
            yield block


def write_rows(job: WriteJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Write one partition of a DataFrame; for ``mapInArrow``.

    Parameters
    ----------
    job
        What to write, and where.
    batches
        The partition's rows.

    Yields
    ------
    pyarrow.RecordBatch
        One row with a JSON report: the file, and its blocks; or the problem there was. Nothing for
        a partition without rows.
    """
    from pyspark import TaskContext

    context = TaskContext.get()
    number = context.partitionId() if context is not None else 0
    # Another attempt of the same task may be writing, too: the driver takes what is reported.
    name = f"part-{number:06d}-{uuid.uuid4().hex[:12]}.arrow"
    try:
        report = _write_file(job, name, batches)
    except DataError as error:
        report = {"problem": str(error)}
    if report:
        yield pa.RecordBatch.from_pydict({"report": [json.dumps({"part": number, **report})]})


def _write_file(job: WriteJob, name: str, batches: Iterator[pa.RecordBatch]) -> dict[str, Any]:
    place = open_storage(job.location)
    builder = BlockBuilder(job.columns, job.nulls)
    rows: list[int] = []
    offsets: list[int] = []
    ends: list[int] = []
    sink = None
    try:
        for block in _blocks(builder, batches):
            if sink is None:
                sink = place.create(name)
                header = builder.schema.serialize()
                sink.write(header)
                position = header.size
            message = block.serialize()
            rows.append(block.num_rows)
            offsets.append(position)
            sink.write(message)
            position += message.size
            ends.append(position)
        if sink is None:
            return {}
        sink.write(END_OF_STREAM)
        position += len(END_OF_STREAM)
        sink.close()
    except BaseException:
        if sink is not None:
            with contextlib.suppress(Exception):
                sink.close()
            with contextlib.suppress(OSError):
                place.remove_file(name)
        raise
    blocks = {"rows": rows, "offsets": offsets, "ends": ends}
    return {"file": name, "bytes": position, "lengths": builder.lengths, **blocks}


def _blocks(builder: BlockBuilder, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield from builder.add(batch)
    yield from builder.rest()
