"""What each column of a DataFrame is stored as, and what becomes of nulls. Runs in: every process.

A column of numbers, and an array column whose arrays all have the same length, is stored so that a
batch of it is one array without copying. What differs in length is kept as Arrow has it. Structs
are taken apart into their fields. Null values are settled when a column is written, so nothing
stored is ever null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from horovodrunner import validation as checked
from horovodrunner.deprecated import warn_renamed
from horovodrunner.errors import ArgumentValueError, DataError
from horovodrunner.spark.column_names import as_written

__all__ = [
    "Column",
    "Lengths",
    "NullPolicy",
    "check_policies",
    "fill",
    "fill_with_indicator",
    "logical_type",
    "mask",
    "merged",
    "no_lengths",
    "stored",
    "stored_schema",
    "with_dims",
    "with_indicators",
]

Kind = Literal["number", "string", "binary"]
Lengths = tuple[int, int]
"""Least and greatest length of a column's arrays, at one level of nesting."""

_NO_ARRAYS: Lengths = (2**31 - 1, 0)
_INDICATOR_SUFFIX = "_is_null"

_STORED_NUMBERS = {
    "bool": pa.uint8(),  # a byte each: Arrow's bits would have to be unpacked in every batch
    "datetime64[D]": pa.int32(),
    "datetime64[us]": pa.int64(),
    "timedelta64[us]": pa.int64(),
}
_LOGICAL_NUMBERS = {
    "bool": pa.bool_(),
    "datetime64[D]": pa.date32(),
    "datetime64[us]": pa.timestamp("us"),
    "timedelta64[us]": pa.duration("us"),
}


@dataclass(frozen=True)
class NullPolicy:
    """What becomes of a column's nulls; made by :func:`fill` and :func:`fill_with_indicator`."""

    value: Any
    has_indicator: bool = False


def fill(value: Any) -> NullPolicy:
    """Put a value in the place of a column's nulls.

    Parameters
    ----------
    value
        A value of the column's type; of an array column, of its elements' type.

    Returns
    -------
    NullPolicy
        For ``from_dataframe(df, nulls={"age": fill(0)})``.

    Examples
    --------
    >>> fill(0).value
    0
    """
    return NullPolicy(checked.plain(value))


def fill_with_indicator(value: Any = None) -> NullPolicy:
    """Put a value in the place of nulls, and add a boolean column that says where they were.

    Parameters
    ----------
    value
        What stands in their place; None: zero, or an empty string.

    Returns
    -------
    NullPolicy
        For ``from_dataframe(df, nulls={"age": fill_with_indicator()})``; batches then have
        ``age_is_null``, too.

    Examples
    --------
    >>> fill_with_indicator().has_indicator
    True
    """
    return NullPolicy(checked.plain(value), has_indicator=True)


def mask(value: Any = None) -> NullPolicy:
    """Return :func:`fill_with_indicator` of the value: its old name."""
    warn_renamed("data.mask()", "data.fill_with_indicator()", stacklevel=2)
    return fill_with_indicator(value)


@dataclass(frozen=True)
class Column:
    """One stored column: a column of the DataFrame, or a field of a struct in it."""

    path: tuple[str, ...]
    """Its name, after the names of the structs it is in."""
    kind: Kind
    dtype: str = ""
    """NumPy's name of the numbers' type."""
    dims: tuple[int | None, ...] = ()
    """Length of its arrays at each level of nesting; None where they differ."""
    nulls_of: tuple[str, ...] = ()
    """Path of the column whose nulls it shows."""

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def is_dense(self) -> bool:
        """Whether a batch of it is one array of numbers."""
        return self.kind == "number" and None not in self.dims

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Column:
        tuples = {name: tuple(fields[name]) for name in ("path", "dims", "nulls_of")}
        return cls(**{**fields, **tuples})


def _scalar_type(column: Column, numbers: Mapping[str, pa.DataType]) -> pa.DataType:
    if column.kind == "string":
        return pa.string()
    if column.kind == "binary":
        return pa.binary()
    return numbers.get(column.dtype) or pa.from_numpy_dtype(np.dtype(column.dtype))


def stored_schema(columns: Sequence[Column]) -> pa.Schema:
    """Return the schema of the files: lists in place of arrays."""
    fields = []
    for column in columns:
        found = _scalar_type(column, _STORED_NUMBERS)
        for _ in column.dims:
            found = pa.list_(found)
        fields.append(pa.field(column.name, found, nullable=False))
    return pa.schema(fields)


def logical_type(column: Column) -> pa.DataType:
    """Return the Arrow type that a reader sees: arrays of one length are fixed-size lists."""
    found = _scalar_type(column, _LOGICAL_NUMBERS)
    for length in reversed(column.dims):
        found = pa.list_(found) if length is None else pa.list_(found, length)
    return found


def no_lengths(columns: Sequence[Column]) -> list[list[Lengths]]:
    """Return the lengths of no arrays at all, for each column at each level."""
    return [[_NO_ARRAYS] * len(each.dims) for each in columns]


def merged(known: list[list[Lengths]], new: list[list[Lengths]]) -> list[list[Lengths]]:
    """Merge the lengths found in two parts of the rows."""
    return [
        [(min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(one, other, strict=True)]
        for one, other in zip(known, new, strict=True)
    ]


def with_dims(
    columns: Sequence[Column], lengths: Sequence[list[list[Lengths]]]
) -> tuple[Column, ...]:
    """Set the columns' dims, from the lengths found in each part of the rows."""
    found = no_lengths(columns)
    for each in lengths:
        found = merged(found, each)
    # Arrow has no fixed-size list of size 0
    return tuple(
        replace(column, dims=tuple(a if a == b > 0 else None for a, b in levels))
        for column, levels in zip(columns, found, strict=True)
    )


class _Refused(Exception):  # noqa: N818 - becomes a DataError that names the column
    """A column's values cannot be stored."""


def stored(
    batch: pa.RecordBatch, columns: Sequence[Column], nulls: Mapping[str, NullPolicy]
) -> tuple[pa.RecordBatch, list[list[Lengths]]]:
    """Convert what Spark gave to what is stored; also return the lengths of each column's arrays.

    Raises DataError if there is a null without a policy, or a value that the type cannot hold.
    """
    arrays: list[pa.Array] = []
    lengths: list[list[Lengths]] = []
    for column in columns:
        try:
            array, found = _stored_column(batch, column, nulls.get(column.name))
        except _Refused as refused:
            raise DataError(f"column {column.name!r} {refused}") from None
        arrays.append(array)
        lengths.append(found)
    return pa.RecordBatch.from_arrays(arrays, schema=stored_schema(columns)), lengths


def _stored_column(
    batch: pa.RecordBatch, column: Column, policy: NullPolicy | None
) -> tuple[pa.Array, list[Lengths]]:
    if column.nulls_of:
        return _values_at(batch, column.nulls_of).is_null().cast(pa.uint8()), []
    array = _values_at(batch, column.path)
    if policy is None and array.null_count and not column.dims:
        raise _Refused(
            f"has {array.null_count} nulls among {len(array)} rows. Say what they are to become: "
            f"nulls={{{column.name!r}: data.fill(...)}} or data.fill_with_indicator(), or drop "
            f"those rows (df.dropna(subset=[{as_written(column.path[0])!r}]))"
        )
    return _without_nulls(array, column, len(column.dims), policy)


def _values_at(batch: pa.RecordBatch, path: Sequence[str]) -> pa.Array:
    array = batch.column(batch.schema.names.index(path[0]))
    for depth, name in enumerate(path[1:], 1):
        if array.null_count:
            raise _Refused(
                f"is in the struct {'.'.join(path[:depth])!r}, which is null in "
                f"{array.null_count} of {len(array)} rows: fill those in, or drop them"
            )
        array = pc.struct_field(array, name)
    return array


def _without_nulls(
    array: pa.Array, column: Column, levels: int, policy: NullPolicy | None
) -> tuple[pa.Array, list[Lengths]]:
    if not levels:
        return _scalars(array, column, policy), []
    if array.null_count:
        raise _Refused(
            f"has {array.null_count} nulls in the place of arrays, which nothing can stand in for: "
            "give those rows arrays (coalesce), or drop them "
            f"(df.dropna(subset=[{as_written(column.path[0])!r}]))"
        )
    counts = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    values, inner = _without_nulls(array.flatten(), column, levels - 1, policy)
    own = (int(counts.min()), int(counts.max())) if len(counts) else _NO_ARRAYS
    return pa.ListArray.from_arrays(pa.array(offsets), values), [own, *inner]


def _scalars(array: pa.Array, column: Column, policy: NullPolicy | None) -> pa.Array:
    if array.null_count:
        if policy is None:
            raise _Refused(
                f"has {array.null_count} nulls within its arrays. Say what they are to become: "
                f"nulls={{{column.name!r}: data.fill(...)}}"
            )
        array = _filled(array, column, policy.value)
    try:
        return _cast(array, _scalar_type(column, _STORED_NUMBERS))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _Refused(f"cannot be stored as {column.dtype or column.kind}: {error}") from None


def _filled(array: pa.Array, column: Column, value: Any) -> pa.Array:
    if value is None:
        value = {"string": "", "binary": b""}.get(column.kind, 0)
    try:
        if value == 0 and column.dtype.startswith(("datetime64", "timedelta64")):
            scalar = pa.scalar(0, _STORED_NUMBERS[column.dtype]).cast(array.type)
        else:
            scalar = pa.scalar(value, array.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError) as error:
        raise _Refused(f"cannot hold the value {value!r} given for its nulls: {error}") from None
    return pc.fill_null(array, scalar)


def _cast(array: pa.Array, target: pa.DataType) -> pa.Array:
    if pa.types.is_timestamp(array.type):
        array = array.cast(pa.timestamp("us", array.type.tz))
    elif pa.types.is_duration(array.type):
        array = array.cast(pa.duration("us"))
    # a double that float32 cannot tell apart is rounded, as the user asked; nothing else is lost
    return array.cast(target, safe=not pa.types.is_floating(target))


def check_policies(nulls: Mapping[str, NullPolicy], columns: Sequence[Column]) -> None:
    """Refuse policies that can have no effect."""
    by_name = {column.name: column for column in columns}
    for name, policy in nulls.items():
        if name not in by_name:
            raise ArgumentValueError(
                f"nulls={{{name!r}: ...}}: there is no such column; there are {', '.join(by_name)}"
            )
        if not isinstance(policy, NullPolicy):
            raise ArgumentValueError(
                f"nulls={{{name!r}: {policy!r}}}: give data.fill(value) or "
                "data.fill_with_indicator()"
            )
        if not policy.has_indicator:
            continue
        if name + _INDICATOR_SUFFIX in by_name:
            raise ArgumentValueError(
                f"nulls={{{name!r}: data.fill_with_indicator()}}: the column "
                f"{name + _INDICATOR_SUFFIX!r}, in which the indicator would be, exists already"
            )
        if by_name[name].dims:
            raise ArgumentValueError(
                f"nulls={{{name!r}: data.fill_with_indicator()}}: {name!r} is an array column; its "
                "elements can be filled with data.fill(value), rows without an array coalesced or "
                "dropped"
            )


def with_indicators(
    columns: Sequence[Column], nulls: Mapping[str, NullPolicy]
) -> tuple[Column, ...]:
    """Add the columns that say where nulls were, each after its column."""
    found: list[Column] = []
    for column in columns:
        found.append(column)
        policy = nulls.get(column.name)
        if policy is not None and policy.has_indicator:
            path = (*column.path[:-1], column.path[-1] + _INDICATOR_SUFFIX)
            found.append(Column(path, "number", "bool", nulls_of=column.path))
    return tuple(found)
