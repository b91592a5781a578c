"""What is given instead of a Spark DataFrame is told by its type, with the call that makes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from horovodrunner import ArgumentTypeError, data
from horovodrunner.compat.petastorm.spark import make_spark_converter
from horovodrunner.inference import predict


def _pandas(what: str) -> Any:
    return getattr(pytest.importorskip("pandas"), what)([1])


GIVEN: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, r"df=None: .*df.show\(\), .* return no DataFrame"),
    "frame": (lambda: _pandas("DataFrame"), r"pandas\..*DataFrame: .*createDataFrame\(frame\)"),
    "series": (lambda: _pandas("Series"), r"createDataFrame\(series.to_frame\(\)\)"),
    "arrow": (lambda: pa.table({"a": [1]}), r"pyarrow.lib.Table: .*table.to_pandas\(\)"),
    "rows": (lambda: [{"a": 1}], r"of type list: .*createDataFrame\(rows\)"),
    "columns": (lambda: {"a": [1]}, "of type dict: .*createDataFrame"),
    "array": (lambda: np.zeros(3), r"numpy.ndarray: .*createDataFrame\(array\)"),
    "number": (lambda: 3, "of type int: .*, not int"),
    "stored": (lambda: data.DataSet.__new__(data.DataSet), r"are stored: give it to run\(\)"),
    "path": (lambda: Path("/a/b"), r"df=PosixPath\('/a/b'\): .*spark.read.parquet\('/a/b'\)"),
}
NAMES = {
    "db.rows": "table",
    "main.db.`my-rows`": "table",
    "/a/b": r"read\.parquet",
    "dbfs:/a": r"read\.parquet",
    "rows.parquet": r"read\.parquet",
}


def _predict(df: Any) -> Any:
    return predict(df, lambda: abs, inputs="x", return_type="double", batch_size=1)


@pytest.mark.parametrize(
    "call",
    [data.from_dataframe, make_spark_converter, _predict],
    ids=["from", "converter", "predict"],
)
@pytest.mark.parametrize("kind", GIVEN)
def test_the_call_that_makes_a_dataframe_is_named(kind: str, call: Any) -> None:
    make, text = GIVEN[kind]
    with pytest.raises(ArgumentTypeError, match=f"{text}") as caught:
        call(make())
    assert "give a Spark DataFrame" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_tables_are_told_from_paths(name: str) -> None:
    for call in (data.from_dataframe, _predict):
        with pytest.raises(ArgumentTypeError, match=rf"spark\.{NAMES[name]}\("):
            call(name)


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("frame", r"from_arrow\(pyarrow.Table.from_pandas\(frame\)\)"),
        ("arrow", r"from_arrow\(table\)"),
        ("rows", r"from_arrow\(pyarrow.Table.from_pylist\(rows\)\)"),
        ("columns", r"from_arrow\(pyarrow.table\(columns\)\)"),
    ],
)
def test_from_dataframe_names_the_way_without_spark_too(kind: str, call: str) -> None:
    with pytest.raises(ArgumentTypeError, match=call):
        data.from_dataframe(GIVEN[kind][0]())
