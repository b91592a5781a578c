"""Models applied to DataFrames on two executors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from horovodrunner.inference import Model, predict, predict_batch_udf, predict_udf

pytestmark = pytest.mark.spark


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
        "floats cut to integers": (lambda: lambda x: x + 0.7, "int", ["d"], None),
        "inputs changed in place": (in_place, "array<double>", ["t4"], [[4]]),
        "a column of one": (lambda: lambda x: x[:, None], "double", ["d"], None),
    }

    def results(made: Any) -> list[dict[str, Any]]:
        selected = [
            made(function, return_type=_kind(spark, kind), batch_size=7, input_tensor_shapes=shapes)(
                *inputs
            ).alias(name)
            for name, (function, kind, inputs, shapes) in cases.items()
        ]
        rows = frame.select("id", *selected).orderBy("id").collect()
        return [row.asDict(recursive=True) for row in rows]

    expected = results(sparks)
    assert len(expected) == 100
    np.testing.assert_equal(results(predict_batch_udf), expected)


def _kind(spark: Any, text: str) -> Any:
    from pyspark.sql.types import StructType

    if " " in text:
        return StructType.fromDDL(text) if hasattr(StructType, "fromDDL") else spark.createDataFrame([], text).schema
    return spark.createDataFrame([], f"x {text}").schema["x"].dataType
