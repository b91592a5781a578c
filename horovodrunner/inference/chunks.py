"""How a model's file travels: in chunks, once. Runs in: the driver and Spark's Python workers."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from horovodrunner.errors import ConfigurationError
from horovodrunner.inference.host_copy import local_directory
from horovodrunner.spark.session import is_connect

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["Chunk", "SentFile", "Shipment"]

_CHUNK_BYTES = 64 * 2**20
_SMALL = 64 * 1024
"""Bytes that travel in the function itself."""

_receiving = threading.local()


@dataclass(frozen=True)
class SentFile:
    """A file as the Python workers find it."""

    digest: str
    size: int
    content: bytes | None = None
    """The file itself, when it is small."""
    chunks: tuple[Any, ...] = ()
    """Else Spark's broadcast variables, whose values are `Chunk`."""
    artifact: str | None = None
    """Or the name that Spark Connect's executors have it under."""

    def open(self) -> BinaryIO:
        """Return the complete file, which may have no name."""
        if self.artifact is not None:
            from pyspark import SparkFiles

            return Path(SparkFiles.getRootDirectory(), self.artifact).open("rb")
        with contextlib.ExitStack() as unless_complete:
            file = cast(BinaryIO, tempfile.TemporaryFile(dir=local_directory()))  # noqa: SIM115
            unless_complete.callback(file.close)
            self._write_to(file)
            unless_complete.pop_all()
        return file

    def _write_to(self, file: BinaryIO) -> None:
        for chunk in self.chunks:
            _receiving.file = file
            try:
                value = chunk.value
            finally:
                _receiving.file = None
            if value is None:  # it is to be written again if the model is loaded again
                vars(chunk).pop("_value", None)
            else:  # with encryption Spark reads all values before anybody asks for them
                file.write(value)
        file.flush()
        size = os.fstat(file.fileno()).st_size
        if size != self.size:
            raise ConfigurationError(
                f"of the model's {self.size} bytes {size} arrived: was it deleted on the driver?"
            )


class Chunk:
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
            return _write_chunk, (file.read(self._size),)


def _write_chunk(data: bytes) -> bytes | None:
    file = getattr(_receiving, "file", None)
    if file is None:
        return data
    file.write(data)
    return None


class Shipment:
    """A file on its way to the executors of an application, or of a session of Spark Connect."""

    def __init__(self, spark: SparkSession, path: Path, digest: str) -> None:
        size = path.stat().st_size
        self._context: Any = None
        self._session_id: str | None = None
        chunks: tuple[Any, ...] = ()
        content = artifact = None
        if size <= _SMALL:
            content = path.read_bytes()
        elif is_connect(spark):
            self._session_id = spark.session_id
            artifact = _add_artifact(spark, path, digest)
        else:
            self._context = spark.sparkContext
            chunks = tuple(
                self._context.broadcast(Chunk(path, start, min(_CHUNK_BYTES, size - start)))
                for start in range(0, size, _CHUNK_BYTES)
            )
        self.file = SentFile(digest, size, content, chunks, artifact)

    def serves(self, spark: SparkSession) -> bool:
        """Whether a session finds the file where this put it."""
        if self._session_id is not None:
            return is_connect(spark) and spark.session_id == self._session_id
        return self._context is None or (
            not is_connect(spark)
            and spark.sparkContext is self._context
            and self._context._jsc is not None
        )

    def withdraw(self) -> None:
        """Let Spark delete it, on all executors; a stopped application has nothing left."""
        for chunk in self.file.chunks:
            with contextlib.suppress(Exception):  # the JVM may be gone in any way
                if self._context._jsc is not None:
                    chunk.destroy()


def _add_artifact(spark: SparkSession, path: Path, digest: str) -> str:
    named = path.with_name(f"horovodrunner-model-{digest}")
    if not named.exists():
        try:
            os.link(path, named)
        except OSError:
            shutil.copyfile(path, named)
    spark.addArtifacts(str(named), file=True)
    return named.name
