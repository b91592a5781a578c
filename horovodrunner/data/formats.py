"""What a batch is made of: NumPy arrays or Arrow tables. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from horovodrunner.data.columns import Column, logical_type
from horovodrunner.data.ragged import Ragged
from horovodrunner.data.stored import Block

__all__ = ["Bounds", "Format", "arrow_batches", "arrow_schema", "nested", "numpy_batches"]

Bounds = Sequence[tuple[int, int]]
"""Where batches begin and end in a block."""

Format = Callable[[Block, Sequence[Column], Bounds], Iterator[Any]]
"""Iterates over the batches that a block holds."""


def nested(values: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, Any]:
    """Put the fields of structs together again.

    Examples
    --------
    >>> nested({"p.x": 1, "p.y": 2}, [Column(("p", "x"), "number"), Column(("p", "y"), "number")])
    {'p': {'x': 1, 'y': 2}}
    """
    result: dict[str, Any] = {}
    for column in columns:
        place = result
        for name in column.path[:-1]:
            place = place.setdefault(name, {})
        place[column.path[-1]] = values[column.name]
    return result


def numpy_batches(
    block: Block,
    columns: Sequence[Column],
    bounds: Bounds,
    convert: Callable[[Any], Any] = lambda value: value,
) -> Iterator[dict[str, Any]]:
    """Iterate over batches that are dicts, whose values `convert` makes of NumPy arrays."""
    dense = {name: convert(array) for name, array in block.dense.items()}
    is_flat = all(len(column.path) == 1 for column in columns)
    for start, end in bounds:
        values = {name: whole[start:end] for name, whole in dense.items()}
        if is_flat and not block.others:
            yield values
            continue
        for column in columns:
            if column.name in block.others:
                part = block.others[column.name].slice(start, end - start)
                values[column.name] = convert(_numpy_values(part, column))
        yield nested(values, columns)


def _numpy_values(array: pa.Array, column: Column, level: int = 0) -> Any:
    """Convert a column that is not dense, of which `level` levels are done with."""
    dims = column.dims[level:]
    if None not in dims:
        for _ in dims:
            array = array.flatten()
        values = array.to_numpy(zero_copy_only=False)
        if column.dtype == "datetime64[D]":
            values = values.astype(column.dtype)  # days are stored in half of NumPy's width
        elif column.kind == "number":
            values = values.view(column.dtype).copy()
        return values.reshape(-1, *dims) if dims else values
    offsets = array.offsets.to_numpy()
    values = _numpy_values(array.flatten(), column, level + 1)
    return Ragged(values, (offsets - offsets[0]).astype(np.int64))


def arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    """Return the schema of Arrow batches: the fields of structs have dots in their names."""
    return pa.schema([pa.field(c.name, logical_type(c), nullable=False) for c in columns])


def arrow_batches(block: Block, columns: Sequence[Column], bounds: Bounds) -> Iterator[pa.Table]:
    """Iterate over batches that are Arrow tables."""
    arrays = [_arrow_values(block, column) for column in columns]
    table = pa.Table.from_arrays(arrays, schema=arrow_schema(columns))
    for start, end in bounds:
        yield table.slice(start, end - start)


def _arrow_values(block: Block, column: Column) -> pa.Array:
    if column.name in block.others:
        return _logical(block.others[column.name], column)
    values = block.dense[column.name]
    array = pa.array(values.reshape(-1), _element_type(column))
    for length in reversed(column.dims):
        array = pa.FixedSizeListArray.from_arrays(array, length)
    return array


def _element_type(column: Column) -> pa.DataType:
    found = logical_type(column)
    for _ in column.dims:
        found = found.value_type
    return found


def _logical(array: pa.Array, column: Column, level: int = 0) -> pa.Array:
    if level == len(column.dims):
        return array.cast(_element_type(column))
    values = _logical(array.flatten(), column, level + 1)
    length = column.dims[level]
    if length is not None:
        return pa.FixedSizeListArray.from_arrays(values, length)
    offsets = array.offsets
    first = offsets[0].as_py()
    if first:
        offsets = pa.array(offsets.to_numpy() - first)
    return pa.ListArray.from_arrays(offsets, values)
