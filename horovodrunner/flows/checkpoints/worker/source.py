"""Where the files of a checkpoint are read from, range by range. Runs in: the worker.

A path begins with ``rank-N/`` in a checkpoint of all ranks, and with nothing in one of rank 0's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from horovodrunner.flows.checkpoints.manifest import MANIFEST_NAME, Manifest

__all__ = [
    "DATA_NAME",
    "INDEX_NAME",
    "CopiesOfHost",
    "DirectorySource",
    "NearFirst",
    "Range",
    "Source",
]

DATA_NAME = "shards.bin"
INDEX_NAME = "shards.json"
"""Files of a rank that has parts of tensors: these, and what they are."""

Range = tuple[str, int, int]
"""Path, offset and number of bytes."""


class Source(Protocol):
    """The files of one checkpoint, wherever they are."""

    def files(self) -> Mapping[str, int]:
        """Return the size of every file, by its path."""

    def read(self, ranges: Sequence[Range]) -> list[memoryview]:
        """Return the bytes of each range, none of them shorter than asked for."""

    def content_of(self, path: str) -> str:
        """Return a file's SHA-256, or where nobody knows it, its path."""


class DirectorySource:
    """A checkpoint in a directory of this machine, with its manifest or without one."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._copies: Mapping[str, str] = {}
        self._hashes: Mapping[str, str] = {}
        if (path := self._directory / MANIFEST_NAME).is_file():
            manifest = Manifest.from_json(path.read_text())
            self._copies, self._hashes = manifest.copies, manifest.hashes

    def files(self) -> Mapping[str, int]:
        found = (path for path in self._directory.rglob("*") if path.is_file())
        sizes = {
            path.relative_to(self._directory).as_posix(): path.stat().st_size for path in found
        }
        return sizes | {path: sizes[stored] for path, stored in self._copies.items()}

    def read(self, ranges: Sequence[Range]) -> list[memoryview]:
        return [self._read(*each) for each in ranges]

    def content_of(self, path: str) -> str:
        return self._hashes.get(path, path)

    def _read(self, path: str, offset: int, length: int) -> memoryview:
        view = memoryview(bytearray(length))
        with (self._directory / self._copies.get(path, path)).open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < length:
                if not (count := file.readinto(view[done:])):
                    raise EOFError(
                        f"{path} ends at {offset + done} bytes, {length - done} bytes early"
                    )
                done += count
        return view


class CopiesOfHost:
    """Reads from directories that the ranks of a host share, one for each rank that has saved.

    `directory_of` fetches what a rank has saved, unless that has been done on this host.
    """

    def __init__(self, far: Source, directory_of: Callable[[int], Path]) -> None:
        self._far = far
        self._directory_of = directory_of
        self._near: dict[str, DirectorySource] = {}

    def files(self) -> Mapping[str, int]:
        return self._far.files()

    def content_of(self, path: str) -> str:
        return self._far.content_of(path)

    def read(self, ranges: Sequence[Range]) -> list[memoryview]:
        return [self._read(*each) for each in ranges]

    def _read(self, path: str, offset: int, length: int) -> memoryview:
        root, _, name = path.partition("/")
        if root not in self._near:
            self._near[root] = DirectorySource(self._directory_of(int(root.removeprefix("rank-"))))
        (view,) = self._near[root].read([(name, offset, length)])
        return view


class NearFirst:
    """Reads what a directory of this machine has from there, and the rest from where it is.

    The directory has the files whose paths begin with `prefix`, or some of them, or none.
    """

    def __init__(self, directory: Path, prefix: str, far: Source) -> None:
        self._near = DirectorySource(directory)
        self._here = {prefix + path for path in self._near.files()}
        self._prefix = prefix
        self._far = far

    def files(self) -> Mapping[str, int]:
        return self._far.files()

    def content_of(self, path: str) -> str:
        return self._far.content_of(path)

    def read(self, ranges: Sequence[Range]) -> list[memoryview]:
        near = [
            (path.removeprefix(self._prefix), offset, length)
            for path, offset, length in ranges
            if path in self._here
        ]
        far = [each for each in ranges if each[0] not in self._here]
        from_near = iter(self._near.read(near))
        from_far = iter(self._far.read(far) if far else ())
        return [next(from_near if each[0] in self._here else from_far) for each in ranges]
