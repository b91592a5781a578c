"""Columns of DataFrames by exactly their names, whatever these are. Runs in: the driver.

Spark takes a name for an expression: it looks for the field ``b`` in ``a.b``, stumbles over
backticks, and does not tell ``Label`` from ``label``. So columns are chosen by their place.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from horovodrunner.spark.arrow import map_in_arrow

__all__ = ["as_written", "fields_twice", "literal", "map_by_name", "numbered"]

_PLAIN = re.compile(r"\w+", re.ASCII)


def as_written(name: str) -> str:
    """Return how Spark's expressions name a column: in backticks where they would misread it.

    >>> as_written("label"), as_written("a.b")
    ('label', '`a.b`')
    """
    return name if _PLAIN.fullmatch(name) else "`" + name.replace("`", "``") + "`"


def literal(written: str) -> str:
    """Return the name behind what Spark's expressions name a column.

    >>> literal("label"), literal("`a.b`")
    ('label', 'a.b')
    """
    quoted = re.fullmatch(r"`((?:[^`]|``)+)`", written)
    return quoted[1].replace("``", "`") if quoted else written


def numbered(df: Any, names: Sequence[str] | None = None) -> Any:
    """Rename columns to ``_0``, ``_1``, ... by their place in `df`, and select those of `names`."""
    found = df.toDF(*(f"_{place}" for place in range(len(df.columns))))
    return found if names is None else found.select(*(f"_{df.columns.index(n)}" for n in names))


def map_by_name(df: Any, function: Callable[..., Any], schema: Any) -> Any:
    """Return ``df.mapInArrow(function, schema)``, for columns of any names."""
    names = list(df.columns)
    if all(map(_PLAIN.fullmatch, names)) and len(set(map(str.lower, names))) == len(names):
        return map_in_arrow(df, function, schema)
    return map_in_arrow(numbered(df), functools.partial(_with_names, function, names), schema)


def _with_names(
    function: Callable[..., Any], names: list[str], batches: Iterable[Any]
) -> Iterator[Any]:
    yield from function(batch.rename_columns(names) for batch in batches)


def fields_twice(spark_type: Any) -> str:
    """Return the name of two fields of one struct, which Arrow does not carry; "" if none is."""
    if (inner := getattr(spark_type, "elementType", None)) is not None:
        return fields_twice(inner)
    fields = getattr(spark_type, "fields", None) or []
    for name, times in Counter(field.name for field in fields).items():
        if times > 1:
            return str(name)
    return next((found for field in fields if (found := fields_twice(field.dataType))), "")
