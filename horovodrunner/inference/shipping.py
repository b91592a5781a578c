"""Sends a model's file to the executors, once. Runs in: the driver."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovodrunner.inference.parcels import Parcel, Piece
from horovodrunner.spark.session import is_connect

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["Shipment"]

_PIECE_BYTES = 64 * 2**20
_SMALL = 64 * 1024
"""Bytes that travel in the function itself."""


class Shipment:
    """What one Spark application, or one session of Spark Connect, has of a model's file.

    Parameters
    ----------
    spark
        The session.
    path
        The file.
    digest
        Its SHA-256.
    """

    def __init__(self, spark: SparkSession, path: Path, digest: str) -> None:
        size = path.stat().st_size
        self._context: Any = None
        self._session_id: str | None = None
        self._broadcasts: list[Any] = []
        if size <= _SMALL:
            self.parcel = Parcel(digest, size, content=path.read_bytes())
        elif is_connect(spark):
            self._session_id = spark.session_id
            self.parcel = Parcel(digest, size, artifact=_add_artifact(spark, path, digest))
        else:
            self._context = spark.sparkContext
            for start in range(0, size, _PIECE_BYTES):
                piece = Piece(path, start, min(_PIECE_BYTES, size - start))
                self._broadcasts.append(self._context.broadcast(piece))
            self.parcel = Parcel(digest, size, pieces=tuple(self._broadcasts))

    def serves(self, spark: SparkSession) -> bool:
        """Tell whether a session finds the file where this put it.

        Parameters
        ----------
        spark
            The session.

        Returns
        -------
        bool
            False for one of another application.
        """
        if self._session_id is not None:
            return is_connect(spark) and spark.session_id == self._session_id
        return self._context is None or (
            not is_connect(spark)
            and spark.sparkContext is self._context
            and self._context._jsc is not None
        )

    def withdraw(self) -> None:
        """Let Spark delete it, on all executors; a stopped application has nothing left."""
        broadcasts, self._broadcasts = self._broadcasts, []
        for each in broadcasts:
            with contextlib.suppress(Exception):  # the JVM may be gone in any way
                if self._context._jsc is not None:
                    each.destroy()


def _add_artifact(spark: SparkSession, path: Path, digest: str) -> str:
    named = path.with_name(f"horovodrunner-model-{digest}")
    if not named.exists():
        try:
            os.link(path, named)
        except OSError:
            shutil.copyfile(path, named)
    spark.addArtifacts(str(named), file=True)
    return named.name
