"""How the bytes of a model's file travel. Runs in: the driver and Spark's Python workers."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from horovodrunner.errors import ConfigurationError

__all__ = ["Parcel", "Piece"]

_receiving = threading.local()


@dataclass(frozen=True)
class Parcel:
    """A model's file, as the Python workers find it.

    Parameters
    ----------
    digest
        Its SHA-256.
    size
        Its bytes.
    content
        The file itself, when it is small.
    pieces
        Spark's broadcast variables, whose values are :class:`Piece`.
    artifact
        The name that Spark Connect's executors have it under.
    """

    digest: str
    size: int
    content: bytes | None = None
    pieces: tuple[Any, ...] = ()
    artifact: str | None = None

    def write_to(self, file: BinaryIO) -> None:
        """Write the whole file.

        Parameters
        ----------
        file
            Gets the pieces, one after the other.

        Raises
        ------
        ConfigurationError
            If there is less or more of it than the driver sent.
        """
        for piece in self.pieces:
            with _receive(file):
                value = piece.value
            if value is None:  # it is to be written again if the model is loaded again
                vars(piece).pop("_value", None)
            else:  # with encryption Spark reads all values before anybody asks for them
                file.write(value)
        file.flush()
        size = os.fstat(file.fileno()).st_size
        if size != self.size:
            raise ConfigurationError(
                f"of the model's {self.size} bytes {size} arrived: was it deleted on the driver?"
            )

    def artifact_path(self) -> Path | None:
        """Find the file that Spark Connect put on this executor, if it did."""
        if self.artifact is None:
            return None
        from pyspark import SparkFiles

        return Path(SparkFiles.getRootDirectory()) / self.artifact


class Piece:
    """A part of a file. Pickling it reads the part, unpickling writes it where it is received.

    So the value of a broadcast variable, which a Python worker would keep, is nothing.
    """

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._path = path
        self._start = start
        self._size = size

    def __reduce__(self) -> tuple[Callable[[bytes], bytes | None], tuple[bytes]]:
        with self._path.open("rb") as file:
            file.seek(self._start)
            return _write_piece, (file.read(self._size),)


@contextlib.contextmanager
def _receive(file: BinaryIO) -> Iterator[None]:
    _receiving.file = file
    try:
        yield
    finally:
        _receiving.file = None


def _write_piece(data: bytes) -> bytes | None:
    file = getattr(_receiving, "file", None)
    if file is None:
        return data
    file.write(data)
    return None
