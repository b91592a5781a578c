"""Parquet files that Spark's Python workers read by themselves, past the JVM.

Runs in: the driver (`plain_scan`, `parts_dataframe`) and Spark's Python workers (`read_parts`).

A DataFrame that is nothing but ``spark.read.parquet(path)``, or a selection of its columns, has the
rows of its files: pyarrow then gives them to a Python worker several times as fast as Spark does,
which decodes them in the JVM and sends them over a socket. Whether a DataFrame is such a scan is
asked of Spark: the driver makes the scan that it would be, and takes it for one only if
``DataFrame.sameSemantics`` says that the two are the same. Whatever is not known to be safe is left
to Spark.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from horovodrunner.errors import DataError
from horovodrunner.spark.column_names import as_written

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import DataType, StructType

__all__ = ["FilePart", "FileScan", "parts_dataframe", "plain_scan", "read_parts"]

MAX_FILES = 1000
"""The driver reads every file's footer before the job starts: about 1 ms each."""
FOOTER_THREADS = 16
PARTITION_BYTES = 128 * 1024 * 1024
"""No partition is made larger, as far as row groups allow: Spark's maxPartitionBytes."""
BATCH_ROWS = 10_000
BATCH_BYTES = 8 * 1024 * 1024
BUFFER_BYTES = 256 * 1024
"""Read of a column at a time, instead of all that it has in a row group."""

SWITCHES_OFF = (
    "spark.sql.files.ignoreCorruptFiles",
    "spark.sql.files.ignoreMissingFiles",
    "spark.sql.parquet.mergeSchema",
    "spark.sql.parquet.fieldId.read.enabled",
    # Without the path among a scan's options, one that names a path twice may look like another.
    "spark.sql.legacy.pathOptionBehavior.enabled",
    "spark.sql.execution.arrow.useLargeVarTypes",
)
"""Settings with which Spark may give other rows or types than the files have by themselves."""
CRYPTO_CONFS = ("spark.hadoop.parquet.crypto.factory.class", "parquet.crypto.factory.class")
SPARK_SCHEMA_KEY = b"org.apache.spark.sql.parquet.row.metadata"


@dataclass(frozen=True)
class FilePart:
    """Consecutive row groups of one file, which one task reads.

    Attributes
    ----------
    path : str
        The file, the same on the driver and on every executor.
    row_groups : tuple of int
        Their numbers in the file.
    rows : int
        How many rows they hold.
    bytes : int
        Size of the columns that are read, decompressed.
    size : int
        The whole file's size in bytes, when the driver saw it.
    mtime_ns : int
        When it was last changed, in nanoseconds since 1970.
    partition : int
        Which partition reads it.
    """

    path: str
    row_groups: tuple[int, ...]
    rows: int
    bytes: int
    size: int
    mtime_ns: int
    partition: int


@dataclass(frozen=True)
class FileScan:
    """What the Python workers read instead of Spark.

    Attributes
    ----------
    parts : tuple of FilePart
        All row groups, in the order of the files' names.
    schema : pyarrow.Schema
        The columns, with the types that Spark would give ``mapInArrow``.
    rows : int
        How many rows the files hold.
    bytes : int
        Size of the columns that are read, decompressed.
    """

    parts: tuple[FilePart, ...]
    schema: pa.Schema
    rows: int
    bytes: int

    @property
    def files(self) -> int:
        """How many files have rows."""
        return len({part.path for part in self.parts})

    @property
    def partitions(self) -> int:
        """How many tasks read them."""
        return len({part.partition for part in self.parts})


class _NotPlainError(Exception):
    """Says in one clause why a DataFrame is left to Spark."""


def plain_scan(df: DataFrame, columns: Sequence[str]) -> FileScan | str:
    """Find the files that a DataFrame is a plain scan of, if the Python workers may read them.

    Starts no Spark job. Costs one listing of the files for each way to write their path until one
    fits (tens of milliseconds each), and reads every file's footer.

    Parameters
    ----------
    df
        Any DataFrame.
    columns
        The columns that are needed, by the names that they have in it.

    Returns
    -------
    FileScan or str
        What to read; or one clause that says why the DataFrame has to be left to Spark.
    """
    try:
        return _plain_scan(df, columns)
    except _NotPlainError as reason:
        return str(reason)


def _plain_scan(df: DataFrame, columns: Sequence[str]) -> FileScan:
    # Over Connect the driver is another machine than the one whose files these are.
    if type(df).__module__.startswith("pyspark.sql.connect"):
        raise _NotPlainError("this session is Spark Connect's")
    if df.isStreaming:
        raise _NotPlainError("df is a stream")
    _check_settings(df.sparkSession)
    schema = _needed_schema(df, columns)
    if _uses_cached_rows(df):  # and the files may have changed since
        raise _NotPlainError("df is cached")
    paths = _local_paths(df.inputFiles())
    if not _is_scan_of(df, paths):
        raise _NotPlainError("df is not a plain scan of one path of Parquet files")
    with ThreadPoolExecutor(FOOTER_THREADS, "horovodrunner-footers") as pool:
        groups = [
            group
            for file_groups in pool.map(lambda path: _row_groups(path, schema), paths)
            for group in file_groups
        ]
    parts = tuple(balanced(groups, df.sparkSession.sparkContext.defaultParallelism))
    return FileScan(
        parts, schema, sum(part.rows for part in parts), sum(part.bytes for part in parts)
    )


def _uses_cached_rows(df: DataFrame) -> bool:
    # a DataFrame of its own: one that Spark has planned before does not see what was cached since
    leaves = df.select("*")._jdf.queryExecution().withCachedData().collectLeaves()
    names = (leaves.apply(index).getClass().getSimpleName() for index in range(leaves.size()))
    return "InMemoryRelation" in names


def _check_settings(spark: SparkSession) -> None:
    for name in SWITCHES_OFF:
        if (spark.conf.get(name, None) or "false").lower() != "false":
            raise _NotPlainError(f"{name} is set")
    for name in CRYPTO_CONFS:
        if spark.conf.get(name, None):
            raise _NotPlainError(f"the files may be encrypted: {name} is set")


def _needed_schema(df: DataFrame, columns: Sequence[str]) -> pa.Schema:
    """Give the types that Spark's own conversion would give the columns."""
    if not columns:
        raise _NotPlainError("no column is needed")
    repeated = [name for name, times in Counter(map(str.lower, df.columns)).items() if times > 1]
    if repeated or len(set(columns)) < len(columns):
        raise _NotPlainError(f"several columns have one name: {repeated or list(columns)}")
    fields = []
    for name in columns:
        if name not in df.columns:
            raise _NotPlainError(f"df has no column {name!r}")
        if "." in name:  # pyarrow would look for a field of a struct
            raise _NotPlainError(f"the name of column {name!r} has a dot")
        kind = df.schema[name].dataType
        arrow = _arrow_type(kind)
        if arrow is None:
            raise _NotPlainError(
                f"column {name!r} is {kind.simpleString()}, which Spark and pyarrow may read in "
                "different ways"
            )
        fields.append(pa.field(name, arrow))
    return pa.schema(fields)


def _arrow_type(kind: DataType) -> pa.DataType | None:
    """Give the Arrow type of a Spark type that both read alike, or None."""
    from pyspark.sql import types

    if isinstance(kind, types.ArrayType):
        element = _arrow_type(kind.elementType)
        return None if element is None else pa.list_(pa.field("element", element))
    for spark_type, arrow in (
        (types.BooleanType(), pa.bool_()),
        (types.ByteType(), pa.int8()),
        (types.ShortType(), pa.int16()),
        (types.IntegerType(), pa.int32()),
        (types.LongType(), pa.int64()),
        (types.FloatType(), pa.float32()),
        (types.DoubleType(), pa.float64()),
        (types.StringType(), pa.string()),  # a collation makes another type of it
        (types.BinaryType(), pa.binary()),
    ):
        if kind == spark_type:
            return arrow
    return None


def _local_paths(uris: Sequence[str]) -> list[str]:
    """Give the paths behind Spark's names of the files, in their order."""
    if not uris:
        raise _NotPlainError("df is not made of files")
    if len(uris) > MAX_FILES:
        raise _NotPlainError(f"there are {len(uris):,} files, more than {MAX_FILES:,}")
    paths = []
    for uri in uris:
        parts = urlsplit(uri)
        if parts.scheme != "file" or parts.netloc:
            raise _NotPlainError(f"{uri} is not a file in the file system of every machine")
        paths.append(unquote(parts.path))
    return sorted(paths)


def _is_scan_of(df: DataFrame, paths: Sequence[str]) -> bool:
    """Tell whether a DataFrame is ``spark.read.parquet`` of one path, or columns of that.

    The path as the user wrote it is one of the scan's options, so that ways to write it are tried.
    Several paths are not: for some releases of Spark one that is named twice is the same as one
    that is named once.
    """
    from pyspark.errors import PySparkException

    names = list(map(as_written, df.columns))
    reader = df.sparkSession.read
    schemas = _possible_schemas(df, paths[0])
    for path in _possible_paths(paths):
        for schema in schemas:
            with suppress(PySparkException):  # no such path, or not these columns
                scan = reader.schema(schema).parquet(path)
                # Columns are compared by their place, not by name; and not for every release of
                # Spark is a selection of all columns the scan itself.
                same = df.columns == scan.columns and df.sameSemantics(scan)
                if same or df.sameSemantics(scan.select(*names)):
                    return True
    return False


def _possible_paths(paths: Sequence[str]) -> list[str]:
    """List what the user may have given to ``spark.read.parquet``, the likeliest first."""
    folder = Path(os.path.commonpath([str(Path(path).parent) for path in paths]))
    roots = [folder]
    while "=" in folder.name:  # the directory of a partition: column=value
        folder = folder.parent
        roots.insert(0, folder)
    if len(paths) == 1:
        roots.append(Path(paths[0]))
    found = []
    for root in roots:
        found += [str(root), f"file://{root}", f"file:{root}", f"{root}/"]
        with suppress(ValueError):  # it is not below the working directory
            relative = root.relative_to(Path.cwd())
            found += [str(relative), f"{relative}/", f"./{relative}"]
    return found


def _possible_schemas(df: DataFrame, path: str) -> list[StructType]:
    """List what the schema of the whole files may be, so that Spark runs no job to infer it."""
    try:
        footer = pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise _NotPlainError(f"the footer of {path} cannot be read here: {error}") from error
    schemas = [df.schema]  # all columns, or those that the user's own schema names
    inferred = _spark_schema(footer)
    if inferred is not None and inferred != df.schema:
        schemas.insert(0, inferred)
    return schemas


def _spark_schema(footer: pq.FileMetaData) -> StructType | None:
    from pyspark.sql.types import StructField, StructType

    written = (footer.metadata or {}).get(SPARK_SCHEMA_KEY)
    if written is not None:  # by Spark
        return StructType.fromJson(json.loads(written))
    fields = []
    for field in footer.schema.to_arrow_schema():
        kind = _spark_type(field.type)
        if kind is None:
            return None
        fields.append(StructField(field.name, kind))
    return StructType(fields)


def _spark_type(arrow: pa.DataType) -> DataType | None:
    """Guess the type that Spark infers; a wrong guess means that the scan is not recognised."""
    from pyspark.sql import types

    arrow = _plain_type(arrow)
    if pa.types.is_list(arrow):
        element = _spark_type(arrow.value_type)
        return None if element is None else types.ArrayType(element)
    if pa.types.is_struct(arrow):
        kinds = {field.name: _spark_type(field.type) for field in arrow}
        fields = [types.StructField(name, kind) for name, kind in kinds.items() if kind is not None]
        return types.StructType(fields) if len(fields) == len(kinds) else None
    if pa.types.is_timestamp(arrow):
        return types.TimestampNTZType() if arrow.tz is None else types.TimestampType()
    if pa.types.is_decimal128(arrow):
        return types.DecimalType(arrow.precision, arrow.scale)
    known: dict[pa.DataType, DataType] = {
        pa.bool_(): types.BooleanType(),
        pa.int8(): types.ByteType(),
        pa.int16(): types.ShortType(),
        pa.int32(): types.IntegerType(),
        pa.int64(): types.LongType(),
        pa.uint8(): types.ShortType(),
        pa.uint16(): types.IntegerType(),
        pa.uint32(): types.LongType(),
        pa.float32(): types.FloatType(),
        pa.float64(): types.DoubleType(),
        pa.string(): types.StringType(),
        pa.binary(): types.BinaryType(),
        pa.date32(): types.DateType(),
    }
    return known.get(arrow)


def _plain_type(arrow: pa.DataType) -> pa.DataType:
    """Give the type that Spark has for the same column; pyarrow notes its own in the file."""
    if pa.types.is_dictionary(arrow):
        return _plain_type(arrow.value_type)
    if pa.types.is_large_string(arrow):
        return pa.string()
    if pa.types.is_large_binary(arrow):
        return pa.binary()
    if (
        pa.types.is_list(arrow)
        or pa.types.is_large_list(arrow)
        or pa.types.is_fixed_size_list(arrow)
    ):
        return pa.list_(pa.field("element", _plain_type(arrow.value_type)))
    return arrow


@dataclass(frozen=True)
class RowGroup:
    """One row group of a file that the driver has looked at."""

    path: str
    number: int
    rows: int
    bytes: int
    size: int
    mtime_ns: int


def _row_groups(path: str, schema: pa.Schema) -> list[RowGroup]:
    """Read one file's footer, and check that it has the columns as they are needed."""
    try:
        status = Path(path).stat()
        footer = pq.read_metadata(path)
        found = footer.schema.to_arrow_schema()
    except (OSError, pa.ArrowException) as error:  # encrypted ones, too
        raise _NotPlainError(f"the footer of {path} cannot be read here: {error}") from error
    for field in schema:
        same = [name for name in found.names if name.lower() == field.name.lower()]
        if same != [field.name] or any(name.startswith(f"{field.name}.") for name in found.names):
            raise _NotPlainError(f"{path} has not exactly one column {field.name!r}")
        kind = found.field(field.name).type
        if _plain_type(kind) != field.type:
            raise _NotPlainError(
                f"column {field.name!r} is {kind} in {path}, and {field.type} for Spark"
            )
    leaves = [
        number
        for number in range(len(footer.schema))
        if footer.schema.column(number).path.split(".")[0] in schema.names
    ]
    groups = []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        if group.num_rows == 0:
            continue
        chunks = [group.column(leaf) for leaf in leaves]
        for codec in {chunk.compression for chunk in chunks} - {"UNCOMPRESSED"}:
            if not pa.Codec.is_available(codec.lower()):
                raise _NotPlainError(f"pyarrow cannot decompress {codec}, as {path} is")
        weight = sum(chunk.total_uncompressed_size for chunk in chunks)
        groups.append(
            RowGroup(path, number, group.num_rows, weight, status.st_size, status.st_mtime_ns)
        )
    return groups


def balanced(groups: Sequence[RowGroup], parallelism: int) -> Iterator[FilePart]:
    """Deal row groups out to partitions of about the same size, in their order.

    A row group is never cut, as it is not by Spark: files with fewer of them than the cluster has
    cores leave cores idle, whoever reads them.

    Parameters
    ----------
    groups
        The row groups, those of one file one after another.
    parallelism
        How many tasks the cluster runs at a time.

    Yields
    ------
    FilePart
        The row groups of one file in one partition. Partitions are numbered from 0, without gaps.
    """
    # A row group without columns that weigh something counts, too.
    weights = [max(1, group.bytes) for group in groups]
    total = sum(weights)
    tasks = parallelism * max(1, math.ceil(total / PARTITION_BYTES / parallelism))
    partition, slot, before = -1, -1, 0
    part: list[RowGroup] = []
    for group, weight in zip(groups, weights, strict=True):
        here = (2 * before + weight) * tasks // (2 * total)  # where the row group's middle lies
        before += weight
        if part and (here != slot or group.path != part[0].path):
            yield _part_of(part, partition)
            part = []
        if here != slot:
            partition, slot = partition + 1, here
        part.append(group)
    if part:
        yield _part_of(part, partition)


def _part_of(groups: Sequence[RowGroup], partition: int) -> FilePart:
    first = groups[0]
    return FilePart(
        first.path,
        tuple(group.number for group in groups),
        sum(group.rows for group in groups),
        sum(group.bytes for group in groups),
        first.size,
        first.mtime_ns,
        partition,
    )


def parts_dataframe(spark: SparkSession, scan: FileScan) -> DataFrame:
    """Make the DataFrame that tells each task what to read.

    Parameters
    ----------
    spark
        The session.
    scan
        What `plain_scan` gave.

    Returns
    -------
    DataFrame
        One row per partition: what `read_parts` takes.
    """
    from pyspark.sql import functions

    partitions: list[list[FilePart]] = [[] for _ in range(scan.partitions)]
    for part in scan.parts:
        partitions[part.partition].append(part)
    # One literal for all: a range is the one small DataFrame whose partitions can be chosen, and
    # JSON has no line breaks of its own.
    lines = "\n".join(json.dumps([_to_json(part) for part in parts]) for parts in partitions)
    number = (functions.col("id") + 1).cast("int")
    count = max(1, len(partitions))
    return spark.range(0, len(partitions), 1, count).select(
        functions.lit(base64.b64encode(scan.schema.serialize()).decode()).alias("schema"),
        functions.element_at(functions.split(functions.lit(lines), "\n"), number).alias("parts"),
    )


def _to_json(part: FilePart) -> list[object]:
    rows = BATCH_ROWS
    if part.rows:
        rows = min(BATCH_ROWS, max(1, BATCH_BYTES * part.rows // max(1, part.bytes)))
    return [part.path, part.row_groups, part.size, part.mtime_ns, rows]


def read_parts(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Read the rows of the parts that a task is told to read.

    Parameters
    ----------
    batches
        Rows of what `parts_dataframe` made.

    Yields
    ------
    pyarrow.RecordBatch
        At most 10,000 rows and about 8 MiB, with the schema of the scan.

    Raises
    ------
    DataError
        If a file is no longer the one that the driver saw, or cannot be read.
    """
    for batch in batches:
        for row in batch.to_pylist():
            schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(row["schema"])))
            for path, row_groups, size, mtime_ns, batch_rows in json.loads(row["parts"]):
                _check_unchanged(path, size, mtime_ns)
                try:
                    yield from _rows(path, row_groups, batch_rows, schema)
                except (OSError, pa.ArrowException) as error:
                    raise DataError(
                        f"pyarrow cannot read {path} ({' '.join(str(error).split())}): pass "
                        "read_files=False to have Spark read it"
                    ) from error


def _check_unchanged(path: str, size: int, mtime_ns: int) -> None:
    remedy = (
        "run it again when nothing writes to the files, or pass read_files=False to have Spark "
        "read them"
    )
    try:
        status = Path(path).stat()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read on this executor's machine, as it could on the driver's "
            f"({error}): {remedy}"
        ) from error
    if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
        raise DataError(
            f"{path} has changed since the driver looked at it ({size:,} bytes of "
            f"{mtime_ns / 1e9:.3f} then, {status.st_size:,} bytes of "
            f"{status.st_mtime_ns / 1e9:.3f} now): {remedy}"
        )


def _rows(
    path: str, row_groups: list[int], batch_rows: int, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    # A Spark task has one core; pre-buffering would hold whole row groups.
    with pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
        for batch in file.iter_batches(
            batch_rows, row_groups, columns=schema.names, use_threads=False
        ):
            yield _with_schema(batch, schema)


def _with_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Put the columns in order, with Spark's types where the file notes others."""
    columns = [
        column if column.type == field.type else column.cast(field.type)
        for field in schema
        for column in (batch.column(field.name),)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
