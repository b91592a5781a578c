"""Refuses what is no Spark DataFrame, and says how to make one of it. Runs in: the driver."""

from __future__ import annotations

import os
import re
from typing import Any

from horovodrunner.errors import ArgumentTypeError, ArgumentValueError
from horovodrunner.formatting import class_names
from horovodrunner.validation import shown

__all__ = ["check_dataframe"]

_INSTEAD = {
    re.compile(pattern): text
    for pattern, text in {
        r"builtins\.NoneType$": (
            "df.show(), df.write.save() and df.createOrReplaceTempView() return no DataFrame"
        ),
        r"pandas\.(\w+\.)*DataFrame$": "make one by spark.createDataFrame(frame)",
        r"pandas\.(\w+\.)*Series$": "make one by spark.createDataFrame(series.to_frame())",
        r"pyarrow\.": "make one by spark.createDataFrame(table.to_pandas())",
        r"polars\.": "make one by spark.createDataFrame(frame.to_pandas())",
        r"numpy\.ndarray$": "make one by spark.createDataFrame(array)",
        r"(builtins\.(list|tuple)|pyspark\.sql\.types\.Row)$": (
            "make one by spark.createDataFrame(rows)"
        ),
        r"builtins\.dict$": "make one by spark.createDataFrame(pandas.DataFrame(columns))",
        r"pyspark\.pandas\..*DataFrame$": "make one by psdf.to_spark()",
        r"pyspark\.pandas\.": "make one by psdf.to_frame().to_spark()",
        r"pyspark\.(core\.)?rdd\.RDD$": "make one by rdd.toDF()",
        r"pyspark\.sql\.(\w+\.)*Column$": "select it from its DataFrame: df.select(column)",
        r"pyspark\.sql\.(\w+\.)*(GroupedData|PandasCogroupedOps)$": (
            "aggregate it first: groups.agg(...)"
        ),
        r"pyspark\.sql\.(\w+\.)*DataFrameWriter(V2)?$": "give the DataFrame that it writes",
        r"pyspark\.sql\.(\w+\.)*(DataFrame|DataStream)Reader$": (
            "let it read: .parquet(path), .table(name), .load(path)"
        ),
        r"pyspark\.sql\.(\w+\.)*SparkSession$": "spark.table(name) reads one",
        r"horovodrunner\.data\.": "its rows are stored: give it to run(), or let main use it",
        r"builtins\.method$": "call it, with parentheses",
    }.items()
}
"""By the name of a class."""

_WITHOUT_SPARK = (
    (re.compile(r"pandas\.(\w+\.)*DataFrame$"), "pyarrow.Table.from_pandas(frame)"),
    (re.compile(r"pyarrow\..*\.Table$"), "table"),
    (re.compile(r"polars\..*\.DataFrame$"), "frame.to_arrow()"),
    (re.compile(r"builtins\.dict$"), "pyarrow.table(columns)"),
    (re.compile(r"builtins\.list$"), "pyarrow.Table.from_pylist(rows)"),
)


def check_dataframe(
    value: Any, *, takes_arrow: bool = False, takes_url: bool = False, takes_streams: bool = False
) -> None:
    """Refuse what is no Spark DataFrame, and say how to make one of it.

    `takes_arrow`, `takes_url`, `takes_streams`: what else would do.
    """
    if not hasattr(type(value), "mapInArrow"):
        wanted = "a Spark DataFrame" + (" or a URL as a str" if takes_url else "")
        kind = class_names(type(value))[0].removeprefix("builtins.")
        is_short = value is None or isinstance(value, (str, os.PathLike))
        given = f"df={shown(value)}" if is_short else f"df is of type {kind}"
        raise ArgumentTypeError(f"{given}: give {wanted}{_instead(value, takes_arrow)}")
    if not takes_streams and value.isStreaming:
        raise ArgumentValueError(
            "df is a streaming DataFrame, which has no end: give one that spark.read or "
            "spark.table(name) gives, or a batch of it within foreachBatch"
        )


def _instead(value: Any, takes_arrow: bool) -> str:
    if isinstance(value, (str, os.PathLike)):
        text = str(os.fspath(value))
        is_name = re.fullmatch(r"[\w`-]+(\.[\w`-]+){0,2}", text) and not text.endswith(".parquet")
        return f"; spark.{'table' if is_name else 'read.parquet'}({text!r}) reads one"
    names = class_names(type(value))
    found = next((t for p, t in _INSTEAD.items() if any(map(p.match, names))), "")
    if takes_arrow:
        arrow = next((t for p, t in _WITHOUT_SPARK if any(map(p.match, names))), "")
        found += f", or use data.from_arrow({arrow}) instead, without Spark" if arrow else ""
    return f"; {found}" if found else f", not {type(value).__name__}"
