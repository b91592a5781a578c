"""The handle of a data set that travels with the run. Runs in: the driver and the worker."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovodrunner.data.columns import Column, NullPolicy
from horovodrunner.data.dataset import DataSet
from horovodrunner.data.formats import arrow_schema
from horovodrunner.data.stored import BlockReader
from horovodrunner.errors import ArgumentValueError, DataError
from horovodrunner.pickling.payload import attach
from horovodrunner.placement.environment import DATA_DIRECTORY

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame

__all__ = ["UnsharedDataSet"]


class UnsharedDataSet(DataSet):
    """A data set whose rows each run computes and distributes to its ranks.

    Made by ``from_dataframe(df, shared=False)``. The driver's handle has the DataFrame; what main
    gets has the name alone, by which it finds what the task has written. How long the columns'
    arrays are is not known yet.
    """

    def __init__(
        self,
        identity: str,
        columns: tuple[Column, ...],
        source: DataFrame | None = None,
        nulls: Mapping[str, NullPolicy] | None = None,
    ) -> None:
        super().__init__("", 0, columns)
        self.identity = identity
        self.columns = columns
        self.source = source
        self.nulls = nulls or {}

    def __len__(self) -> int:
        """Count the rows of all ranks."""
        manifest = self._whole.manifest
        return sum(manifest.rows_per_rank) or manifest.rows

    def __bool__(self) -> bool:
        """Return True, also where its rows cannot be counted."""
        return True

    def __repr__(self) -> str:
        return f"DataSet({len(self.columns)} columns, travels with each run)"

    def __reduce__(self) -> tuple[Any, ...]:
        attach(self.identity, self)
        return UnsharedDataSet, (self.identity, self.columns)

    @property
    def location(self) -> str:
        """Directory of this rank's rows."""
        directory = os.environ.get(DATA_DIRECTORY, "")
        path = Path(directory, self.identity)
        if not directory or not path.is_dir():
            raise DataError(
                "the rows of from_dataframe(df, shared=False) are there only in the run that they "
                "travel with: give the data set to HorovodRunner(...).run(main, train=train), or "
                "let main refer to it, and read it inside main"
            )
        return str(path)

    @property
    def schema(self) -> pa.Schema:
        """What :meth:`arrow` gives; known in a run only."""
        return arrow_schema(self._whole.manifest.columns)

    def delete(self) -> None:
        """Return: what a run has written goes with the run."""

    @cached_property
    def _whole(self) -> BlockReader:
        return BlockReader(self.location)

    def _rank_and_size(self, rank: int | None, size: int | None) -> tuple[int, int]:
        if rank is not None or size is not None:
            raise ArgumentValueError(
                f"rank={rank!r}, size={size!r}: with shared=False each rank has rows of its own "
                "already; leave both out"
            )
        return super()._rank_and_size(None, None)
