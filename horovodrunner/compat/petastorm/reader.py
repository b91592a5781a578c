"""Reads Parquet files as they are, a row group at a time. Runs in: the worker."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from horovodrunner.compat.absent import PETASTORM, refuse_names
from horovodrunner.compat.petastorm.frames import arrays_of, transformed
from horovodrunner.compat.petastorm.options import ReaderOptions
from horovodrunner.compat.petastorm.schema import Schema
from horovodrunner.compat.petastorm.urls import as_path
from horovodrunner.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ConfigurationError,
    DataError,
)
from horovodrunner.prefetch import map_in_threads

__all__ = ["Reader", "make_batch_reader", "make_reader"]

__getattr__ = refuse_names("petastorm.reader", PETASTORM)


def make_reader(*arguments: Any, **options: Any) -> Any:
    """Refuse: Petastorm's own file format is not read here.

    Parameters
    ----------
    *arguments, **options
        Petastorm's.

    Raises
    ------
    ConfigurationError
        Always.
    """
    raise ConfigurationError(
        "make_reader reads data sets in Petastorm's own format (materialize_dataset, Unischema), "
        "which horovodrunner does not know. Plain Parquet is read by make_batch_reader(...), a "
        "Spark DataFrame by make_spark_converter(df); for the format itself pip install petastorm"
    )


def make_batch_reader(
    dataset_url_or_urls: str | Sequence[str],
    schema_fields: Sequence[str] | None = None,
    *,
    storage_options: dict[str, Any] | None = None,
    filesystem: Any = None,
    **options: Any,
) -> Reader:
    """Read Parquet files.

    Every shard gets the same number of rows. When they cannot be divided evenly, some come in two
    shards, fewer than there are shards.

    Parameters
    ----------
    dataset_url_or_urls
        URL of a directory, or URLs of files.
    schema_fields
        Regular expressions for the columns to read; None: all.
    storage_options
        What fsspec needs for them.
    filesystem
        Instead: a file system of pyarrow or fsspec, in which these are paths.
    **options
        See :class:`ReaderOptions`.

    Returns
    -------
    Reader
        Iterable of namedtuples of NumPy arrays, for a ``with`` block.

    Raises
    ------
    ConfigurationError
        If an argument has no valid value.
    DataError
        If the files cannot be read, or have fewer rows than there are shards.
    """
    checked = ReaderOptions.checked({"schema_fields": schema_fields, **options})
    import pyarrow as pa

    try:
        dataset = _opened(dataset_url_or_urls, storage_options, filesystem)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{dataset_url_or_urls!r} cannot be read as Parquet: {error}. Every host with a rank "
            "has to reach it"
        ) from error
    return Reader(dataset, checked)


def _opened(urls: str | Sequence[str], storage_options: Any, filesystem: Any) -> Any:
    import pyarrow.dataset

    paths = _listed(urls)
    if filesystem is None:
        opened = [as_path(url, storage_options) for url in paths]
        paths = [path for path, _ in opened]
        filesystem = opened[0][1]
    source = paths[0] if len(paths) == 1 else paths
    return pyarrow.dataset.dataset(
        source, filesystem=filesystem, format="parquet", partitioning="hive"
    )


def _listed(urls: Any) -> list[str]:
    found = [urls] if isinstance(urls, str) else urls
    if not isinstance(found, list | tuple) or not all(isinstance(each, str) for each in found):
        raise ArgumentTypeError(f"dataset_url_or_urls={urls!r}: give a URL, or a list of URLs")
    if not found or not all(found):
        raise ArgumentValueError(f"dataset_url_or_urls={urls!r} is empty: give at least one URL")
    return list(found)


@dataclass(frozen=True)
class _Piece:
    """Some consecutive rows of one row group."""

    group: Any
    start: int
    rows: int


class Reader:
    """Iterates over a shard's row groups.

    Parameters
    ----------
    dataset
        A data set of pyarrow.
    options
        What to read of it.

    Raises
    ------
    DataError
        If it has fewer rows than there are shards.
    """

    batched_output = True
    ngram = None

    def __init__(self, dataset: Any, options: ReaderOptions) -> None:
        self._options = options
        self._arrow_schema = dataset.schema
        self._stored = Schema.of_arrow(dataset.schema).matching(options.schema_fields)
        spec = options.transform_spec
        self.schema = self._stored if spec is None else self._stored.transformed(spec)
        self._row_class = self.schema.row_class
        groups = [
            _Piece(group, 0, group.row_groups[0].num_rows)
            for fragment in sorted(dataset.get_fragments(), key=lambda each: each.path)
            for group in fragment.split_by_row_group()
        ]
        self._pieces = _share([each for each in groups if each.rows], *options.shard)
        self._random = random.Random(options.seed)  # noqa: S311 - an order, no secret
        self.num_epochs = options.num_epochs
        self.seed = options.seed
        self.last_row_consumed = False
        self.stopped = False
        self._batches = self._epochs()

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Any:
        """Give the next row group as a namedtuple of NumPy arrays."""
        if self.stopped:
            raise DataError(
                "this reader was stopped, at the end of its with block perhaps: read within it"
            )
        try:
            return next(self._batches)
        except StopIteration:
            self.last_row_consumed = True
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def __len__(self) -> int:
        """Count the rows of one epoch of this shard."""
        return sum(piece.rows for piece in self._pieces)

    def reset(self) -> None:
        """Begin anew, once all epochs were read.

        Raises
        ------
        DataError
            In the middle.
        """
        if not self.last_row_consumed:
            raise DataError("a reader can be reset when all its rows were read, not before")
        self.last_row_consumed = False
        self._batches = self._epochs()

    def stop(self) -> None:
        """End reading."""
        self.stopped = True
        self._batches.close()

    def join(self) -> None:
        """Do nothing: :meth:`stop` waits for the threads."""

    def _epochs(self) -> Any:
        epochs = itertools.count() if self.num_epochs is None else range(self.num_epochs)
        return map_in_threads(self._read, self._in_order(epochs), self._options.threads)

    def _in_order(self, epochs: Any) -> Iterator[tuple[_Piece, int]]:
        """Yield the pieces to read, each with a seed of its own: threads may read in any order."""
        for _ in epochs:
            pieces = list(self._pieces)
            if self._options.shuffle_row_groups:
                self._random.shuffle(pieces)
            for piece in pieces:
                yield piece, self._random.getrandbits(64)

    def _read(self, piece_and_seed: tuple[_Piece, int]) -> Any:
        import numpy as np

        piece, seed = piece_and_seed
        columns = list(self._stored.fields)
        table = piece.group.to_table(schema=self._arrow_schema, columns=columns)
        frame = table.slice(piece.start, piece.rows).to_pandas()
        if self._options.shuffle_rows:
            chosen = np.random.default_rng(seed).permutation(len(frame))
            frame = frame.take(chosen).reset_index(drop=True)
        spec = self._options.transform_spec
        arrays = (
            arrays_of(frame, self.schema) if spec is None else transformed(frame, spec, self.schema)
        )
        return self._row_class(**arrays)


def _share(groups: list[_Piece], shard: int, shards: int) -> list[_Piece]:
    """Choose as many rows for each shard, which together are all rows."""
    rows = sum(group.rows for group in groups)
    if rows < shards:
        raise DataError(
            f"the files have {rows} rows, fewer than the {shards} shards: every rank needs at "
            "least one. Use fewer ranks or more data"
        )
    groups = [group for first in range(shards) for group in groups[first::shards]]
    start = shard * rows // shards
    end = start + -(-rows // shards)
    found = []
    position = 0
    for group in groups:
        first, last = max(start, position), min(end, position + group.rows)
        if first < last:
            found.append(_Piece(group.group, first - position, last - first))
        position += group.rows
    return found
