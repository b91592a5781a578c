"""Columns of all kinds of names, wherever a DataFrame is taken."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import functions
from pyspark.sql.types import DoubleType, StructField, StructType

from horovodrunner import ArgumentValueError, DataError, HorovodRunner, data
from horovodrunner.compat.petastorm import make_batch_reader
from horovodrunner.compat.petastorm.spark import make_spark_converter
from horovodrunner.inference import predict, predict_udf

pytestmark = pytest.mark.spark

NAMES = [
    *("a.b", "a", "a`b", "`x`", "with space", " ", "", "größe", "it's", 'a "b"', "two\nlines"),
    *("Label", "label", "_private", "class", "1st", "count", "_0", "a.b.c", "a;b,c{d}(e)=\t"),
]


def values(number: int) -> tuple[float, ...]:
    return tuple(float(10 * place + number) for place in range(len(NAMES)))


@pytest.fixture(scope="module")
def frame(spark: Any) -> Any:
    """Columns of numbers, and a vector and a struct with names that Spark would misread."""
    from pyspark.ml.functions import array_to_vector

    schema = StructType([StructField(name, DoubleType()) for name in NAMES])
    numbers = spark.createDataFrame([values(number) for number in range(4)], schema)
    dotted, cased = functions.col("`with space`"), functions.col("`größe`")
    return numbers.withColumn("v.`w", array_to_vector(functions.array(dotted, cased))).withColumn(
        "s.t", functions.struct(dotted.alias("u.v"), cased.alias("x y"))
    )


def check(batch: dict[str, Any]) -> None:
    """Compare a batch with the rows, the first of which is whichever."""
    number = int(batch["a.b"][0])
    for name, value in zip(NAMES, values(number), strict=True):
        assert float(batch[name][0]) == value, name
    pair = [float(batch["with space"][0]), float(batch["größe"][0])]
    assert batch["v.`w"][0].tolist() == pair
    assert [float(each[0]) for each in batch["s.t"].values()] == pair
    assert list(batch["s.t"]) == ["u.v", "x y"]


def read(train: data.DataSet) -> int:
    for batch in train.torch(1):
        check(batch)
    (first, *_) = train.numpy(1, columns=["a.b", "s.t", "v.`w", "s.t.x y"])
    assert sorted(first) == ["a.b", "s.t", "v.`w"]
    return len(train)


@pytest.mark.parametrize("sensitive", ["true", "false"])
def test_data_sets_have_columns_of_any_name(
    spark: Any, frame: Any, tmp_path: Path, sensitive: str
) -> None:
    spark.conf.set("spark.sql.caseSensitive", sensitive)
    try:
        with data.from_dataframe(frame, tmp_path, dtype="float64") as stored:
            assert read(stored) == 4
        if sensitive == "false":
            train = data.from_dataframe(frame, shared=False)
            assert HorovodRunner(np=2).run(read, train=train) == 4
    finally:
        spark.conf.unset("spark.sql.caseSensitive")


def test_predictions_have_columns_of_any_name(spark: Any, frame: Any) -> None:
    found = predict(
        frame,
        lambda: lambda first, second: first + second,
        inputs=["a.b", "Label"],
        return_type="double",
        batch_size=2,
        output="pre.dicted`",
        keep_columns=[*reversed(NAMES), "v.`w"],
        key_columns=["a`b"],
    )
    assert found.columns == [*reversed(NAMES), "v.`w", "pre.dicted`"]
    for row in found.collect():
        number = int(row[len(NAMES) - 1])
        assert list(row[: len(NAMES)]) == list(reversed(values(number)))
        assert row[-1] == values(number)[0] + values(number)[NAMES.index("Label")]

    def named(batch: dict[str, Any]) -> dict[str, Any]:
        return {"x": batch["a.b"] + batch["a`b"]}

    score = predict_udf(
        lambda: lambda x: x, return_type="double", batch_size=2, batch_transform=named
    )
    rows = frame.select(score("`a.b`", "`a``b`")).collect()
    assert sorted(row[0] for row in rows) == [20.0, 22.0, 24.0, 26.0]


def test_petastorm_has_columns_of_any_name_where_rows_are_no_namedtuples(
    spark: Any, frame: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spark.conf.set("petastorm.spark.converter.parentCacheDirUrl", tmp_path.as_uri())
    try:
        with caplog.at_level(logging.WARNING):
            converter = make_spark_converter(frame, dtype="float64")
    finally:
        spark.conf.unset("petastorm.spark.converter.parentCacheDirUrl")
    assert "the columns 'a.b', 'a`b', '`x`'" in caplog.text
    with converter.make_torch_dataloader(batch_size=1, num_epochs=1) as loader:
        for batch in loader:
            check(batch)
    some = ["a.b", "S|s.t"]  # a name, and an expression
    with converter.make_torch_dataloader(1, num_epochs=1, schema_fields=some) as loader:
        assert sorted(next(iter(loader))) == ["a.b", "s.t"]
    with pytest.raises(DataError, match=r"^the columns 'a.b' .*namedtuples.*withColumnRenamed"):
        converter._columns(converter._options(1, 1, {"schema_fields": ["a.b"]})).row_class  # noqa: B018
    converter.delete()
    frame.select("`a.b`", "count").write.parquet(str(tmp_path / "files"))
    with pytest.raises(DataError, match=r"^the columns 'a.b' .*namedtuples.*schema_fields"):
        make_batch_reader((tmp_path / "files").as_uri())
    with make_batch_reader((tmp_path / "files").as_uri(), ["count"]) as reader:
        assert sum(len(row[0]) for row in reader) == 4


def test_what_no_batch_could_tell_apart_is_refused_with_the_remedy(spark: Any) -> None:
    one = spark.range(2).selectExpr("id", "1.0 AS x")
    double: Any = lambda: lambda x: x * 2.0  # noqa: E731
    two = spark.range(2).selectExpr("id", "2.0 AS x")
    joined = one.join(two, one.id == two.id)
    with pytest.raises(DataError, match=r"^2 columns have the name 'id': join with on='id'"):
        data.from_dataframe(joined)
    options: dict[str, Any] = {"return_type": "double", "batch_size": 2}
    with pytest.raises(ArgumentValueError, match=r"^the column 'x': there are several .* join on"):
        predict(joined, double, inputs="x", **options)
    twice = spark.range(2).selectExpr("named_struct('x', id, 'x', id) AS s", "id AS `s.y`")
    with pytest.raises(DataError, match=r"^2 columns or fields of structs .* 's\.x': rename"):
        data.from_dataframe(twice)
    with pytest.raises(ArgumentValueError, match=r"^the column 's' has a struct with two fields"):
        predict(twice, double, inputs=["s.y"], **options)
