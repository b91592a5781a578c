"""The rows that travel with a run, from Spark's partition to files. Runs in: the task.

::

    <scratch>/data/<data set>/rows.arrow       an Arrow IPC stream, block after block as they came
                             /manifest.json    once all tasks have told what they got
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from horovodrunner.data.columns import Column, merged, no_lengths, stored_schema, with_dims
from horovodrunner.data.distribution import CONTROL
from horovodrunner.data.stored import MANIFEST, Manifest, StoredFile
from horovodrunner.data.writing import END_OF_STREAM
from horovodrunner.errors import DataError

__all__ = ["TaskRows", "Travelling"]

_FILE = "rows.arrow"


@dataclass(frozen=True)
class Travelling:
    """A data set whose rows come with the barrier stage: its name among all, and its columns."""

    identity: str
    columns: tuple[Column, ...]


class TaskRows:
    """Takes in the rows of all data sets that Spark brings to one task, see ``PIECE_SCHEMA``."""

    def __init__(
        self, data: Sequence[Travelling], partition: int, batches: Iterator[pa.RecordBatch]
    ) -> None:
        self._data = data
        self._partition = partition
        self._batches = batches
        self._directory = Path()
        self._files: list[_BlockFile] = []
        self._lengths = [no_lengths(each.columns) for each in data]
        self._meant_for: list[int] = []

    def take(self, scratch: Path) -> str:
        """Write the rows to files below the task's directory; return what the peers have to know.

        Raises a DataError if they could not be stored, by the task that computed them or this one.
        """
        self._directory = scratch / "data"
        try:
            with contextlib.ExitStack() as opened:
                for each in self._data:
                    file = _BlockFile(self._directory / each.identity, each.columns)
                    self._files.append(opened.enter_context(contextlib.closing(file)))
                for batch in self._batches:
                    self._take(batch)
        except OSError as error:
            raise DataError(
                f"{socket.gethostname()} cannot write its ranks' rows to {scratch}: {error}. Every "
                "executor needs room for the rows of its ranks; Spark's local directories "
                "(spark.local.dir, SPARK_LOCAL_DIRS) say where"
            ) from error
        if self._meant_for != [self._partition]:
            raise DataError(
                f"Spark brought the rows of partitions {self._meant_for} to partition "
                f"{self._partition}, because it does not partition by hash(): use a cache_dir"
            )
        told = [
            {"rows": file.rows, "lengths": lengths}
            for file, lengths in zip(self._files, self._lengths, strict=True)
        ]
        return json.dumps(told)

    def finish(self, told: Sequence[str]) -> Path:
        """Complete the data sets with what :meth:`take` returned on every task, by rank."""
        of_ranks = [json.loads(text) for text in told]
        for number, (each, file) in enumerate(zip(self._data, self._files, strict=True)):
            rows_per_rank = tuple(of_rank[number]["rows"] for of_rank in of_ranks)
            lengths = [of_rank[number]["lengths"] for of_rank in of_ranks]
            manifest = Manifest(
                with_dims(each.columns, lengths), (file.described(),), rows_per_rank
            )
            file.directory.joinpath(MANIFEST).write_text(manifest.to_json())
        return self._directory

    def _take(self, batch: pa.RecordBatch) -> None:
        numbers = batch.column("dataset").to_numpy()
        borders = np.flatnonzero(np.diff(numbers, prepend=CONTROL - 1, append=CONTROL - 1))
        for start, end in itertools.pairwise(borders.tolist()):
            pieces, number = batch.slice(start, end - start), int(numbers[start])
            if number != CONTROL:
                self._files[number].add(pieces)
                continue
            for text in pieces.column("data").to_pylist():
                self._note(json.loads(text))

    def _note(self, control: dict[str, Any]) -> None:
        if "problem" in control:
            raise DataError(control["problem"])
        if "target" in control:
            self._meant_for.append(control["target"])
            return
        number = control["dataset"]
        self._lengths[number] = merged(self._lengths[number], control["lengths"])


class _BlockFile:
    """One data set's rows of this task, on their way to the disk."""

    def __init__(self, directory: Path, columns: Sequence[Column]) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.rows = 0
        self._block_rows: list[int] = []
        self._offsets: list[int] = []
        header = stored_schema(columns).serialize()
        self._file = (directory / _FILE).open("wb")
        self._file.write(header)
        self._end_of_blocks = header.size

    def add(self, pieces: pa.RecordBatch) -> None:
        data, rows = pieces.column("data"), pieces.column("rows").to_numpy()
        width = np.int64 if pa.types.is_large_binary(data.type) else np.int32
        _, offsets_buffer, values = data.buffers()
        offsets = np.frombuffer(offsets_buffer, width)[data.offset :][: len(data) + 1]
        begins = np.flatnonzero(rows)
        self._offsets += (self._end_of_blocks + offsets[begins] - offsets[0]).tolist()
        self._block_rows += rows[begins].tolist()
        self.rows += int(rows.sum())
        size = int(offsets[-1] - offsets[0])
        self._file.write(values.slice(int(offsets[0]), size))
        self._end_of_blocks += size

    def close(self) -> None:
        with self._file:
            self._file.write(END_OF_STREAM)

    def described(self) -> StoredFile:
        offsets = (*self._offsets, self._end_of_blocks)
        size = self._end_of_blocks + len(END_OF_STREAM)
        return StoredFile(_FILE, size, tuple(self._block_rows), offsets)
