"""Batches as pandas DataFrames, and back. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from horovodrunner.compat.petastorm.schema import Field, Schema
from horovodrunner.compat.petastorm.transform import TransformSpec
from horovodrunner.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["arrays_of", "transform_batch", "transformed"]


def transform_batch(
    spec: TransformSpec, schema: Schema, batch: Mapping[str, Any]
) -> dict[str, Any]:
    """Do what a TransformSpec says to a batch of NumPy arrays.

    Its function gets arrays as objects, dates as ``datetime.date``, and fields of structs as
    columns with dots in their names.
    """
    import pandas as pd

    frame = pd.DataFrame({name: _series(values) for name, values in _flat(batch, "")})
    return transformed(frame, spec, schema)


def _flat(batch: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, values in batch.items():
        if isinstance(values, Mapping):
            yield from _flat(values, f"{prefix}{name}.")
        else:
            yield prefix + name, values


def _series(values: Any) -> Any:
    import pandas as pd

    if not isinstance(values, np.ndarray) or values.ndim > 1:
        return pd.Series(list(values), dtype=object)
    return values.astype(object) if values.dtype == "datetime64[D]" else values


def transformed(frame: pd.DataFrame, spec: TransformSpec, schema: Schema) -> dict[str, Any]:
    """Transform some rows into arrays with the columns of the schema."""
    rows = len(frame)
    if spec.func is not None:
        frame = spec.func(frame)
    unwanted = set(spec.removed_fields)
    if spec.selected_fields is not None:
        unwanted = set(frame.columns) - set(spec.selected_fields)
    found = {str(name) for name in frame.columns} - unwanted
    if found != set(schema.fields):
        raise DataError(
            f"the DataFrame that the TransformSpec's function returned has the columns "
            f"{', '.join(sorted(found))}; its fields say {', '.join(sorted(schema.fields))}. "
            "Correct edit_fields, removed_fields or selected_fields"
        )
    if len(frame) != rows:
        raise DataError(
            f"the TransformSpec's function got {rows} rows and returned {len(frame)}: the ranks "
            "would have different numbers of batches. Choose rows in Spark, with df.filter(...)"
        )
    return arrays_of(frame, schema)


def arrays_of(frame: pd.DataFrame, schema: Schema) -> dict[str, Any]:
    """Make arrays of shape ``(rows, ...)`` of a DataFrame; bytes and decimals are objects."""
    return {name: _array(frame[name], field) for name, field in schema.fields.items()}


def _array(column: Any, field: Field) -> Any:
    dtype = field.numpy_dtype if field.is_edited else None
    if field.shape:
        return _stacked([np.asarray(each, dtype) for each in column], field)
    if field.numpy_dtype in (np.str_, str):
        return np.array(column.tolist(), dtype=str)
    return column.to_numpy(None if dtype in (bytes, np.bytes_) else dtype, copy=True)


def _stacked(rows: list[Any], field: Field) -> Any:
    shapes = sorted({row.shape for row in rows})
    if len(shapes) > 1:
        raise DataError(
            f"column {field.name!r} has values of the shapes {', '.join(map(str, shapes))}, which "
            "cannot be one batch: give all rows the same shape, in a TransformSpec for instance"
        )
    if field.is_edited and None not in field.shape and shapes and shapes[0] != field.shape:
        raise DataError(
            f"column {field.name!r} has values of the shape {shapes[0]}, and edit_fields says "
            f"{field.shape}"
        )
    values = np.stack(rows) if rows else np.empty((0, *(each or 0 for each in field.shape)))
    if values.dtype == object and None in field.shape:  # arrays of arrays come as objects
        values = np.array(values.tolist())
    return values
