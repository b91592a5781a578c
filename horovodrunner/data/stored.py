"""A data set as it is stored: the manifest, and blocks mapped into memory. Runs in: every process.

::

    <location>/manifest.json                    written last: without it there is no data set
              /part-000003-1f0c….arrow ...      Arrow IPC streams, one record batch per block

A block is mapped copy-on-write and only while it is used: what is done to a batch in place stays
with that batch, and memory holds pages that the kernel may drop. Behind a URL, blocks are first
copied to a directory of this host, which its processes share.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import math
import mmap
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from horovodrunner.data.columns import Column, stored_schema
from horovodrunner.errors import DataError
from horovodrunner.storage import LocalStorage, open_storage

__all__ = ["MANIFEST", "Block", "BlockReader", "Manifest", "StoredFile"]

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class StoredFile:
    """One file and its blocks."""

    name: str
    size: int
    """In bytes."""
    rows: tuple[int, ...]
    """How many rows each block has."""
    offsets: tuple[int, ...]
    """Where each block begins in the file, and the last one's end, in bytes."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> StoredFile:
        tuples = {name: tuple(fields[name]) for name in ("rows", "offsets")}
        return cls(fields["name"], fields["size"], **tuples)


@dataclass(frozen=True)
class Manifest:
    """What a data set consists of."""

    columns: tuple[Column, ...]
    files: tuple[StoredFile, ...]
    """In the order of their rows."""
    rows_per_rank: tuple[int, ...] = ()
    """When the files have one rank's rows; empty when they have all rows."""

    @property
    def rows(self) -> int:
        return sum(sum(each.rows) for each in self.files)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(each.size for each in self.files)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        fields = json.loads(text)
        return cls(
            tuple(map(Column.from_json, fields["columns"])),
            tuple(map(StoredFile.from_json, fields["files"])),
            tuple(fields["rows_per_rank"]),
        )


@dataclass(frozen=True)
class Block:
    """The rows of one block, or of parts of some."""

    dense: Mapping[str, Any]
    """NumPy arrays, shaped ``(rows, ...)``, by column name."""
    others: Mapping[str, pa.Array]
    """The columns that are not dense."""


class BlockReader:
    """Opens the blocks of a data set; `names` are the columns to read, None reads all."""

    def __init__(self, location: str, names: Sequence[str] | None = None) -> None:
        self._location = location
        self._storage = open_storage(location)
        self.manifest = self._read_manifest()
        columns = self.manifest.columns
        self.columns = tuple(each for each in columns if names is None or each.name in names)
        self._schema = stored_schema(columns)
        self._blocks = [
            (file.name, start, end)
            for file in self.manifest.files
            for start, end in zip(file.offsets, file.offsets[1:], strict=False)
        ]
        self.block_rows = np.array([n for file in self.manifest.files for n in file.rows], np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockReader, (self._location, [each.name for each in self.columns])

    @cached_property
    def row_bytes(self) -> int:
        """About how large a row is, with all its columns."""
        size = sum(end - start for _, start, end in self._blocks)
        return max(1, size // max(1, self.manifest.rows))

    def open(self, index: int) -> Block:
        """Map a block into memory.

        Writing into its dense arrays changes nothing but this mapping. Raises DataError if the file
        is gone or cannot be read.
        """
        name, start, end = self._blocks[index]
        try:
            if isinstance(self._storage, LocalStorage):
                return self._mapped(self._storage.root / name, start, end)
            path = self._host_copy.path(f"{index}.block")
            if not path.exists():
                self._host_copy.put(path, self._storage.read(name, start, end))
            return self._mapped(path, 0, end - start)
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            raise self._lost(f"{name}: {error}") from error

    def _mapped(self, path: Path, start: int, end: int) -> Block:
        page_start = start - start % mmap.ALLOCATIONGRANULARITY
        with path.open("rb") as file:
            mapping = mmap.mmap(
                file.fileno(), end - page_start, access=mmap.ACCESS_COPY, offset=page_start
            )
        mapping.madvise(mmap.MADV_WILLNEED)
        whole = pa.py_buffer(mapping)
        rows = pa.ipc.read_record_batch(whole.slice(start - page_start), self._schema)
        dense: dict[str, Any] = {}
        others: dict[str, pa.Array] = {}
        for column in self.columns:
            array = rows.column(self._schema.get_field_index(column.name))
            if column.is_dense:
                dense[column.name] = _numbers_in(mapping, whole.address, array, column)
            else:
                others[column.name] = array
        return Block(dense, others)

    @cached_property
    def _host_copy(self) -> _HostCopy:
        return _HostCopy(self._location.rstrip("/").rpartition("/")[2])

    def _read_manifest(self) -> Manifest:
        try:
            with contextlib.closing(self._storage.open(MANIFEST)) as file:
                return Manifest.from_json(file.read())
        except OSError as error:
            raise self._lost(str(error)) from error

    def _lost(self, why: str) -> DataError:
        return DataError(
            f"{socket.gethostname()} cannot read the data set at {self._location}: {why}. Either "
            "it was deleted (delete(), the end of the driver or of a with block), or this host "
            "does not see what others wrote there: give from_dataframe a cache_dir that every "
            "host reaches, or shared=False"
        )


def _numbers_in(mapping: mmap.mmap, address: int, array: pa.Array, column: Column) -> Any:
    """Return the numbers of a dense column as a view of the mapping, which can be written to."""
    shape = (len(array), *(length or 0 for length in column.dims))
    for _ in column.dims:
        array = array.values
    offset = array.buffers()[1].address - address
    numbers = np.frombuffer(mapping, array.type.to_pandas_dtype(), math.prod(shape), offset)
    if column.dtype == "datetime64[D]":
        numbers = numbers.astype(column.dtype)  # days are stored in half of NumPy's width
    return numbers.view(column.dtype).reshape(shape)


class _HostCopy:
    """A directory with blocks that were read from a URL, for all processes of this host.

    Each of them holds a shared lock; the last one that leaves deletes it.
    """

    def __init__(self, name: str) -> None:
        self._directory = Path(tempfile.gettempdir(), f"{name}-{getpass.getuser()}")
        lock = self._locked()
        weakref.finalize(self, _leave, self._directory, lock, os.getpid())

    def _locked(self) -> int:
        while True:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            try:
                lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            except FileNotFoundError:
                continue  # somebody is just deleting it
            fcntl.flock(lock, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), (self._directory / "lock").stat()):
                    return lock
            os.close(lock)

    def path(self, name: str) -> Path:
        return self._directory / name

    def put(self, path: Path, data: bytes) -> None:
        handle, temporary = tempfile.mkstemp(dir=self._directory)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _leave(directory: Path, lock: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked process shares its parent's lock
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    os.close(lock)
