"""What a DataFrame's schema becomes. Runs in: the driver."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from horovodrunner.data.columns import Column, Kind
from horovodrunner.errors import DataError
from horovodrunner.spark.column_names import numbered

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = ["arrow_columns", "prepared"]

_NUMBERS = {
    "ByteType": "int8",
    "ShortType": "int16",
    "IntegerType": "int32",
    "LongType": "int64",
    "FloatType": "float32",
    "DoubleType": "float64",
    "DecimalType": "float64",
    "BooleanType": "bool",
    "DateType": "datetime64[D]",
    "TimestampType": "datetime64[us]",
    "TimestampNTZType": "datetime64[us]",
    "DayTimeIntervalType": "timedelta64[us]",
}
_ARROW_NUMBERS = (
    (pa.types.is_integer, ""),
    (pa.types.is_float32, ""),
    (pa.types.is_float64, ""),
    (pa.types.is_boolean, "bool"),
    (pa.types.is_decimal, "float64"),
    (pa.types.is_date32, "datetime64[D]"),
    (pa.types.is_timestamp, "datetime64[us]"),
    (pa.types.is_duration, "timedelta64[us]"),
)
_TEXTS: dict[str, Kind] = {
    **dict.fromkeys(("StringType", "CharType", "VarcharType"), "string"),
    "BinaryType": "binary",
}
_REMEDIES = {
    "MapType": "select the keys you need (df.m['key']), or map_values(...) as an array",
    "NullType": "cast it to the type it should have, or leave it out",
    "VariantType": "take out what you need with variant_get(...)",
    "YearMonthIntervalType": "cast it to a number of months",
    "CalendarIntervalType": "cast it to an interval of days to seconds, or to a number",
    "TimeType": "cast it to a string, or to a number of seconds",
    "StructType": "in an array it cannot be a batch: make an array of each field "
    "(df.points.x is one of all x), or explode it",
    "MatrixUDT": "make an array of its values",
}


def prepared(df: DataFrame, floats: str | None) -> tuple[DataFrame, list[Column]]:
    """Return the DataFrame with arrays in place of ML vectors, and what is stored of it.

    Floating-point numbers become `floats`, ``"float32"`` or ``"float64"``; None leaves them.
    Raises DataError if a column has a type that cannot be stored, or two have the same name.
    """
    fields = df.schema.fields
    if not fields:
        raise DataError("the DataFrame has no columns: select at least one")
    for name, count in Counter(field.name for field in fields).items():
        if count > 1:
            raise DataError(
                f"{count} columns have the name {name!r}: join with on={name!r}, name them by "
                "their places (df.toDF(...)), or leave some out, so that a batch has them all"
            )
    columns: list[Column] = []
    vectors: dict[int, str] = {}
    for place, field in enumerate(fields):
        if type(field.dataType).__name__ == "VectorUDT":
            vectors[place] = floats or "float64"
            columns.append(Column((field.name,), "number", vectors[place], (None,)))
        else:
            columns += _columns_of_spark((field.name,), field.dataType, floats)
    _refuse_twice(columns, "withColumnRenamed, withField")
    return (_without_vectors(df, vectors) if vectors else df), columns


def arrow_columns(schema: pa.Schema) -> list[Column]:
    """Return what is stored of an Arrow table; raises DataError as :func:`prepared` does."""
    columns = [column for each in schema for column in _columns_of_arrow((each.name,), each.type)]
    if not columns:
        raise DataError("the table has no columns: select at least one")
    _refuse_twice(columns, "table.rename_columns")
    return columns


def _refuse_twice(columns: Iterable[Column], renaming: str) -> None:
    for name, count in Counter(column.name for column in columns).items():
        if count > 1:
            raise DataError(
                f"{count} columns or fields of structs would have the name {name!r}: rename them "
                f"({renaming}), or leave some out"
            )


def _without_vectors(df: DataFrame, vectors: Mapping[int, str]) -> DataFrame:
    """Put arrays of numbers in the place of ML vectors, and null in that of null."""
    from pyspark.ml.functions import vector_to_array
    from pyspark.sql import functions

    found = []
    for place in range(len(df.columns)):
        column = functions.col(f"_{place}")
        if place in vectors:  # Spark's own function fails on a null, without a name
            array = vector_to_array(column, vectors[place])
            column = functions.when(column.isNotNull(), array).alias(f"_{place}")
        found.append(column)
    return numbered(df).select(*found).toDF(*df.columns)


def _columns_of_spark(
    path: tuple[str, ...], spark_type: Any, floats: str | None
) -> Iterator[Column]:
    if type(spark_type).__name__ == "StructType":
        if not spark_type.fields:
            raise DataError(f"column {'.'.join(path)!r} is a struct without fields: leave it out")
        for field in spark_type.fields:
            yield from _columns_of_spark((*path, field.name), field.dataType, floats)
        return
    dims: tuple[None, ...] = ()
    while type(spark_type).__name__ == "ArrayType":
        spark_type = spark_type.elementType
        dims += (None,)
    name = type(spark_type).__name__
    dtype = _NUMBERS.get(name, "")
    if floats and dtype.startswith("float"):
        dtype = floats
    kind = "number" if dtype else _TEXTS.get(name)
    if kind is None:
        raise DataError(
            f"column {'.'.join(path)!r} has {'arrays of ' if dims else ''}the type "
            f"{spark_type.simpleString()}, which cannot be fed to the ranks: "
            + _REMEDIES.get(name, "convert it to numbers, strings, binary or arrays of these")
        )
    yield Column(path, kind, dtype, dims)


def _columns_of_arrow(path: tuple[str, ...], arrow_type: pa.DataType) -> Iterator[Column]:
    types = pa.types
    if types.is_struct(arrow_type):
        for field in arrow_type:
            yield from _columns_of_arrow((*path, field.name), field.type)
        return
    dims: tuple[None, ...] = ()
    while types.is_list(arrow_type) or types.is_fixed_size_list(arrow_type):
        arrow_type = arrow_type.value_type
        dims += (None,)
    if types.is_string(arrow_type) or types.is_binary(arrow_type):
        yield Column(path, "string" if types.is_string(arrow_type) else "binary", dims=dims)
        return
    dtype = next((dtype for is_of, dtype in _ARROW_NUMBERS if is_of(arrow_type)), None)
    if dtype is None:
        raise DataError(
            f"column {'.'.join(path)!r} has the type {arrow_type}, which cannot be stored: convert "
            "it to numbers, strings, binary or lists of these"
        )
    yield Column(path, "number", dtype or arrow_type.to_pandas_dtype().__name__, dims)
