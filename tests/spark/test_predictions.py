"""Models applied to DataFrames on two executors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import pyspark.cloudpickle
import torch

from horovodrunner import ArgumentTypeError, ArgumentValueError
from horovodrunner.inference import Model, predict, predict_batch_udf, predict_udf
from horovodrunner.inference.options import spark_type

pytestmark = pytest.mark.spark

# The executors do not have this module.
pyspark.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def frame(spark: Any) -> Any:
    """100 rows of numbers, arrays, text and structs, in several partitions."""
    from pyspark.sql import functions as f

    numbers = [f.col("id").cast("double").alias("d"), f.col("id").cast("int").alias("i")]
    found = spark.range(0, 100, 1, 3).select("id", *numbers)
    return found.select(
        "*",
        f.col("id").cast("float").alias("f"),
        f.array("d", f.col("d") + 1, f.col("d") + 2, f.col("d") + 3).alias("t4"),
        f.array(*(f.col("id").cast("float") for _ in range(3))).alias("t3"),
        f.concat(f.lit("row "), f.col("id")).alias("text"),
        f.when(f.col("id") % 10 != 0, f.col("d")).alias("holes"),
        f.col("d").alias("a.`dot"),
    ).cache()


def twice() -> Callable[..., Any]:
    return lambda x: x * 2


def total() -> Callable[..., Any]:
    return lambda x: np.sum(x, axis=1)


def total_of_four() -> Callable[..., Any]:
    def predict(a: Any, b: Any, c: Any, d: Any) -> Any:
        return a + b + c + d

    return predict


def total_of_two() -> Callable[..., Any]:
    return lambda x, y: np.sum(x, axis=1) + np.sum(y, axis=1)


def columns() -> Callable[..., Any]:
    return lambda x, y: {"one": np.sum(x, axis=1), "two": np.sum(y, axis=1)}


def columns_of_arrays() -> Callable[..., Any]:
    return lambda x, y: {"one": x * 2, "two": y * 2}


def dicts() -> Callable[..., Any]:
    return lambda x, y: [{"one": a.sum(), "two": b.sum()} for a, b in zip(x, y, strict=True)]


def row_arrays() -> Callable[..., Any]:
    return lambda x: [{"one": row, "two": str(len(row))} for row in x]


def in_place() -> Callable[..., Any]:
    def predict(x: Any) -> Any:
        x /= 4
        return x

    return predict


def lengths_of_text() -> Callable[..., Any]:
    return lambda texts: np.array([len(text) for text in texts])


def images() -> Callable[..., Any]:
    def predict(x: Any) -> Any:
        assert x.shape[1:] == (2, 2)
        return x.reshape(len(x), -1) - x.mean((1, 2))[:, None]

    return predict


def test_what_predict_batch_udf_does_is_done_with_the_same_results(spark: Any, frame: Any) -> None:
    """The cases of its documentation, and those of its code."""
    from pyspark.ml.functions import predict_batch_udf as sparks
    from pyspark.sql import functions as f

    four = [f.col(name) for name in ("d", "f", "i", "id")]
    two = "one float, two float"
    cases: dict[str, tuple[Any, str, list[Any], Any]] = {
        "a scalar": (twice, "float", ["id"], None),
        "integers": (twice, "long", ["i"], None),
        "array()": (total, "float", [f.array("d", "f", "i", "id")], [[4]]),
        "scalars for as many inputs": (total_of_four, "float", four, None),
        "a struct for one input": (total, "double", [f.struct(*four)], None),
        "a struct for as many inputs": (total_of_four, "float", [f.struct(*four)], None),
        "tensors": (total_of_two, "float", ["t4", "t3"], [[4], [3]]),
        "sparse shapes": (total_of_two, "float", ["t4", "t3"], {0: [4], 1: [3]}),
        "two dimensions": (images, "array<double>", ["t4"], [[2, 2]]),
        "a dict of columns": (columns, two, ["t4", "t3"], [[4], [3]]),
        "a list of dicts": (dicts, two, ["t4", "t3"], [[4], [3]]),
        "arrays": (twice, "array<float>", ["t4"], [[4]]),
        "arrays in a dict": (
            columns_of_arrays,
            "one array<float>, two array<double>",
            ["t4", "t3"],
            [[4], [3]],
        ),
        "arrays in dicts": (row_arrays, "one array<double>, two string", ["t4"], [[4]]),
        "text": (lengths_of_text, "int", ["text"], None),
        "nulls": (twice, "double", ["holes"], None),
        "whole numbers as integers": (twice, "int", ["d"], None),
        "inputs changed in place": (in_place, "array<double>", ["t4"], [[4]]),
        "a column of one": (lambda: lambda x: x[:, None], "double", ["d"], None),
    }

    rows = frame.coalesce(1)
    for name, (function, kind, inputs, shapes) in cases.items():
        options = {
            "return_type": spark_type(kind, spark),
            "batch_size": 7,
            "input_tensor_shapes": shapes,
        }
        expected, found = (
            [row.asDict(recursive=True) for row in rows.select("id", made(*inputs)).collect()]
            for made in (sparks(function, **options), predict_batch_udf(function, **options))
        )
        assert len(expected) == 100
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_equal(list(other.values()), list(one.values()), name)


def test_before_spark_4_1_pandas_does_the_same(
    spark: Any, frame: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyspark.sql import functions as f

    monkeypatch.delattr(f, "arrow_udf", raising=False)
    kind = spark_type("one array<float>, two array<double>", spark)
    pairs = predict_udf(columns_of_arrays, return_type=kind, batch_size=7)
    of_struct = predict_udf(total_of_four, return_type="double", batch_size=7, on_error="null")
    holes = predict_udf(twice, return_type="int", batch_size=7, nulls="raise", on_error="null")
    found = (
        frame.select(
            "id",
            pairs("t4", "t3").alias("pairs"),
            of_struct(f.struct("d", "f", "i", "id")).alias("total"),
            holes("holes").alias("holes"),
        )
        .orderBy("id")
        .collect()
    )
    assert [row.total.asDict() for row in found] == [
        {"prediction": 4.0 * n, "error": None} for n in range(100)
    ]
    assert [row.holes.prediction for row in found] == [
        2 * n if n % 10 else None for n in range(100)
    ]
    assert found[10].holes.error == "column 'holes' is null, and nulls='raise' refuses that"
    assert found[3].pairs.asDict() == {"one": [6.0, 8.0, 10.0, 12.0], "two": [6.0] * 3}


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    wide = 8192  # so that the weights travel by themselves
    return torch.nn.Sequential(torch.nn.Linear(4, wide), torch.nn.ReLU(), torch.nn.Linear(wide, 3))


@pytest.fixture(scope="module")
def expected(net: torch.nn.Module) -> np.ndarray:
    given = torch.arange(100.0)[:, None] + torch.arange(4.0)
    with torch.no_grad():
        found: np.ndarray = net(given).numpy()
    return found


def test_a_model_is_a_column_in_dataframes_and_in_sql(
    spark: Any, frame: Any, net: torch.nn.Module, expected: np.ndarray
) -> None:
    with Model.from_torch(net) as model:
        score = predict_udf(model, return_type="array<float>", batch_size=32)
        spark.udf.register("score", score)
        frame.createOrReplaceTempView("numbers")
        in_sql = "SELECT id, score(t4) AS arrays, score(d, d + 1, d + 2, d + 3) AS scalars"
        for rows in (
            frame.select("id", score("t4").alias("arrays"), score(frame.t4).alias("scalars")),
            spark.sql(f"{in_sql} FROM numbers"),
        ):
            found = rows.orderBy("id").collect()
            for name in ("arrays", "scalars"):
                values = np.array([row[name] for row in found])
                np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3)


def test_a_model_is_applied_to_a_dataframe_and_to_a_stream(
    spark: Any, frame: Any, net: torch.nn.Module, expected: np.ndarray, tmp_path: Path
) -> None:
    files = str(tmp_path / "rows")
    frame.select("id", "t4", "text").repartition(3).write.parquet(files)
    with Model.from_torch(net) as model:
        options: dict[str, Any] = {
            "inputs": "t4",
            "return_type": "array<float>",
            "batch_size": 32,
            "output": "scores",
        }
        all_columns = predict(frame, model, **options)
        assert all_columns.columns == [*frame.columns, "scores"]
        read = spark.read.parquet(files)
        stream = spark.readStream.schema(read.schema).parquet(files)
        score = predict_udf(model, return_type="array<float>", batch_size=32)
        streams = {
            "frame": predict(stream, model, **options, keep_columns=["id"]),
            "column": stream.select("id", score("t4").alias("scores")),
        }
        for name, rows in streams.items():
            writer = rows.writeStream.format("memory").queryName(name).trigger(availableNow=True)
            writer.start().awaitTermination(120)
        for rows in (
            all_columns.select("id", "scores"),
            predict(read, model, **options, keep_columns=["id"]),
            predict(read, model, **options, keep_columns=["id"], read_files=False),
            *map(spark.table, streams),
        ):
            found = rows.orderBy("id").collect()
            values = np.array([row.scores for row in found])
            np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3)
            assert [row.id for row in found] == list(range(100))


def test_files_that_are_read_past_the_jvm(
    spark: Any, frame: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said, and can be switched off."""
    files = str(tmp_path / "rows")
    frame.select("id", "d", "text").coalesce(2).write.parquet(files)
    options: dict[str, Any] = {"inputs": "d", "return_type": "double", "batch_size": 8}
    read = spark.read.parquet(files)
    scored = predict(read, twice, **options)
    assert "predict reads 2 Parquet files (100 rows) in Python" in capsys.readouterr().out
    assert sorted(map(tuple, scored.collect())) == [
        (n, float(n), f"row {n}", 2.0 * n) for n in range(100)
    ]
    for switched_off in (
        predict(read, twice, **options, read_files=False),
        predict(frame, twice, **options),
    ):
        assert switched_off.columns[-1] == "prediction"
        assert not capsys.readouterr().out
    with pytest.warns(DeprecationWarning, match=r"^keep= .* keep_columns="):
        renamed = predict(read, twice, **options, keep=["id"])  # type: ignore[call-arg]
    assert renamed.columns == ["id", "prediction"]
    with pytest.raises(ArgumentValueError, match="read_files=True: df is cached"):
        predict(frame, twice, **options, keep_columns=["id"], read_files=True)


def failing() -> Callable[..., Any]:
    def predict(x: Any, *_: Any) -> Any:
        if (x == 42).any():
            raise ArithmeticError("42 has no answer")
        return x

    return predict


def test_rows_that_cannot_be_scored(spark: Any, frame: Any) -> None:
    from pyspark.errors import PythonException

    options: dict[str, Any] = {
        "return_type": "double",
        "batch_size": 16,
        "key_columns": ["id", "text"],
    }
    message = (
        "PredictionError: the model failed on the row with id=42, text='row 42': ArithmeticError"
    )
    for rows in (
        predict(frame, failing, inputs=["d"], **options),
        frame.select(predict_udf(failing, **options)("d")),
    ):
        with pytest.raises(PythonException) as raised:
            rows.collect()
        assert message in str(raised.value)

    options["on_error"] = "null"
    one = predict(frame, failing, inputs=["d"], keep_columns=["id"], error_column="why", **options)
    other = frame.select("id", predict_udf(failing, **options)("d").alias("made")).select(
        "id", "made.*"
    )
    assert one.columns == ["id", "prediction", "why"]
    assert other.columns == ["id", "prediction", "error"]
    for rows in (one, other):
        found = rows.orderBy("id").collect()
        assert tuple(found[42]) == (42, None, "ArithmeticError: 42 has no answer")
        assert [tuple(row) for row in found if row.id != 42] == [
            (n, float(n), None) for n in range(100) if n != 42
        ]
    structs = predict_udf(
        lambda: lambda x: {"a": failing()(x), "b": x},
        return_type="a double, b double",
        batch_size=9,
        on_error="null",
    )
    found = (
        frame.select("id", structs("d").alias("made"))
        .select("id", "made.*")
        .orderBy("id")
        .collect()
    )
    assert tuple(found[42]) == (42, None, None, "ArithmeticError: 42 has no answer")
    assert tuple(found[43]) == (43, 43.0, 43.0, None)


def test_a_transform_knows_the_columns(spark: Any, frame: Any) -> None:
    def lengths(batch: dict[str, Any]) -> dict[str, Any]:
        return {"x": np.array([len(text) for text in batch["text"]], np.float64) + batch["d"]}

    expected = [len(f"row {n}") + n for n in range(100)]
    options: dict[str, Any] = {
        "return_type": "double",
        "batch_size": 16,
        "batch_transform": lengths,
    }
    by_name = predict_udf(lambda: lambda x: x, **options)
    named = predict_udf(lambda: lambda x: x, **options, input_names=["text", "d"])
    renamed = {**options, "batch_transform": lambda batch: {"x": batch["a.`dot"] + 6}}
    dotted = predict(
        frame, lambda: lambda x: x, inputs="a.`dot", keep_columns=["id", "a.`dot"], **renamed
    )
    assert [row.prediction - row.id for row in dotted.collect()] == [6] * 100
    for rows in (
        predict(frame, lambda: lambda x: x, inputs=["text", "d"], **options),
        frame.select("id", by_name("text", "d").alias("prediction")),
        frame.select("id", named(frame.text, frame.d).alias("prediction")),
    ):
        assert [row.prediction for row in rows.orderBy("id").collect()] == expected
    with pytest.raises(ArgumentTypeError, match="was given 1 columns, and input_names has 2"):
        named("text")


def test_what_cannot_work_is_refused_at_once(spark: Any, frame: Any, net: torch.nn.Module) -> None:
    good: dict[str, Any] = {"return_type": "double", "batch_size": 16}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 0}, "batch_size=0: it must be at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5: it must be an int"),
        ({"on_error": "skip"}, "on_error='skip': it must be 'raise' or 'null'"),
        ({"nulls": "drop"}, "nulls='drop'"),
        ({"return_type": "flaot"}, "return_type='flaot' is no type that Spark knows"),
        ({"return_type": float}, "return_type=<class 'float'>: give a type"),
        ({"return_type": "map<string,int>"}, "map"),
        ({"key_columns": "id"}, r"key_columns='id': give a list"),
        ({"batch_transform": 3}, "batch_transform=3: give a function"),
        ({"transform_workers": 2}, "there is no batch_transform for them"),
        ({"batch_transform": dict, "input_tensor_shapes": [[2]]}, "let it reshape them"),
    ]
    for wrong, text in refused:
        with pytest.raises((ArgumentTypeError, ArgumentValueError), match=text):
            predict_udf(twice, **{**good, **wrong})
    refused = [
        ({"inputs": ["absent"]}, "the column 'absent': there is none among id, d"),
        ({"inputs": []}, "name the columns"),
        ({"keep_columns": "id"}, r"keep_columns='id': give a list, \['id'\]"),
        ({"output": "d"}, "two columns 'd'"),
        ({"output": "error", "on_error": "null"}, "two columns 'error'"),
        ({"read_files": "never"}, "read_files='never'"),
    ]
    for wrong, text in refused:
        with pytest.raises((ArgumentTypeError, ArgumentValueError), match=text):
            predict(frame, twice, **{"inputs": "d", **good, **wrong})
    with pytest.raises(ArgumentTypeError, match=r"Sequential: wrap it, Model.from_torch"):
        predict_udf(net, **good)
    with pytest.raises(ArgumentTypeError, match="model=3: give a Model"):
        predict_udf(3, **good)  # type: ignore[arg-type]
