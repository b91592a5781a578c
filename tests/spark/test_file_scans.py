"""A plain scan of Parquet files is recognised, nothing else is, and its rows are Spark's."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from horovodrunner.inference import files
from horovodrunner.inference.files import FileScan, parts_dataframe, plain_scan, read_parts

pytestmark = pytest.mark.spark

ROWS = 40


def table_of(start: int, rows: int) -> pa.Table:
    """Make rows of all types that are read, with nulls on every level."""
    numbers = np.arange(start, start + rows)
    every = {"id": pa.array(numbers)}
    for name, kind in {
        "b": pa.bool_(),
        "i8": pa.int8(),
        "i16": pa.int16(),
        "i32": pa.int32(),
        "f32": pa.float32(),
        "f64": pa.float64(),
        "s": pa.string(),
        "large": pa.large_string(),
        "bytes": pa.binary(),
    }.items():
        values = pa.array(numbers % 2 if name == "b" else numbers % 100)
        values = values.cast(pa.string()).cast(kind) if "binary" in str(kind) else values.cast(kind)
        every[name] = pa.array(
            [None if i % 7 == 3 else v.as_py() for i, v in zip(numbers, values, strict=True)], kind
        )
    vectors = [None if i % 5 == 0 else [i / 2, None][: 1 + i % 2] * (i % 3) for i in numbers]
    every["x"] = pa.array(vectors, pa.list_(pa.float32()))
    fixed = [[i, i + 1, None] for i in numbers]  # old releases of pyarrow write no null lists
    every["fixed"] = pa.array(fixed, pa.list_(pa.float64(), 3))
    nested = [None if i % 6 == 0 else [[str(i)], [], None] for i in numbers]
    every["nested"] = pa.array(nested, pa.large_list(pa.list_(pa.string())))
    every["kind"] = pa.array([f"k{i % 3}" for i in numbers], pa.string()).dictionary_encode()
    return pa.table(every)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Files of several row groups, one without rows and one without row groups."""
    folder = tmp_path_factory.mktemp("some files +%20é")
    for number, rows in enumerate((17, 1, 0, 22)):
        start = (0, 17, 18, 18)[number]
        codec = ("snappy", "zstd", "gzip", "none")[number]
        path = folder / f"part {number}.parquet"
        pq.write_table(table_of(start, rows), path, row_group_size=5, compression=codec)
    pq.ParquetWriter(folder / "empty.parquet", table_of(0, 1).schema).close()
    return str(folder)


@contextlib.contextmanager
def starts_no_job(spark: Any) -> Iterator[None]:
    tracker = spark.sparkContext.statusTracker()
    before = tracker.getJobIdsForGroup(None)
    yield
    assert tracker.getJobIdsForGroup(None) == before


def scan_of(df: Any, *columns: str) -> FileScan:
    with starts_no_job(df.sparkSession):
        found = plain_scan(df, columns or df.columns)
    assert isinstance(found, FileScan), found
    return found


def reason(df: Any, *columns: str) -> str:
    with starts_no_job(df.sparkSession):
        found = plain_scan(df, columns or df.columns)
    assert isinstance(found, str), found
    return found


def rows_read(df: Any, scan: FileScan) -> list[Any]:
    """Read a scan as `predict` does; sorted, because Spark reads large files first."""
    kinds = df.select(*scan.schema.names).schema
    parts = parts_dataframe(df.sparkSession, scan)
    assert parts.rdd.getNumPartitions() == len(scan.partitions)
    return sorted(map(repr, parts.mapInArrow(read_parts, kinds).collect()))


def test_rows_and_types_are_those_that_spark_reads(spark: Any, folder: str) -> None:
    def schemas(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield pa.RecordBatch.from_pydict({"text": [str(batch.schema)]})

    df = spark.read.parquet(folder)
    scan = scan_of(df)
    assert (scan.rows, scan.files) == (ROWS, 3)
    assert len(scan.partitions) == spark.sparkContext.defaultParallelism == 2
    by_spark = df.collect()
    assert len(by_spark) == ROWS
    assert rows_read(df, scan) == sorted(map(repr, by_spark))
    assert {row.text for row in df.mapInArrow(schemas, "text string").collect()} == {
        str(scan.schema)
    }
    some = df.select("x", "id")
    assert rows_read(some, scan_of(some, "x")) == sorted(map(repr, some.select("x").collect()))


def test_files_written_by_spark(spark: Any, folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "table")
    spark.read.parquet(folder).repartition(2).write.partitionBy("kind").parquet(target)
    df = spark.read.parquet(target)
    names = [name for name in df.columns if name != "kind"]
    assert rows_read(df, scan_of(df, *names)) == sorted(map(repr, df.select(*names).collect()))
    assert scan_of(df.select("f32"), "f32").files == 6
    one = spark.read.parquet(f"{target}/kind=k0")  # what is not below it is not read
    assert scan_of(one).rows == one.count() < ROWS
    assert "has not exactly one column 'kind'" in reason(df, "kind")


def test_the_ways_to_write_a_path(spark: Any, folder: str, tmp_path: Path) -> None:
    path = Path(folder)
    for written in (folder, f"file://{folder}", f"file:{folder}", f"{folder}/"):
        assert scan_of(spark.read.parquet(written)).rows == ROWS
    assert scan_of(spark.read.format("parquet").load(folder)).rows == ROWS
    assert scan_of(spark.read.load(str(path / "part 0.parquet"))).rows == 17
    (tmp_path / "one").mkdir()
    pq.write_table(table_of(0, 3), tmp_path / "one" / "a.parquet")
    assert scan_of(spark.read.parquet(str(tmp_path / "one"))).rows == 3
    Path("build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="build") as made:
        relative = Path(made).relative_to(Path.cwd()) if Path(made).is_absolute() else Path(made)
        pq.write_table(table_of(0, 3), relative / "a.parquet")
        for written in (str(relative), f"{relative}/", f"./{relative}"):
            assert scan_of(spark.read.parquet(written)).rows == 3


def test_selections_views_and_own_schemas_are_plain(spark: Any, folder: str) -> None:
    df = spark.read.parquet(folder)
    df.createOrReplaceTempView("scanned")
    try:
        for same in (
            df.select("s", "id"),
            df.drop("x"),
            df.alias("q"),
            spark.table("scanned"),
            spark.sql("SELECT s, id FROM scanned"),
            spark.read.schema("s string, id bigint").parquet(folder),
            spark.read.schema(df.schema).parquet(folder).select("id"),
        ):
            assert scan_of(same).rows == ROWS
    finally:
        spark.catalog.dropTempView("scanned")


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "filter": lambda df, f: df.filter("id > 3"),
    "filter of a column that is not needed": lambda df, f: df.filter("id > 3").select("s"),
    "limit": lambda df, f: df.limit(5),
    "large limit": lambda df, f: df.limit(10**6),
    "offset": lambda df, f: df.offset(1),
    "sample": lambda df, f: df.sample(0.5, seed=1),
    "repartition": lambda df, f: df.repartition(3),
    "coalesce": lambda df, f: df.coalesce(1),
    "orderBy": lambda df, f: df.orderBy("id"),
    "distinct": lambda df, f: df.select("id").distinct(),
    "union": lambda df, f: df.union(df),
    "join": lambda df, f: df.join(df.select("id"), "id"),
    "new column": lambda df, f: df.withColumn("new", f.lit(1)),
    "changed column": lambda df, f: df.withColumn("id", f.col("id") + 1),
    "renamed column": lambda df, f: df.withColumnRenamed("id", "number"),
    "swapped names": lambda df, f: df.select(f.col("s").alias("large"), f.col("large").alias("s")),
    "other names": lambda df, f: df.select("s", "large").toDF("large", "s"),
    "all other names": lambda df, f: df.toDF(*df.columns[:7], "large", "s", *df.columns[9:]),
    "cast": lambda df, f: df.withColumn("i32", f.col("i32").cast("bigint")),
    "explode": lambda df, f: df.select("id", f.explode("x").alias("x")),
    "fillna": lambda df, f: df.fillna(0),
    "dropna": lambda df, f: df.dropna(),
    "groupBy": lambda df, f: df.groupBy("s").agg(f.max("id").alias("id")),
    "mapInArrow": lambda df, f: df.mapInArrow(lambda batches: batches, df.schema),
    "metadata": lambda df, f: df.select("id", f.col("_metadata.file_size").alias("i32")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_rows_is_not_plain(spark: Any, folder: str, change: str) -> None:
    from pyspark.sql import functions

    df = CHANGES[change](spark.read.parquet(folder), functions)
    assert "not a plain scan" in reason(df)


def test_options_that_choose_other_rows_are_not_plain(spark: Any, folder: str) -> None:
    schema = spark.read.parquet(folder).schema
    for name, value in {
        "mergeSchema": "true",
        "pathGlobFilter": "*0.parquet",
        "recursiveFileLookup": "true",
        "modifiedAfter": "2000-01-01T00:00:00",
        "ignoreCorruptFiles": "true",
        "ignoreMissingFiles": "true",
        "datetimeRebaseMode": "LEGACY",
    }.items():
        df = spark.read.option(name, value).schema(schema).parquet(folder)
        assert "not a plain scan" in reason(df)
    assert "not a plain scan" in reason(spark.read.schema("id bigint").json(folder))
    twice = [f"{folder}/part 0.parquet", f"{folder}/part 0.parquet"]
    assert "not a plain scan" in reason(spark.read.schema(schema).parquet(*twice))
    for several in (twice[:1], [*twice[:1], f"{folder}/part 1.parquet"]):
        found = plain_scan(spark.read.schema(schema).parquet(*several), ["id"])
        assert isinstance(found, FileScan) == (len(several) == 1)


def test_sources_that_are_not_files(spark: Any, folder: str, tmp_path: Path) -> None:
    assert reason(spark.range(3)) == "df is not made of files"
    assert (
        reason(spark.createDataFrame([(1, "a")], "id int, s string")) == "df is not made of files"
    )
    stream = spark.readStream.schema("id bigint").parquet(folder)
    assert reason(stream) == "df is a stream"
    df = spark.read.parquet(folder).select("id", "s").cache()
    try:
        assert reason(df) == "df is cached"
        assert reason(spark.read.parquet(folder).select("id", "s")) == "df is cached"
    finally:
        df.unpersist()
    whole = spark.read.parquet(folder)
    before = whole.select("id")
    assert isinstance(plain_scan(before, ["id"]), FileScan)
    whole.cache()
    try:  # Spark takes a part of what is cached, which the files may no longer have
        assert reason(whole.select("id")) == reason(before) == "df is cached"
    finally:
        whole.unpersist()


def test_settings_that_change_how_spark_reads(spark: Any, folder: str) -> None:
    df = spark.read.parquet(folder)
    for name in files.SWITCHES_OFF:
        spark.conf.set(name, "true")
        try:
            assert reason(df) == f"{name} is set"
        finally:
            spark.conf.unset(name)
    name = files.CRYPTO_CONFS[0]
    spark.conf.set(name, "some.Factory")
    try:
        assert reason(df) == f"the files may be encrypted: {name} is set"
    finally:
        spark.conf.unset(name)


def test_columns_that_are_read_in_different_ways(spark: Any, tmp_path: Path) -> None:
    import datetime

    def written(**columns: Any) -> Any:
        folder = tmp_path / "-".join(columns)
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), folder / "a.parquet")
        return spark.read.parquet(str(folder))

    day = datetime.date(2020, 1, 1)
    df = written(id=[1], day=[day], at=pa.array([0], pa.timestamp("us")), u=pa.array([1], "uint8"))
    assert "column 'day' is date" in reason(df, "day")
    assert "column 'at' is timestamp" in reason(df, "id", "at")
    assert "column 'u' is uint8" in reason(df, "u")
    assert scan_of(df.select("id"), "id").rows == 1
    df = written(st=[{"a": 1}], m=pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())))
    assert "column 'st' is struct" in reason(df, "st")
    assert "column 'm' is map" in reason(df, "m")
    df = written(**{"a.b": [1], "c": [2]})
    assert "has a dot" in reason(df.select("`a.b`"))
    assert reason(df.select("c"), "c", "c") == "several columns have one name: ['c', 'c']"
    assert reason(df, "d") == "df has no column 'd'"
    assert plain_scan(df, []) == "no column is needed"


def test_files_that_do_not_agree(spark: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def folder_of(name: str, *tables: pa.Table) -> Any:
        (tmp_path / name).mkdir()
        for number, table in enumerate(tables):
            pq.write_table(table, tmp_path / name / f"{number}.parquet")
        return spark.read.schema("id bigint, x double").parquet(str(tmp_path / name))

    good = pa.table({"id": [1], "x": [1.0]})
    df = folder_of("missing", good, pa.table({"id": [2]}))
    assert "1.parquet has not exactly one column 'x'" in reason(df)
    assert scan_of(df.select("id")).rows == 2
    df = folder_of("case", good, pa.table({"id": [2], "X": [1.0]}))
    assert "1.parquet has not exactly one column 'x'" in reason(df)
    df = folder_of("types", good, pa.table({"id": pa.array([2], pa.int32()), "x": [2.0]}))
    assert "column 'id' is int32 in" in reason(df)
    df = folder_of("broken", good, good)
    (tmp_path / "broken" / "1.parquet").write_bytes(b"PAR1 nothing PAR1")
    assert "the footer of" in reason(df)
    monkeypatch.setattr(files, "MAX_FILES", 1)
    assert "there are 2 files, more than 1" in reason(df)


def test_a_file_that_changes_before_the_tasks_read_it(spark: Any, tmp_path: Path) -> None:
    from pyspark.errors import PySparkException

    pq.write_table(pa.table({"x": [1.0]}), tmp_path / "a.parquet")
    df = spark.read.parquet(str(tmp_path))
    parts = parts_dataframe(spark, scan_of(df))
    pq.write_table(pa.table({"x": [2.0]}), tmp_path / "a.parquet")
    with pytest.raises(PySparkException, match=r"has changed since.*read_files=False"):
        parts.mapInArrow(read_parts, df.schema).collect()
