"""The rows that travel with a run, from Spark's partition to files. Runs in: the task.

::

    <scratch>/data/0/<data set>/rows.arrow     an Arrow IPC stream, block after block as they came
                               /manifest.json  once all tasks have told what they got
                   1/...                       those of the task's next worker
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
from collections import defaultdict
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
    """Takes in the rows of all data sets that Spark brings to one task, see ``PIECE_SCHEMA``.

    `targets` are its workers' numbers among those of all tasks.
    """

    def __init__(
        self, data: Sequence[Travelling], targets: Sequence[int], batches: Iterator[pa.RecordBatch]
    ) -> None:
        self._data = data
        self._targets = targets
        self._batches = batches
        self._directories: list[Path] = []
        self._files: list[list[_BlockFile]] = []
        self._lengths = [no_lengths(each.columns) for each in data]
        self._meant_for: list[int] = []
        self._worker_of: defaultdict[int, int | None] = defaultdict(lambda: None)

    def take(self, scratch: Path) -> tuple[str, ...]:
        """Write the rows to files below the task's directory; return what the peers have to know.

        Raises a DataError if they could not be stored, by the task that computed them or this one.
        """
        self._directories = [scratch / "data" / str(i) for i in range(len(self._targets))]
        try:
            with contextlib.ExitStack() as opened:
                for directory in self._directories:
                    files = [_BlockFile(directory / it.identity, it.columns) for it in self._data]
                    self._files.append(files)
                    for file in files:
                        opened.enter_context(contextlib.closing(file))
                for batch in self._batches:
                    self._take(batch)
        except OSError as error:
            raise DataError(
                f"{socket.gethostname()} cannot write its ranks' rows to {scratch}: {error}. Every "
                "executor needs room for the rows of its ranks; Spark's local directories "
                "(spark.local.dir, SPARK_LOCAL_DIRS) say where"
            ) from error
        self._refuse_others()
        return tuple(
            json.dumps(
                [
                    {"rows": file.rows, "lengths": lengths}
                    for file, lengths in zip(files, self._lengths, strict=True)
                ]
            )
            for files in self._files
        )

    def finish(self, told: Sequence[str]) -> list[Path]:
        """Complete the data sets with what :meth:`take` returned on every task, by rank."""
        of_ranks = [json.loads(text) for text in told]
        for number, each in enumerate(self._data):
            rows_per_rank = tuple(of_rank[number]["rows"] for of_rank in of_ranks)
            columns = with_dims(each.columns, [of_rank[number]["lengths"] for of_rank in of_ranks])
            for files in self._files:
                file = files[number]
                manifest = Manifest(columns, (file.described(),), rows_per_rank)
                file.directory.joinpath(MANIFEST).write_text(manifest.to_json())
        return self._directories

    def _take(self, batch: pa.RecordBatch) -> None:
        numbers = batch.column("dataset").to_numpy()
        places = batch.column("place").to_numpy()
        begins = np.diff(numbers, prepend=CONTROL - 1) | np.diff(places, prepend=-1)
        borders = [*np.flatnonzero(begins).tolist(), len(numbers)]
        for start, end in itertools.pairwise(borders):
            pieces, number = batch.slice(start, end - start), int(numbers[start])
            if number == CONTROL:
                for text in pieces.column("data").to_pylist():
                    self._note(int(places[start]), json.loads(text))
            elif (worker := self._worker_of[int(places[start])]) is not None:
                self._files[worker][number].add(pieces)

    def _refuse_others(self) -> None:
        if sorted(self._meant_for) != list(self._targets):
            raise DataError(
                f"Spark brought the rows of ranks {sorted(self._meant_for)} to a task whose own "
                f"are {list(self._targets)}, because it does not partition by hash(): use a "
                "cache_dir"
            )

    def _note(self, place: int, control: dict[str, Any]) -> None:
        if "problem" in control:
            raise DataError(control["problem"])
        if "target" in control:
            target = int(control["target"])
            self._meant_for.append(target)
            is_own = target in self._targets
            self._worker_of[place] = self._targets.index(target) if is_own else None
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
