"""Parquet files that Spark's Python workers read by themselves, past the JVM.

Runs in: the driver (`plain_scan`, `parts_dataframe`) and Spark's Python workers (`read_parts`).

A DataFrame that is nothing but ``spark.read.parquet(path)``, or a selection of its columns, has the
rows of its files, which pyarrow reads several times as fast as Spark sends them from its JVM. The
driver makes the scan that it would be, and asks ``DataFrame.sameSemantics`` whether the two are the
same. Whatever is not known to be safe is left to Spark.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from horovodrunner.errors import DataError
from horovodrunner.inference.inputs import is_list
from horovodrunner.inference.outputs import SCALARS
from horovodrunner.spark.column_names import as_written

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import DataType, StructType

__all__ = ["FileScan", "RowGroup", "balanced", "parts_dataframe", "plain_scan", "read_parts"]

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
class RowGroup:
    """One row group of a file that the driver has looked at."""

    path: str
    """The same on the driver and on every executor."""
    number: int
    rows: int
    bytes: int
    """Size of the columns that are read, decompressed."""
    size: int
    """The whole file's."""
    mtime_ns: int


@dataclass(frozen=True)
class FileScan:
    """What the Python workers read instead of Spark."""

    partitions: list[list[RowGroup]]
    """In the order of the files' names."""
    schema: pa.Schema
    """The columns, with the types that Spark would give ``mapInArrow``."""

    @property
    def files(self) -> int:
        """How many files have rows."""
        return len({group.path for groups in self.partitions for group in groups})

    @property
    def rows(self) -> int:
        return sum(group.rows for groups in self.partitions for group in groups)


class _NotPlainError(Exception):
    """Why a DataFrame is left to Spark, in one clause."""


def plain_scan(df: DataFrame, columns: Sequence[str]) -> FileScan | str:
    """Find the files that a DataFrame is a plain scan of, or say why it is left to Spark.

    Starts no Spark job. Costs one listing of the files for each way to write their path until one
    fits (tens of milliseconds each), and reads every file's footer.
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
        of_files = pool.map(lambda path: _row_groups(path, schema), paths)
        groups = list(itertools.chain.from_iterable(of_files))
    return FileScan(balanced(groups, df.sparkSession.sparkContext.defaultParallelism), schema)


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
    """Return the types that Spark's own conversion would give the columns."""
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
    """Return the Arrow type of a Spark type that both read alike, or None."""
    from pyspark.sql.types import ArrayType

    if isinstance(kind, ArrayType):
        element = _arrow_type(kind.elementType)
        return None if element is None else pa.list_(pa.field("element", element))
    return SCALARS.get(kind.simpleString())  # with a collation a string has another name


def _local_paths(uris: Sequence[str]) -> list[str]:
    """Return the paths behind Spark's names of the files, in their order."""
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
    """Whether a DataFrame is ``spark.read.parquet`` of one path, or columns of that.

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
    from pyspark.sql.types import StructType

    try:
        footer = pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise _NotPlainError(f"the footer of {path} cannot be read here: {error}") from error
    written = (footer.metadata or {}).get(SPARK_SCHEMA_KEY)
    if written is not None:  # by Spark
        inferred: Any = StructType.fromJson(json.loads(written))
    else:
        inferred = _spark_type(pa.struct(list(footer.schema.to_arrow_schema())))
    schemas = [df.schema]  # all columns, or those that the user's own schema names
    return schemas if inferred is None or inferred == df.schema else [inferred, *schemas]


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
    """Return the type that Spark has for the same column; pyarrow notes its own in the file."""
    if pa.types.is_dictionary(arrow):
        return _plain_type(arrow.value_type)
    if is_list(arrow):
        return pa.list_(pa.field("element", _plain_type(arrow.value_type)))
    return {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}.get(arrow, arrow)


def _row_groups(path: str, schema: pa.Schema) -> list[RowGroup]:
    """Read a file's footer, and check that it has the columns as they are needed."""
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


def balanced(groups: Sequence[RowGroup], parallelism: int) -> list[list[RowGroup]]:
    """Divide row groups into partitions of about the same size, in their order.

    A row group is never cut, as it is not by Spark: files with fewer of them than the cluster has
    cores leave cores idle, whoever reads them.
    """
    # A row group without columns that weigh something counts, too.
    weights = [max(1, group.bytes) for group in groups]
    total = sum(weights)
    tasks = parallelism * max(1, math.ceil(total / PARTITION_BYTES / parallelism))
    partitions: dict[int, list[RowGroup]] = {}
    before = 0
    for group, weight in zip(groups, weights, strict=True):
        middle_twice = 2 * before + weight
        partitions.setdefault(middle_twice * tasks // (2 * total), []).append(group)
        before += weight
    return list(partitions.values())


def parts_dataframe(spark: SparkSession, scan: FileScan) -> DataFrame:
    """Make the DataFrame that names what each task is to read, in one row: see `read_parts`."""
    from pyspark.sql import functions

    # One literal for all: a range is the one small DataFrame whose partitions can be chosen, and
    # JSON has no line breaks of its own.
    lines = "\n".join(json.dumps(_parts(groups)) for groups in scan.partitions)
    number = (functions.col("id") + 1).cast("int")
    count = len(scan.partitions)
    return spark.range(0, count, 1, max(1, count)).select(
        functions.lit(base64.b64encode(scan.schema.serialize()).decode()).alias("schema"),
        functions.element_at(functions.split(functions.lit(lines), "\n"), number).alias("parts"),
    )


def _parts(groups: Sequence[RowGroup]) -> list[tuple[object, ...]]:
    parts: list[tuple[object, ...]] = []
    for path, of_file in itertools.groupby(groups, lambda group: group.path):
        first, *others = of_file
        numbers = [each.number for each in (first, *others)]
        rows = sum(each.rows for each in (first, *others))
        size = max(1, sum(each.bytes for each in (first, *others)))
        batch_rows = min(BATCH_ROWS, max(1, BATCH_BYTES * rows // size))
        parts.append((path, numbers, first.size, first.mtime_ns, batch_rows))
    return parts


def read_parts(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Read what rows of `parts_dataframe` name, in batches of 10,000 rows or about 8 MiB."""
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
            columns = [batch.column(name) for name in schema.names]
            # the file may note other types than Spark's
            columns = [
                each if each.type == kind else each.cast(kind)
                for each, kind in zip(columns, schema.types, strict=True)
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)
