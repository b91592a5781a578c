"""DataFrames stored by real executors, and read by ranks."""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from horovodrunner import ConfigurationError, DataError, HorovodRunner, data
from horovodrunner.data import origin
from horovodrunner.data.cache import cache
from horovodrunner.data.origin import origin_of

pytestmark = [pytest.mark.spark]

ALL_TYPES = """
    SELECT id, cast(id AS byte) AS b, cast(id AS short) AS s, cast(id AS int) AS i,
        cast(id AS float) AS f, cast(id AS double) AS d, cast(id AS decimal(10, 2)) / 4 AS dec,
        id % 2 = 0 AS even, concat('row ', id) AS text, cast('ab' AS char(3)) AS c,
        encode(cast(id AS string), 'utf-8') AS bytes,
        date_add(date'1970-01-01', cast(id AS int)) AS day,
        timestamp_seconds(id) AS moment, timestamp_ntz'2024-01-01 00:00:01' AS wall,
        make_dt_interval(0, 0, 0, id) AS span,
        array(id, id + 1) AS pair, array_repeat(cast(id AS float), cast(id % 3 AS int)) AS ragged,
        array(array(1, 2), array(3, cast(id AS int))) AS matrix, array('x', 'y') AS words,
        named_struct('x', id, 'p', named_struct('y', array(1.5D, 2.5D))) AS nested,
        nullif(id, 3) AS sometimes
    FROM range(0, 10, 1, 4)
"""


@pytest.fixture(autouse=True)
def nothing_stored() -> Iterator[None]:
    yield
    cache.delete_all()
    assert list(Path(tempfile.gettempdir()).glob("horovodrunner-data-*")) == []


def test_every_type_has_its_outcome(spark: Any) -> None:
    from pyspark.ml.linalg import Vectors

    vectors = [(i, Vectors.dense([i, 1.0]), Vectors.sparse(3, {i % 3: 2.0})) for i in range(10)]
    df = spark.sql(ALL_TYPES).join(spark.createDataFrame(vectors, ["id", "dense", "sparse"]), "id")
    spark.conf.set("spark.sql.session.timeZone", "America/New_York")
    try:
        rows = data.from_dataframe(
            df.orderBy("id").coalesce(3),
            dtype="float32",
            nulls={"sometimes": data.fill_with_indicator(-1)},
        )
    finally:
        spark.conf.unset("spark.sql.session.timeZone")
    (batch,) = rows.numpy(10)
    ids = np.arange(10)
    assert batch["id"].tolist() == ids.tolist()
    for name, dtype in {"b": "i1", "s": "i2", "i": "i4", "f": "f4", "d": "f4"}.items():
        assert batch[name].dtype == dtype
        assert batch[name].tolist() == ids.tolist()
    assert batch["dec"].tolist() == (ids / 4).tolist()
    assert batch["even"].tolist() == (ids % 2 == 0).tolist()
    assert batch["text"].tolist() == [f"row {i}" for i in range(10)]
    assert batch["c"][0] == "ab"
    assert batch["bytes"][7] == b"7"
    assert batch["day"].tolist() == [
        datetime.date(1970, 1, 1) + datetime.timedelta(i) for i in range(10)
    ]
    assert batch["moment"].astype(np.int64).tolist() == (ids * 1_000_000).tolist()  # UTC
    assert batch["wall"][0] == np.datetime64("2024-01-01T00:00:01")
    assert batch["span"].astype(np.int64).tolist() == (ids * 1_000_000).tolist()
    assert batch["pair"].tolist() == [[i, i + 1] for i in range(10)]
    assert batch["ragged"].lengths.tolist() == [i % 3 for i in range(10)]
    assert batch["matrix"].shape == (10, 2, 2)
    assert batch["matrix"][9].tolist() == [[1, 2], [3, 9]]
    assert batch["words"].tolist() == [["x", "y"]] * 10
    assert batch["nested"]["x"].tolist() == ids.tolist()
    assert batch["nested"]["p"]["y"].dtype == np.float32
    assert batch["nested"]["p"]["y"].tolist() == [[1.5, 2.5]] * 10
    assert batch["sometimes"].tolist() == [-1 if i == 3 else i for i in range(10)]
    assert batch["sometimes_is_null"].tolist() == [i == 3 for i in range(10)]
    assert batch["dense"].tolist() == [[i, 1] for i in range(10)]
    assert batch["sparse"].tolist() == [[2.0 * (i % 3 == at) for at in range(3)] for i in range(10)]
    for sql, words in {
        "SELECT map('a', 1) AS m": r"'m' has the type map<string,int>.*map_values",
        "SELECT null AS n": "'n' has the type void.*cast it",
        "SELECT make_ym_interval(1, 2) AS y": "'y' has the type interval year to month",
        "SELECT array(named_struct('x', 1)) AS p": "'p' has arrays of the type struct",
        "SELECT 1 AS x, 2 AS x": "2 columns have the name 'x'",
        "SELECT named_struct('x', 1) AS s, 2 AS `s.x`": "2 columns or fields of structs would",
        "SELECT parse_json('1') AS v": "'v' has the type variant",
    }.items():
        if "variant" in words and spark.version < "4":
            continue
        with pytest.raises(DataError, match=words):
            data.from_dataframe(spark.sql(sql))


def test_ranks_get_every_row_once_in_equal_steps(spark: Any, tmp_path: Path) -> None:
    """Row counts that divide nothing, and empty partitions."""
    df = spark.range(0, 1009, 1, 3).filter("id < 300 OR id > 700").repartition(7)
    rows = df.count()
    train = data.from_dataframe(df.selectExpr("id", "array(id, id * 2) AS features"))
    few = data.from_dataframe(spark.range(1))

    def main(directory: str) -> dict[str, Any]:
        import os

        rank = os.environ["RANK"]
        seen: dict[str, Any] = {}
        for remainder in ("drop", "pad", "uneven"):
            batches = train.torch(32, shuffle=True, seed=1, remainder=remainder)
            ids = [batch["id"].tolist() for batch in batches]
            seen[remainder] = len(ids)
            Path(directory, f"{remainder}-{rank}").write_text(repr(ids))
        try:
            few.numpy(1)
        except DataError as error:
            seen["few"] = str(error)
        return seen

    seen = HorovodRunner(np=2).run(main, directory=str(tmp_path))
    whole = rows // 64
    assert seen["drop"] == whole
    assert "1 rows, fewer than the 2 ranks" in seen["few"]
    stored = sorted(row.id for row in df.collect())
    for remainder in ("drop", "pad", "uneven"):
        ranks = [eval((tmp_path / f"{remainder}-{rank}").read_text()) for rank in range(2)]
        assert len(ranks[0]) == len(ranks[1])
        ids = [row for rank in ranks for batch in rank for row in batch]
        assert set(ids) <= set(stored)
        if remainder == "uneven":
            assert sorted(ids) == stored
        elif remainder == "pad":
            assert set(ids) == set(stored)
            assert len(ids) == -(-rows // 64) * 64
        else:
            assert len(ids) == len(set(ids)) == whole * 64


def test_a_plan_is_stored_once_until_it_is_deleted(spark: Any, tmp_path: Path) -> None:
    def places() -> int:
        return len(list(tmp_path.glob("cache/horovodrunner-data-*")))

    spark.range(5).write.parquet(str(tmp_path / "table"))

    def stored(**options: Any) -> Any:
        df = spark.read.parquet(str(tmp_path / "table")).selectExpr("id * 2.0D AS x")
        return data.from_dataframe(df, tmp_path / "cache", **options)

    first = stored()
    assert stored() is first
    assert stored(dtype="float32") is not first
    assert stored(reuse=False) is not first
    assert places() == 3
    spark.range(7).write.mode("overwrite").parquet(str(tmp_path / "table"))
    assert len(stored()) == 7  # the same plan over other files is not the same
    assert places() == 4
    spark.conf.set("spark.horovodrunner.data.cacheLimit", "10000")
    try:
        big = spark.range(1000)
        assert len(data.from_dataframe(big, tmp_path / "cache")) == 1000
        assert places() < 5  # what nobody holds made room
        assert len(list(first.numpy(5))) == 1
        with pytest.raises(DataError, match=r"16,[\d,]+ bytes.*limit of 10,000.*cacheLimit"):
            data.from_dataframe(spark.range(2000), tmp_path / "cache")
    finally:
        spark.conf.unset("spark.horovodrunner.data.cacheLimit")
    (tmp_path / "cache" / "of-others").touch()
    first.delete()
    with pytest.raises(DataError, match="was deleted"):
        first.numpy(1)
    with stored() as again:
        assert len(again) == 7
    cache.delete_all()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["of-others"]


def values(df: Any, **options: Any) -> list[Any]:
    """Store one partition of a column x, and read it."""
    rows = data.from_dataframe(df.coalesce(1), **options)
    return next(iter(rows.numpy(len(rows), rank=0, size=1)))["x"].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_files_that_changed_are_read_again(spark: Any, tmp_path: Path, kind: str) -> None:
    """Whatever stays: the path, the size, the time of the last change, the DataFrame itself."""
    read = spark.read.format(kind).schema("x double, p int")

    def written(number: float, path: str) -> Path:
        """Write one file, with the name that the last one had."""
        spark.range(1).selectExpr(f"{number}D AS x").coalesce(1).write.format(kind).mode(
            "overwrite"
        ).save(str(tmp_path / "new"))
        [new] = (tmp_path / "new").glob("part-*")
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return new.rename(target)

    first = written(1.0, "table/p=1/rows")
    df = read.load(str(tmp_path / "table"))
    assert values(df) == [1.0]
    times = first.stat()
    written(2.0, "table/p=1/rows")
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert first.stat().st_size == times.st_size
    assert values(read.load(str(tmp_path / "table"))) == [2.0]
    if kind == "csv":
        return
    assert values(df) == [2.0]
    stored = data.from_dataframe(df.coalesce(1))
    again = read.load(str(tmp_path / "table")).coalesce(1)
    assert data.from_dataframe(again) is stored
    written(3.0, "table/p=2/rows")
    largest = f"SELECT (SELECT max(x) FROM parquet.`{tmp_path}/table`) AS x"
    assert values(spark.sql(largest)) == [3.0]
    written(4.0, "table/p=2/rows")
    assert values(spark.sql(largest)) == [4.0]
    assert sorted(values(read.load(str(tmp_path / "table/*")).select("x"))) == [2.0, 4.0]


def test_rows_that_may_be_others_are_computed_again(spark: Any, tmp_path: Path) -> None:
    from pyspark.ml.feature import VectorAssembler
    from pyspark.sql import functions

    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x": [1.0, 2.0]}), file)
    df = spark.read.parquet(str(file))
    udf = functions.udf(lambda x: x, "double")
    cached = spark.read.parquet(str(file)).where("x > 0").cache()
    for unknown in (
        df.select(functions.rand(seed=1).alias("x")),
        df.selectExpr("monotonically_increasing_id() AS x"),
        df.selectExpr("x", "input_file_name() AS f"),
        df.selectExpr("reflect('java.util.UUID', 'randomUUID') AS x"),
        df.select(udf("x").alias("x")),
        df.where(udf("x") > 0),
        spark.range(1).where(f"id IN (SELECT cast(x * rand() AS int) FROM parquet.`{file}`)"),
        df.mapInArrow(lambda batches: batches, "x double"),
        df.groupBy("x").applyInPandas(lambda frame: frame, "x double"),
        VectorAssembler(inputCols=["x"], outputCol="v").transform(df),
        cached,
        cached.select("x"),
        df.localCheckpoint(),
        df.rdd.toDF(),
        spark.sparkContext.parallelize([1]).map(lambda _: (file.stat().st_size,)).toDF("x int"),
        spark.sql("SHOW TABLES"),
    ):
        assert origin_of(unknown) is None
    cached.unpersist()

    now = df.selectExpr("unix_micros(current_timestamp()) AS x")
    assert values(now) != values(now)
    local = spark.createDataFrame([(1.0,)], "x double")
    for known in (
        df.groupBy("x").count(),
        df.randomSplit([0.5, 0.5], seed=1)[0],
        df.join(df.withColumnRenamed("x", "y"), functions.expr("x < y")).orderBy("x"),
        df.selectExpr("explode(array(x, x)) AS x", "struct(x) AS s"),
        spark.sql(f"WITH t AS (SELECT * FROM parquet.`{file}`) SELECT * FROM t UNION ALL TABLE t"),
        df.selectExpr("current_date() AS day", "x"),
        spark.range(3),
        spark.sql("VALUES (1), (2)"),
        local,
        local.coalesce(1).select("x"),
    ):
        found, again = origin_of(known), origin_of(known.select("*"))
        assert found is not None
        assert again is not None
        assert found.is_same_as(again)
    assert values(spark.createDataFrame([(2.0,)], "x double")) == [2.0]
    assert values(spark.createDataFrame([(3.0,)], "x double")) == [3.0]
    assert len(values(spark.read.parquet(str(file), str(file)))) == 4
    assert len(values(spark.read.parquet(*[str(file)] * 3))) == 6


def test_tables_and_views_that_changed_are_read_again(spark: Any, tmp_path: Path) -> None:
    spark.range(1).selectExpr("1.0D AS x").createOrReplaceTempView("changing")
    assert values(spark.table("changing")) == [1.0]
    spark.range(1).selectExpr("2.0D AS x").createOrReplaceTempView("changing")
    assert values(spark.table("changing")) == [2.0]
    name = f"changing_{tmp_path.name}"
    try:
        for number, how in ((1.0, "errorifexists"), (2.0, "overwrite")):
            rows = spark.sql(f"SELECT {number}D AS x, 1 AS p")
            rows.write.mode(how).partitionBy("p").option("path", str(tmp_path / name)).saveAsTable(
                name
            )
            assert values(spark.table(name)) == [number]
        assert origin_of(spark.table(name)) is not None
        spark.sql("SELECT 3.0D AS x, 2 AS p").write.insertInto(name)
        assert sorted(values(spark.table(name))) == [2.0, 3.0]
    finally:
        spark.sql(f"DROP TABLE IF EXISTS {name}")


def test_settings_belong_to_what_is_read(spark: Any, tmp_path: Path) -> None:
    (tmp_path / "times.csv").write_text("2020-01-01 00:00:00\n")

    def stored() -> Any:
        df = spark.read.schema("t timestamp").csv(str(tmp_path / "times.csv"))
        return next(iter(data.from_dataframe(df).numpy(1, rank=0, size=1)))["t"][0]

    before = spark.conf.get("spark.sql.session.timeZone")
    found = []
    try:
        for zone in ("UTC", "Asia/Tokyo"):
            spark.conf.set("spark.sql.session.timeZone", zone)
            found.append(stored())
    finally:
        spark.conf.set("spark.sql.session.timeZone", before)
    assert str(found[0] - found[1]) == "32400000000 microseconds"


def test_a_hadoop_file_system_says_what_changed(spark: Any, tmp_path: Path) -> None:
    """Not Python's view of the file, but that of the file system which Spark reads."""
    file = tmp_path / "rows.parquet"
    states = []
    for number in (1, 2):
        pq.write_table(pa.table({"x": [number]}), file)
        os.utime(file, (number, number + 0.125))
        states.append(origin._hadoop_status(spark, file.as_uri()))
    assert states == [(file.stat().st_size, changed_ms, "") for changed_ms in (1125, 2125)]


def test_what_somebody_else_deleted_is_stored_again(spark: Any, tmp_path: Path) -> None:
    first = data.from_dataframe(spark.range(5), tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    again = data.from_dataframe(spark.range(5), tmp_path / "cache")
    assert again is not first
    assert len(list(again.numpy(5, rank=0, size=1))) == 1
    again.delete()


def test_what_fails_leaves_nothing(spark: Any, tmp_path: Path) -> None:
    from pyspark.sql.functions import udf

    with pytest.raises(DataError, match=r"column 'x' has 1 nulls among .*data.fill"):
        data.from_dataframe(spark.sql("SELECT nullif(id, 7) AS x FROM range(10)"), tmp_path)

    fails = udf(lambda number: 1 // (number - 5), "long")

    with pytest.raises(DataError, match="computed: ZeroDivisionError"):
        data.from_dataframe(spark.range(10).select(fails("id").alias("x")), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"cannot be written to /proc/none.*cache_dir"):
        data.from_dataframe(spark.range(10), "/proc/none")
    with pytest.raises(DataError, match=r"wrote \d files to memory:.* is not there.* all hosts"):
        data.from_dataframe(spark.range(10), "memory://of-each-process")
    empty = data.from_dataframe(spark.range(0), tmp_path)
    assert len(empty) == 0
    with pytest.raises(DataError, match="0 rows"):
        empty.numpy(1)


OTHERS: dict[str, tuple[Any, str]] = {
    "column": (lambda df: df.id, r"Column: .*df.select\(column\)"),
    "RDD": (lambda df: df.rdd, r"RDD: .*rdd.toDF\(\)"),
    "groups": (lambda df: df.groupBy("id"), r"GroupedData: .*groups.agg"),
    "writer": (lambda df: df.write, r"DataFrameWriter: .*give the DataFrame that it writes"),
    "reader": (lambda df: df.sparkSession.read, r"DataFrameReader: .*\.parquet\(path\)"),
    "session": (lambda df: df.sparkSession, r"SparkSession: .*spark.table\(name\)"),
    "row": (lambda df: df.head(), r"Row: .*createDataFrame\(rows\)"),
    "method": (lambda df: df.cache, "of type method: .*with parentheses"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_sparks_and_no_dataframe_is_told_with_what_to_give(kind: str, spark: Any) -> None:
    make, text = OTHERS[kind]
    with pytest.raises(ConfigurationError, match=text):
        data.from_dataframe(make(spark.range(3)))


def test_a_streaming_dataframe_is_refused(spark: Any) -> None:
    stream = spark.readStream.format("rate").load()
    with pytest.raises(ConfigurationError, match=r"df is a streaming DataFrame, .*foreachBatch"):
        data.from_dataframe(stream)
