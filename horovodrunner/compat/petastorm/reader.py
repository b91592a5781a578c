"""Reads Parquet files as they are, a row group at a time. Runs in: the worker."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from horovodrunner.compat.absent import PETASTORM, refuse_names
from horovodrunner.compat.petastorm.frames import arrays_of, transformed
from horovodrunner.compat.petastorm.options import ReaderOptions
from horovodrunner.compat.petastorm.schema import Schema
from horovodrunner.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ConfigurationError,
    DataError,
)
from horovodrunner.prefetch import map_in_threads
from horovodrunner.storage import is_url, local_path, open_file_system, path_of_file_url

__all__ = ["Reader", "epochs", "make_batch_reader", "make_reader", "without_file_scheme"]

__getattr__ = refuse_names("petastorm.reader", PETASTORM)


def make_reader(*arguments: Any, **options: Any) -> Any:
    """Refuse: Petastorm's own file format is not read here."""
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
        Petastorm's, as docs/petastorm.md lists them.

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
    groups = _RowGroups(dataset, checked)
    return Reader(groups.read, groups.schema, checked.num_epochs, checked.seed, groups.rows)


def _opened(urls: str | Sequence[str], storage_options: Any, filesystem: Any) -> Any:
    import pyarrow.dataset

    paths = _listed(urls)
    if filesystem is None:
        opened = [_path_of(url, storage_options) for url in paths]
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


def _path_of(url: str, storage_options: dict[str, Any] | None) -> tuple[str, Any]:
    """Return a path and the file system of fsspec's it is in; None for the local one."""
    path = without_file_scheme(url)
    if not is_url(path):
        return str(local_path(path)), None
    filesystem, path = open_file_system(path, **(storage_options or {}))
    return path, filesystem


def without_file_scheme(url: str) -> str:
    """Return the path that a ``file:`` URL names, and anything else as it is.

    Examples
    --------
    >>> without_file_scheme("file:///dbfs/tmp/cache"), without_file_scheme("s3://bucket/cache")
    ('/dbfs/tmp/cache', 's3://bucket/cache')
    """
    path = path_of_file_url(url)
    return url if path is None else unquote(path)


def epochs(number: int | None) -> Iterator[int]:
    return itertools.count() if number is None else iter(range(number))


class Reader:
    """Iterates over namedtuples of NumPy arrays by column name, and can begin anew.

    `read` begins to iterate over their values, by column name.
    """

    batched_output = True
    ngram = None

    def __init__(
        self,
        read: Callable[[], Generator[dict[str, Any], None, None]],
        schema: Schema,
        num_epochs: int | None,
        seed: int | None,
        rows: int,
    ) -> None:
        self.schema = schema
        self.num_epochs = num_epochs
        self.seed = seed
        self.last_row_consumed = False
        self.stopped = False
        self._row_class = schema.row_class
        self._rows = rows
        self._read = read
        self._batches = read()

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Any:
        if self.stopped:
            raise DataError(
                "this reader was stopped, at the end of its with block perhaps: read within it"
            )
        try:
            return self._row_class(**next(self._batches))
        except StopIteration:
            self.last_row_consumed = True
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __len__(self) -> int:
        """Count the rows of one epoch of this shard."""
        return self._rows

    def reset(self) -> None:
        """Begin anew, once all epochs were read."""
        if not self.last_row_consumed:
            raise DataError("a reader can be reset when all its rows were read, not before")
        self.last_row_consumed = False
        self._batches = self._read()

    def stop(self) -> None:
        """End reading, and its threads."""
        self.stopped = True
        self._batches.close()

    def join(self) -> None:
        """Return at once: :meth:`stop` waits for the threads."""


@dataclass(frozen=True)
class _Piece:
    """Some consecutive rows of one row group."""

    group: Any
    start: int
    rows: int


class _RowGroups:
    """A shard's row groups of a data set of pyarrow."""

    def __init__(self, dataset: Any, options: ReaderOptions) -> None:
        self._options = options
        self._arrow_schema = dataset.schema
        self._stored = Schema.of_arrow(dataset.schema).matching(options.schema_fields)
        spec = options.transform_spec
        self.schema = self._stored if spec is None else self._stored.transformed(spec)
        groups = [
            _Piece(group, 0, group.row_groups[0].num_rows)
            for fragment in sorted(dataset.get_fragments(), key=lambda each: each.path)
            for group in fragment.split_by_row_group()
        ]
        self._pieces = _of_shard([each for each in groups if each.rows], *options.shard)
        self.rows = sum(piece.rows for piece in self._pieces)
        self._random = random.Random(options.seed)  # noqa: S311 - an order, no secret

    def read(self) -> Generator[dict[str, Any], None, None]:
        """Iterate over all epochs."""
        return map_in_threads(self._arrays, self._in_order(), self._options.threads)

    def _in_order(self) -> Iterator[tuple[_Piece, int]]:
        """Yield the pieces to read, each with a seed of its own: threads may read in any order."""
        for _ in epochs(self._options.num_epochs):
            pieces = list(self._pieces)
            if self._options.shuffle_row_groups:
                self._random.shuffle(pieces)
            for piece in pieces:
                yield piece, self._random.getrandbits(64)

    def _arrays(self, piece_and_seed: tuple[_Piece, int]) -> dict[str, Any]:
        import numpy as np

        piece, seed = piece_and_seed
        columns = list(self._stored.fields)
        table = piece.group.to_table(schema=self._arrow_schema, columns=columns)
        frame = table.slice(piece.start, piece.rows).to_pandas()
        if self._options.shuffle_rows:
            chosen = np.random.default_rng(seed).permutation(len(frame))
            frame = frame.take(chosen).reset_index(drop=True)
        spec = self._options.transform_spec
        if spec is None:
            return arrays_of(frame, self.schema)
        return transformed(frame, spec, self.schema)


def _of_shard(groups: list[_Piece], shard: int, shards: int) -> list[_Piece]:
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
