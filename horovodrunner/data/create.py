"""Stores a DataFrame where the ranks can read it. Runs in: the driver."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from horovodrunner import validation as checked
from horovodrunner.data.cache import cache, remove
from horovodrunner.data.columns import (
    Column,
    NullPolicy,
    check_policies,
    with_dims,
    with_indicators,
)
from horovodrunner.data.dataset import DataSet
from horovodrunner.data.origin import origin_of
from horovodrunner.data.schema import arrow_columns, prepared
from horovodrunner.data.stored import MANIFEST, Manifest, StoredFile
from horovodrunner.data.unshared import UnsharedDataSet
from horovodrunner.data.writing import REPORT_SCHEMA, write_rows
from horovodrunner.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ConfigurationError,
    DataError,
)
from horovodrunner.spark.column_names import map_by_name
from horovodrunner.spark.dataframes import check_dataframe
from horovodrunner.spark.errors import told_as
from horovodrunner.spark.jobs import collect
from horovodrunner.storage import is_url, local_path, open_storage
from horovodrunner.usage import explained

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["CACHE_DIR_CONF", "CACHE_LIMIT_CONF", "from_arrow", "from_dataframe", "store_here"]

CACHE_DIR_CONF = "spark.horovodrunner.data.cacheDir"
CACHE_LIMIT_CONF = "spark.horovodrunner.data.cacheLimit"

_OS_ERROR = re.compile(
    r"^(?:OSError|PermissionError|FileNotFoundError|NotADirectoryError): .+", re.M
)


@explained()
def from_dataframe(
    df: DataFrame,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    nulls: Mapping[str, NullPolicy] | None = None,
    reuse: bool = True,
    shared: bool = True,
) -> DataSet:
    """Store the rows of a DataFrame for training.

    The executors compute the DataFrame once and write it as Arrow files. Calling this again returns
    the data set that is there already if Spark would compute the same rows: from the same files,
    with nothing written to them since. It is deleted by ``delete()``, at the end of a ``with``
    block, and when this process ends.

    Parameters
    ----------
    df
        The DataFrame; docs/data.md says what becomes of each type.
    cache_dir
        A directory, or a URL that fsspec knows, which the executors and this process reach. By
        default what the conf ``spark.horovodrunner.data.cacheDir`` says, and on a local master a
        temporary directory.
    dtype
        ``"float32"`` or ``"float64"``: what all floating-point numbers, also in arrays and vectors,
        become. By default they stay what they are.
    nulls
        What becomes of null values, by column name: :func:`fill` or
        :func:`fill_with_indicator`. A null in another column is an error.
    reuse
        False: store the rows anew in any case. That is done anyway where it cannot be told whether
        the rows would be the same: after a UDF, of a cached DataFrame, of a JDBC table;
        docs/data.md has the list.
    shared
        False: nothing is stored now. Each run that the data set is given to computes the DataFrame,
        deals its rows out to the ranks, and every task writes those of its rank to a file of its
        own, so no storage has to be shared.

    Returns
    -------
    DataSet
        A small handle: pass it to training code, or let it be in a closure.

    Raises
    ------
    ConfigurationError
        If an argument has no valid value, or no place is known that executors reach.
    DataError
        If a column cannot be stored, or not all that was written is seen from here.
    """
    check_dataframe(df, takes_arrow=True)
    dtype = _checked_dtype(dtype)
    cache_dir = None if cache_dir is None else checked.path("cache_dir", cache_dir)
    reuse, shared = checked.boolean("reuse", reuse), checked.boolean("shared", shared)
    policies = _checked_nulls(nulls)
    if cache_dir is not None and not shared:
        raise ArgumentValueError(
            f"cache_dir={cache_dir!r}: with shared=False nothing is stored there; leave "
            "one of the two out"
        )
    spark = df.sparkSession
    base = _base(spark, cache_dir) if shared else ""
    limit = _limit(spark)
    with told_as(DataError, "the DataFrame cannot be analyzed"):
        source, found = prepared(df, dtype)
    check_policies(policies, found)
    columns = with_indicators(found, policies)
    if not shared:
        return UnsharedDataSet(uuid.uuid4().hex, columns, source, policies)
    settings = (base, columns, sorted(policies.items(), key=lambda each: each[0]))
    with told_as(DataError, "the DataFrame cannot be analyzed"):
        origin = origin_of(df)  # before the rows are computed: what changes then is another one
    if reuse and origin is not None and (known := cache.find(origin, settings)) is not None:
        return known
    location = _new_location(base)
    manifest = _write(location, columns, _writer(source, columns, policies))
    return cache.add(location, manifest, limit, origin=origin, settings=settings)


def store_here(data: UnsharedDataSet, directory: Path) -> None:
    """Store a data set that travels with runs below a directory, for ranks of this machine."""
    source: Any = data.source
    master = str(source.sparkSession.conf.get("spark.master", ""))
    if not master.startswith("local"):
        raise ConfigurationError(
            f"np < 0 runs on this machine, and the executors of {master or 'this cluster'}, which "
            "compute the data set, cannot write here: use np > 0, or give from_dataframe a "
            "cache_dir that both reach instead of shared=False"
        )
    _write(str(directory / data.identity), data.columns, _writer(source, data.columns, data.nulls))


def _writer(
    source: DataFrame, columns: Sequence[Column], nulls: Mapping[str, NullPolicy]
) -> Callable[[str], Iterable[str]]:
    def write(location: str) -> Iterable[str]:
        write_partition = functools.partial(write_rows, location, columns, nulls)
        rows = map_by_name(source, write_partition, REPORT_SCHEMA)
        return [row["report"] for row in collect(rows, "storing the rows of a DataFrame")]

    return write


def from_arrow(
    table: pa.Table,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    nulls: Mapping[str, NullPolicy] | None = None,
) -> DataSet:
    """Store an Arrow table in the same way, without Spark: for tests of training code.

    Parameters
    ----------
    table
        The rows.
    cache_dir
        A directory, or a URL that fsspec knows; by default a temporary directory.
    nulls
        What becomes of null values, by column name.

    Returns
    -------
    DataSet
        As :func:`from_dataframe` gives.

    Raises
    ------
    DataError
        If a column cannot be stored.

    Examples
    --------
    >>> import pyarrow as pa
    >>> with from_arrow(pa.table({"x": [1.0, 2.0]})) as rows:
    ...     len(rows)
    2
    """
    if not isinstance(table, pa.Table):
        raise ArgumentTypeError(
            f"table={checked.shown(table)}: give a pyarrow.Table, not {type(table).__name__}"
        )
    policies = _checked_nulls(nulls)
    base = (
        tempfile.gettempdir()
        if cache_dir is None
        else _absolute(checked.path("cache_dir", cache_dir))
    )
    found = arrow_columns(table.schema)
    check_policies(policies, found)
    columns = with_indicators(found, policies)

    def write(location: str) -> Iterable[str]:
        reports = write_rows(location, columns, policies, table.to_batches())
        return [text for report in reports for text in report.column("report").to_pylist()]

    location = _new_location(base)
    return cache.add(location, _write(location, columns, write), None)


def _new_location(base: str) -> str:
    return f"{base.rstrip('/')}/horovodrunner-data-{uuid.uuid4().hex}"


def _write(
    location: str, columns: Sequence[Column], write: Callable[[str], Iterable[str]]
) -> Manifest:
    """Have the rows written to a new directory; it is complete then, or gone."""
    storage = open_storage(location)
    try:
        storage.make("")
        reports = sorted((json.loads(text) for text in write(location)), key=lambda r: r["part"])
        manifest = _manifest(columns, reports)
        _check_all_there(location, manifest)
        stream = storage.create(MANIFEST)
        stream.write(manifest.to_json().encode())
        stream.close()
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(location)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt("the rows were being stored: none of them is kept") from None
        if isinstance(error, Exception) and (text := _cause_of_writing(error)):
            raise DataError(
                f"the rows cannot be written to {location}: {text}. Give a cache_dir that the "
                "executors and this process can write to, with room for the rows"
            ) from error
        with told_as(
            DataError,
            "the rows of the DataFrame cannot be computed",
            "Any action on it would fail: correct what it is made of",
        ):
            raise
    return manifest


def _cause_of_writing(error: Exception) -> str:
    """Return why a file could not be written, here or in a Spark task; "" if that was not it."""
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):  # that is Spark's end
        return str(error)
    text = str(error)
    is_of_task = type(error).__module__.startswith("pyspark.") and "_write_file" in text
    return found.group() if is_of_task and (found := _OS_ERROR.search(text)) else ""


def _manifest(columns: Sequence[Column], reports: Sequence[Mapping[str, Any]]) -> Manifest:
    for report in reports:
        if "problem" in report:
            raise DataError(report["problem"])
    files = tuple(StoredFile.from_json(report["file"]) for report in reports)
    return Manifest(with_dims(columns, [report["lengths"] for report in reports]), files)


def _check_all_there(location: str, manifest: Manifest) -> None:
    storage = open_storage(location)
    storage.refresh()
    for file in manifest.files:
        try:
            size = storage.size(file.name)
        except FileNotFoundError:
            size = -1
        if size != file.size:
            seen = "is not there" if size < 0 else f"has {size:,} bytes instead of {file.size:,}"
            raise DataError(
                f"the executors wrote {len(manifest.files)} files to {location}, but from here "
                f"{file.name} {seen}: that directory is not the same on all hosts. Give a "
                "cache_dir that all of them share (a mounted file system, or a URL such as "
                "s3://bucket/tmp), or shared=False"
            )


def _base(spark: SparkSession, cache_dir: str | None) -> str:
    chosen = cache_dir if cache_dir is not None else spark.conf.get(CACHE_DIR_CONF, None)
    if chosen is not None:
        return _absolute(chosen)
    master = str(spark.conf.get("spark.master", ""))
    if master.startswith("local"):
        return tempfile.gettempdir()
    raise ConfigurationError(
        f"from_dataframe needs a place that the executors of {master or 'this cluster'} and this "
        "process reach: give cache_dir (a shared directory, or a URL such as s3://bucket/tmp), set "
        f"the conf {CACHE_DIR_CONF}, or let the rows travel with the run: shared=False"
    )


def _absolute(location: str) -> str:
    """Return a location that means the same in processes with another working directory."""
    return location if is_url(location) else str(local_path(location))


def _checked_dtype(dtype: Any) -> str | None:
    if isinstance(dtype, (np.dtype, type)):  # np.float32 means what "float32" means
        with contextlib.suppress(TypeError):
            dtype = np.dtype(dtype).name
    if dtype is not None and dtype not in ("float32", "float64"):
        raise ArgumentValueError(
            f"dtype={checked.shown(dtype)}: it is 'float32', 'float64' or None"
        )
    return None if dtype is None else str.__str__(dtype)


def _checked_nulls(nulls: Any) -> dict[str, NullPolicy]:
    if nulls is not None and not isinstance(nulls, Mapping):
        raise ArgumentTypeError(
            f"nulls={checked.shown(nulls)}: give a dict by column name, such as "
            "{'age': data.fill(0)}"
        )
    return {checked.text("a name in nulls", name): each for name, each in (nulls or {}).items()}


def _limit(spark: SparkSession) -> int | None:
    text = spark.conf.get(CACHE_LIMIT_CONF, None)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ConfigurationError(f"{CACHE_LIMIT_CONF}={text!r}: give a number of bytes") from error
