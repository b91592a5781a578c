"""Petastorm's converter, on top of horovodrunner.data. Runs in: the driver and the worker."""

from __future__ import annotations

import collections
import functools
import logging
import math
import os
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from horovodrunner import data
from horovodrunner.compat.petastorm.frames import transform_batch
from horovodrunner.compat.petastorm.options import ReaderOptions
from horovodrunner.compat.petastorm.reader import Reader, epochs, without_file_scheme
from horovodrunner.compat.petastorm.schema import Field, Schema
from horovodrunner.errors import ArgumentValueError, DataError
from horovodrunner.spark.dataframes import check_dataframe
from horovodrunner.spark.errors import told_as
from horovodrunner.validation import integer

if TYPE_CHECKING:
    import tensorflow as tf
    from pyspark.sql import DataFrame

__all__ = ["SparkDatasetConverter", "make_spark_converter"]

_log = logging.getLogger(__name__)
_CODECS = ("uncompressed", "bzip2", "gzip", "lz4", "snappy", "deflate")
_DEFAULT_THREADS = 4
_RANKS = (
    ("HOROVOD_RANK", "HOROVOD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)


def make_spark_converter(
    df: DataFrame | str,
    parquet_row_group_size_bytes: int = 32 * 2**20,
    compression_codec: str | None = None,
    dtype: str | None = "float32",
) -> SparkDatasetConverter:
    """Store a DataFrame for training.

    It is stored below what the conf ``petastorm.spark.converter.parentCacheDirUrl`` names, or else
    where :func:`horovodrunner.data.from_dataframe` does. Null floating-point numbers become NaN;
    nulls in other columns are an error.

    Parameters
    ----------
    df
        The DataFrame, or the URL of a directory with Parquet files.
    parquet_row_group_size_bytes, compression_codec
        Have no effect.
    dtype
        ``"float32"``, ``"float64"`` or None: what floating-point numbers become.

    Returns
    -------
    SparkDatasetConverter
        A small handle, for the closure of training code.

    Raises
    ------
    ConfigurationError
        If an argument has no valid value, or no place is known that executors reach.
    DataError
        If a column cannot be stored.
    """
    if compression_codec is not None and compression_codec.lower() not in _CODECS:
        raise ArgumentValueError(
            f"compression_codec={compression_codec!r}: it is None or one of {', '.join(_CODECS)}"
        )
    if isinstance(df, str):
        from pyspark.sql import SparkSession

        with told_as(DataError, f"df={df!r} cannot be read as Parquet files"):
            df = SparkSession.builder.getOrCreate().read.parquet(df)
    check_dataframe(df, takes_url=True)
    url = df.sparkSession.conf.get(SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF, None)
    place = None if url is None else without_file_scheme(url)
    with told_as(DataError, "the DataFrame cannot be analyzed"):
        nulls = {name: data.fill(math.nan) for name in _floats(df)}
    converter = SparkDatasetConverter(data.from_dataframe(df, place, dtype=dtype, nulls=nulls))
    if unfit := converter._columns(ReaderOptions()).unfit_names:
        _log.warning(
            "the columns %s cannot be fields of Petastorm's rows, which are namedtuples: "
            "make_tf_dataset will refuse them unless schema_fields leaves them out",
            ", ".join(map(repr, unfit)),
        )
    return converter


def _floats(df: DataFrame) -> Iterator[str]:
    """Name the columns of floating-point numbers, and of arrays of these."""
    for field in df.schema.fields:
        found: Any = field.dataType
        while hasattr(found, "elementType"):
            found = found.elementType
        if found.typeName() in ("float", "double"):
            yield field.name


class SparkDatasetConverter:
    """A stored DataFrame; made by :func:`make_spark_converter`, and small when pickled.

    Both ways to read take Petastorm's arguments; docs/petastorm.md lists those that have no effect,
    and those that are refused:

    batch_size : int
        Rows a batch of one shard has; 32 by default.
    num_epochs : int, optional
        How many times the rows come. None: without end, and every batch is full; the last one of
        each pass over the data is filled up with rows from its beginning. With a number each pass
        ends with a shorter batch of the rows that are left.
    cur_shard, shard_count : int, optional
        Which part to read, of how many: ``hvd.rank()`` and ``hvd.size()``. Everything by default.
        All shards have the same number of batches, at least
        ``len(converter) // (batch_size * shard_count)`` a pass. Where fewer rows are left for the
        last batch than there are shards, some shards get the same row.
    workers_count : int, optional
        How many threads transform batches; 4 by default.
    transform_spec : TransformSpec, optional
        Is given each batch as a pandas DataFrame.
    shuffle_row_groups, shuffle_rows : bool
    shuffling_queue_capacity : int
        Rows come in random order, unless these are False, False and 0.
    seed : int, optional
        Chooses the order. Without it each call gives another one, the same on all shards that call
        equally often.
    schema_fields : list of str, optional
        Regular expressions for the columns to read.

    They raise ConfigurationError if one has no valid value, and DataError if there are too few rows
    for the shards.
    """

    PARENT_CACHE_DIR_URL_CONF = "petastorm.spark.converter.parentCacheDirUrl"

    def __init__(self, stored: data.DataSet) -> None:
        self._stored = stored
        self._calls: collections.Counter[int | None] = collections.Counter()

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._stored)

    def __repr__(self) -> str:
        return f"SparkDatasetConverter({self._stored!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return SparkDatasetConverter, (self._stored,)

    @property
    def dataset_size(self) -> int:
        """How many rows there are."""
        return len(self)

    @property
    def cache_dir_url(self) -> str:
        """Where it is stored, not as Parquet."""
        location = self._stored.location
        return f"file://{location}" if location.startswith("/") else location

    def delete(self) -> None:
        """Delete what was stored; possible on the driver only."""
        self._stored.delete()

    def make_tf_dataset(
        self,
        batch_size: int | None = None,
        prefetch: int | None = None,
        num_epochs: int | None = None,
        workers_count: int | None = None,
        shuffling_queue_capacity: int | None = None,
        **petastorm_reader_kwargs: Any,
    ) -> AbstractContextManager[tf.data.Dataset]:
        """Read batches as a TensorFlow dataset, in a ``with`` statement.

        The dataset's elements are namedtuples of tensors by column name. `prefetch` batches are
        made ahead; TensorFlow decides by default. The other parameters are described at
        :class:`SparkDatasetConverter`.
        """
        options = self._options(num_epochs, workers_count, petastorm_reader_kwargs)
        reading = self._reading(options, batch_size, shuffling_queue_capacity)
        # -1: TensorFlow decides
        ahead = -1 if prefetch is None else integer("prefetch", prefetch, at_least=-1)
        row = self._schema(options).row_class
        # Repeated first and made ahead last: a prefetch below repeat() begins anew in each pass,
        # and each time TensorFlow takes its buffer from the same budget.
        batches = self._stored.tf(**reading, prefetch=0)
        rows = batches.map(lambda batch: row(*(batch[name] for name in row._fields)))
        return nullcontext(rows.repeat(options.num_epochs).prefetch(ahead))

    def make_torch_dataloader(
        self,
        batch_size: int | None = 32,
        num_epochs: int | None = None,
        workers_count: int | None = None,
        shuffling_queue_capacity: int = 0,
        data_loader_fn: Callable[..., Any] | None = None,
        **petastorm_reader_kwargs: Any,
    ) -> AbstractContextManager[Any]:
        """Read batches of torch tensors, in a ``with`` statement.

        The loader is an iterable of dicts of tensors by column name. A `data_loader_fn` is called
        with ``reader``, ``batch_size`` and ``shuffling_queue_capacity`` to make another loader;
        each pass then ends with a full batch. The other parameters are described at
        :class:`SparkDatasetConverter`.
        """
        options = self._options(num_epochs, workers_count, petastorm_reader_kwargs)
        reading = self._reading(options, batch_size, shuffling_queue_capacity)
        if data_loader_fn is None:
            return closing(_Loader(self._stored.torch(**reading), options.num_epochs))
        loader = _Loader(self._stored.numpy(**{**reading, "remainder": "pad"}), options.num_epochs)
        schema = self._schema(options)
        reader = _Reader(loader.batches, schema, options.num_epochs, options.seed, len(self))
        capacity = integer("shuffling_queue_capacity", shuffling_queue_capacity)
        return _own_loader(reader, data_loader_fn, reading["batch_size"], capacity)

    def _options(
        self, num_epochs: int | None, workers_count: int | None, others: dict[str, Any]
    ) -> ReaderOptions:
        threads = _DEFAULT_THREADS if workers_count is None else workers_count
        for name in ("filesystem", "storage_options"):
            others.pop(name, None)
        options = ReaderOptions.checked(
            {**others, "num_epochs": num_epochs, "workers_count": threads}
        )
        _warn_of_another_shard(options)
        return options

    def _columns(self, options: ReaderOptions) -> Schema:
        """Return the columns to read; a struct is one."""
        found: dict[str, Field] = {}
        fields = Schema.of_arrow(self._stored.schema).fields
        for column in self._stored._columns:
            top = column.path[0]
            found.setdefault(top, fields[column.name]._replace(name=top))
        return Schema(found.values()).matching(options.schema_fields)

    def _schema(self, options: ReaderOptions) -> Schema:
        columns = self._columns(options)
        spec = options.transform_spec
        return columns if spec is None else columns.transformed(spec)

    def _reading(
        self, options: ReaderOptions, batch_size: int | None, capacity: int | None
    ) -> dict[str, Any]:
        """Return the arguments of horovodrunner.data for these options."""
        rank, size = options.shard
        columns = self._columns(options)
        reading: dict[str, Any] = {
            "batch_size": 32 if batch_size is None else integer("batch_size", batch_size, 1),
            "shuffle": bool(options.shuffle_row_groups or options.shuffle_rows or capacity),
            "seed": self._calls[options.shard_count] if options.seed is None else options.seed,
            "remainder": "pad" if options.num_epochs is None else "split",
            "columns": list(columns.fields),
            "rank": rank,
            "size": size,
        }
        self._calls[options.shard_count] += 1
        if options.transform_spec is not None:
            reading["batch_transform"] = functools.partial(
                transform_batch, options.transform_spec, columns.transformed(options.transform_spec)
            )
            reading["threads"] = options.threads
        return reading


def _warn_of_another_shard(options: ReaderOptions) -> None:
    for rank_name, size_name in _RANKS:
        rank, size = os.environ.get(rank_name), os.environ.get(size_name)
        if rank is None and size is None:
            continue
        if (str(options.cur_shard), str(options.shard_count)) != (rank, size):
            _log.warning(
                "cur_shard=%s and shard_count=%s are not this process's rank %s and the number of "
                "ranks, %s: for a part of the rows on each rank give cur_shard=hvd.rank(), "
                "shard_count=hvd.size()",
                options.cur_shard,
                options.shard_count,
                rank,
                size,
            )
        return


class _Loader:
    """Iterates over the batches of some epochs."""

    def __init__(self, epoch: data.Batches[Any], num_epochs: int | None) -> None:
        self._epoch = epoch
        self._num_epochs = num_epochs
        self._running: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()

    def __iter__(self) -> Iterator[Any]:
        batches = self.batches()
        self._running.add(batches)
        return batches

    def batches(self) -> Generator[Any, None, None]:
        for _ in epochs(self._num_epochs):
            yield from self._epoch

    def close(self) -> None:
        """End all iterations, and their threads."""
        for batches in list(self._running):
            batches.close()


@contextmanager
def _own_loader(
    reader: Reader, make: Callable[..., Any], batch_size: int, capacity: int
) -> Iterator[Any]:
    with reader:
        yield make(reader=reader, batch_size=batch_size, shuffling_queue_capacity=capacity)


class _Reader(Reader):
    """What loaders of the user's own get: it can begin anew at any time."""

    def reset(self) -> None:
        self.last_row_consumed = True
        super().reset()
