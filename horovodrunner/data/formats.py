"""What a batch is made of: NumPy arrays or Arrow tables. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from horovodrunner.data.columns import Column, logical_type
from horovodrunner.data.ragged import Ragged
from horovodrunner.data.stored import Block

__all__ = ["ArrowFormat", "Format", "NumpyFormat", "arrow_schema", "nested", "numpy_values"]


class Format(Protocol):
    """Makes batches of one kind from stored rows."""

    def batches(self, block: Block, bounds: Sequence[tuple[int, int]]) -> Any:
        """Iterate over the batches that a block holds, given where each begins and ends."""


def arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    """Give the schema of batches that are Arrow tables.

    Parameters
    ----------
    columns
        The columns.

    Returns
    -------
    pyarrow.Schema
        The fields of structs have dots in their names.
    """
    return pa.schema([pa.field(c.name, logical_type(c), nullable=False) for c in columns])


def nested(values: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, Any]:
    """Put the fields of structs together again.

    Parameters
    ----------
    values
        By column name.
    columns
        The columns.

    Returns
    -------
    dict
        A dict within it for each struct.

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


def numpy_values(array: pa.Array, column: Column, level: int = 0) -> Any:
    """Convert a column that is not dense.

    Parameters
    ----------
    array
        Its stored values.
    column
        The column.
    level
        How many levels of nesting are done with.

    Returns
    -------
    ndarray or Ragged
        Strings and bytes as objects; arrays that differ in length as a Ragged.
    """
    dims = column.dims[level:]
    if None not in dims:
        for _ in dims:
            array = array.flatten()
        numbers = array.to_numpy(zero_copy_only=False)
        if column.kind == "number":
            numbers = _viewed(numbers, column.dtype)
        return numbers.reshape(-1, *dims) if dims else numbers
    offsets = array.offsets.to_numpy()
    values = numpy_values(array.flatten(), column, level + 1)
    return Ragged(values, (offsets - offsets[0]).astype(np.int64))


def _viewed(numbers: Any, dtype: str) -> Any:
    return (numbers.astype(dtype) if dtype == "datetime64[D]" else numbers.view(dtype)).copy()


class NumpyFormat:
    """Batches are dicts of NumPy arrays.

    Parameters
    ----------
    columns
        The columns.
    convert
        Makes something else of each value.
    """

    def __init__(
        self, columns: Sequence[Column], convert: Callable[[Any], Any] = lambda value: value
    ) -> None:
        self._columns = columns
        self._convert = convert
        self._is_flat = all(len(column.path) == 1 for column in columns)

    def batches(self, block: Block, bounds: Sequence[tuple[int, int]]) -> Any:
        """Iterate over the batches that a block holds.

        Parameters
        ----------
        block
            The rows.
        bounds
            Where each batch begins and ends.

        Yields
        ------
        dict
            Values by column name.
        """
        convert = self._convert
        dense = {name: convert(array) for name, array in block.dense.items()}
        if self._is_flat and not block.others:
            for start, end in bounds:
                yield {name: values[start:end] for name, values in dense.items()}
            return
        for start, end in bounds:
            values = {name: whole[start:end] for name, whole in dense.items()}
            for column in self._columns:
                if column.name in block.others:
                    part = block.others[column.name].slice(start, end - start)
                    values[column.name] = convert(numpy_values(part, column))
            yield nested(values, self._columns)


class ArrowFormat:
    """Batches are Arrow tables.

    Parameters
    ----------
    columns
        The columns.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns

    def batches(self, block: Block, bounds: Sequence[tuple[int, int]]) -> Any:
        """Iterate over the batches that a block holds.

        Parameters
        ----------
        block
            The rows.
        bounds
            Where each batch begins and ends.

        Yields
        ------
        pyarrow.Table
            One column per stored column; the fields of structs have dots in their names.
        """
        arrays = [_arrow_values(block, column) for column in self._columns]
        table = pa.Table.from_arrays(arrays, schema=arrow_schema(self._columns))
        for start, end in bounds:
            yield table.slice(start, end - start)


def _arrow_values(block: Block, column: Column) -> pa.Array:
    if column.name in block.others:
        return _logical(block.others[column.name], column)
    values = block.dense[column.name]
    array = pa.array(values.reshape(-1), _leaf(logical_type(column)))
    for length in reversed(column.dims):
        array = pa.FixedSizeListArray.from_arrays(array, length)
    return array


def _leaf(arrow_type: pa.DataType) -> pa.DataType:
    while pa.types.is_list(arrow_type) or pa.types.is_fixed_size_list(arrow_type):
        arrow_type = arrow_type.value_type
    return arrow_type


def _logical(array: pa.Array, column: Column, level: int = 0) -> pa.Array:
    if level == len(column.dims):
        return array.cast(_leaf(logical_type(column)))
    values = _logical(array.flatten(), column, level + 1)
    length = column.dims[level]
    if length is not None:
        return pa.FixedSizeListArray.from_arrays(values, length)
    offsets = array.offsets
    first = offsets[0].as_py()
    if first:
        offsets = pa.array(offsets.to_numpy() - first)
    return pa.ListArray.from_arrays(offsets, values)
