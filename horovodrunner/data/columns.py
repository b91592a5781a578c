"""What each column of a DataFrame is stored as, and what becomes of nulls. Runs in: every process.

A column of numbers, and an array column whose arrays all have the same length, is stored so that a
batch of it is one array without copying. What differs in length is kept as Arrow has it. Structs
are taken apart into their fields. Null values are settled when a column is written, so nothing
stored is ever null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentValueError, DataError
from horovodrunner.spark.column_names import as_written

__all__ = [
    "NO_ARRAYS",
    "Column",
    "Lengths",
    "NullPolicy",
    "check_policies",
    "fill",
    "logical_type",
    "mask",
    "merged",
    "sized",
    "stored",
    "with_masks",
]

Kind = Literal["number", "string", "binary"]
Lengths = tuple[int, int]
"""Least and greatest length of a column's arrays, at one level of nesting."""

NO_ARRAYS: Lengths = (2**31 - 1, 0)
MASK_SUFFIX = "_is_null"

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
    """What becomes of a column's nulls; made by :func:`fill` and :func:`mask`.

    Parameters
    ----------
    value
        What stands in their place.
    masked
        Whether a boolean column beside it says where they were.
    """

    value: Any
    masked: bool = False


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


def mask(value: Any = None) -> NullPolicy:
    """Put a value in the place of nulls, and say where they were in a column beside it.

    Parameters
    ----------
    value
        What stands in their place; None: zero, or an empty string.

    Returns
    -------
    NullPolicy
        For ``from_dataframe(df, nulls={"age": mask()})``; batches then have ``age_is_null``, too.

    Examples
    --------
    >>> mask().masked
    True
    """
    return NullPolicy(checked.plain(value), masked=True)


@dataclass(frozen=True)
class Column:
    """One stored column: a column of the DataFrame, or a field of a struct in it.

    Parameters
    ----------
    path
        Its name, after the names of the structs it is in.
    kind
        What its values, or the elements of its arrays, are.
    dtype
        NumPy's name of the numbers' type, else "".
    dims
        Length of its arrays at each level of nesting; None where they differ. Empty without arrays.
    """

    path: tuple[str, ...]
    kind: Kind
    dtype: str = ""
    dims: tuple[int | None, ...] = ()

    @property
    def name(self) -> str:
        """The path, with dots."""
        return ".".join(self.path)

    @property
    def is_dense(self) -> bool:
        """Whether a batch of it is one array of numbers."""
        return self.kind == "number" and None not in self.dims

    def stored_type(self) -> pa.DataType:
        """Give the Arrow type it is stored as.

        Returns
        -------
        pyarrow.DataType
            A number, string or binary, within as many lists as there are levels.
        """
        found = _scalar_type(self, _STORED_NUMBERS)
        for _ in self.dims:
            found = pa.list_(found)
        return found

    def to_json(self) -> dict[str, Any]:
        """Give it as plain data.

        Returns
        -------
        dict
            What :meth:`from_json` takes.
        """
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Column:
        """Read it back.

        Parameters
        ----------
        fields
            What :meth:`to_json` gave.

        Returns
        -------
        Column
            The same.
        """
        tuples = {name: tuple(fields[name]) for name in ("path", "dims")}
        return cls(**{**fields, **tuples})


def _scalar_type(column: Column, numbers: Mapping[str, pa.DataType]) -> pa.DataType:
    if column.kind == "string":
        return pa.string()
    if column.kind == "binary":
        return pa.binary()
    return numbers.get(column.dtype) or pa.from_numpy_dtype(np.dtype(column.dtype))


def logical_type(column: Column) -> pa.DataType:
    """Give the Arrow type that a reader sees.

    Parameters
    ----------
    column
        The column.

    Returns
    -------
    pyarrow.DataType
        Lists of one length as fixed-size lists.
    """
    found = _scalar_type(column, _LOGICAL_NUMBERS)
    for length in reversed(column.dims):
        found = pa.list_(found) if length is None else pa.list_(found, length)
    return found


def merged(known: list[list[Lengths]], new: list[list[Lengths]]) -> list[list[Lengths]]:
    """Put together what was found of two parts of the rows.

    Parameters
    ----------
    known, new
        The lengths of each column's arrays at each level.

    Returns
    -------
    list of list
        Those of both.
    """
    return [
        [(min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(one, other, strict=True)]
        for one, other in zip(known, new, strict=True)
    ]


def sized(columns: Sequence[Column], lengths: Sequence[list[list[Lengths]]]) -> tuple[Column, ...]:
    """Say of each column which length its arrays have, where they all have the same.

    Parameters
    ----------
    columns
        The columns.
    lengths
        What :func:`stored` found, of each column at each level, in every part of the rows.

    Returns
    -------
    tuple of Column
        The same columns with their `dims`.
    """
    found = []
    for number, column in enumerate(columns):
        levels = [[each[number][level] for each in lengths] for level in range(len(column.dims))]
        found.append(replace(column, dims=tuple(_common_length(level) for level in levels)))
    return tuple(found)


def _common_length(lengths: Sequence[Lengths]) -> int | None:
    """Give the length that all arrays of one level have, if they do."""
    least = min((each[0] for each in lengths), default=1)
    greatest = max((each[1] for each in lengths), default=0)
    # Arrow has no fixed-size list of size 0
    return greatest if least == greatest > 0 else None


class _Refused(Exception):  # noqa: N818 - becomes a DataError that names the column
    """A column's values cannot be stored."""


def stored(
    batch: pa.RecordBatch, columns: Sequence[Column], nulls: Mapping[str, NullPolicy]
) -> tuple[list[pa.Array], list[list[Lengths]]]:
    """Convert what Spark gave to what is stored.

    Parameters
    ----------
    batch
        Rows of the DataFrame.
    columns
        The columns to store; those that masks add come after the column they belong to.
    nulls
        Policies by column name.

    Returns
    -------
    tuple of list and list
        One array per column; and of each, the lengths its arrays have at each level.

    Raises
    ------
    DataError
        If there is a null that no policy speaks of, or a value that the type cannot hold.
    """
    arrays: list[pa.Array] = []
    lengths: list[list[Lengths]] = []
    for column in columns:
        try:
            array, found = _stored_column(batch, column, nulls)
        except _Refused as refused:
            raise DataError(f"column {column.name!r} {refused}") from None
        arrays.append(array)
        lengths.append(found)
    return arrays, lengths


def _stored_column(
    batch: pa.RecordBatch, column: Column, nulls: Mapping[str, NullPolicy]
) -> tuple[pa.Array, list[Lengths]]:
    policy = nulls.get(column.name)
    source = _masked_column(column, nulls)
    if source is not None:
        return _values_at(batch, source).is_null().cast(pa.uint8()), []
    array = _values_at(batch, column.path)
    if policy is None and array.null_count and not column.dims:
        raise _Refused(
            f"has {array.null_count} nulls among {len(array)} rows. Say what they are to become: "
            f"nulls={{{column.name!r}: data.fill(...)}} or data.mask(), or drop those rows "
            f"(df.dropna(subset=[{as_written(column.path[0])!r}]))"
        )
    return _without_nulls(array, column, len(column.dims), policy)


def _masked_column(column: Column, nulls: Mapping[str, NullPolicy]) -> tuple[str, ...] | None:
    """Give the path of the column whose nulls this one shows, if it does."""
    name = column.path[-1].removesuffix(MASK_SUFFIX)
    path = (*column.path[:-1], name)
    policy = nulls.get(".".join(path))
    return path if name != column.path[-1] and policy is not None and policy.masked else None


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
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    values, inner = _without_nulls(array.flatten(), column, levels - 1, policy)
    own = (int(counts.min()), int(counts.max())) if len(counts) else NO_ARRAYS
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values), [own, *inner]


def _scalars(array: pa.Array, column: Column, policy: NullPolicy | None) -> pa.Array:
    target = _scalar_type(column, _STORED_NUMBERS)
    if array.null_count:
        if policy is None:
            raise _Refused(
                f"has {array.null_count} nulls within its arrays. Say what they are to become: "
                f"nulls={{{column.name!r}: data.fill(...)}}"
            )
        value = policy.value
        if value is None:
            value = {"string": "", "binary": b""}.get(column.kind, 0)
        array = _filled(array, column, value)
    try:
        return _cast(array, column, target)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _Refused(f"cannot be stored as {column.dtype or column.kind}: {error}") from None


def _filled(array: pa.Array, column: Column, value: Any) -> pa.Array:
    try:
        if value == 0 and column.dtype.startswith(("datetime64", "timedelta64")):
            scalar = pa.scalar(0, _STORED_NUMBERS[column.dtype]).cast(array.type)
        else:
            scalar = pa.scalar(value, array.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError) as error:
        raise _Refused(f"cannot hold the value {value!r} given for its nulls: {error}") from None
    return pc.fill_null(array, scalar)


def _cast(array: pa.Array, column: Column, target: pa.DataType) -> pa.Array:
    if array.type == target:
        return array
    if pa.types.is_timestamp(array.type):
        unit = pa.timestamp("us", array.type.tz)
        return array.cast(unit).cast(pa.int64())
    if pa.types.is_duration(array.type):
        return array.cast(pa.duration("us")).cast(pa.int64())
    # a double that float32 cannot tell apart is rounded, as the user asked; nothing else is lost
    return array.cast(target, safe=not pa.types.is_floating(target))


def check_policies(nulls: Mapping[str, NullPolicy], columns: Sequence[Column]) -> None:
    """Refuse policies that can have no effect.

    Parameters
    ----------
    nulls
        Policies by column name.
    columns
        The columns there are.

    Raises
    ------
    ArgumentValueError
        If a name is unknown, a policy is none, or a mask's column exists already.
    """
    names = [column.name for column in columns]
    for name, policy in nulls.items():
        if name not in names:
            raise ArgumentValueError(
                f"nulls={{{name!r}: ...}}: there is no such column; there are {', '.join(names)}"
            )
        if not isinstance(policy, NullPolicy):
            raise ArgumentValueError(
                f"nulls={{{name!r}: {policy!r}}}: give data.fill(value) or data.mask()"
            )
        if policy.masked and name + MASK_SUFFIX in names:
            raise ArgumentValueError(
                f"nulls={{{name!r}: data.mask()}}: the column {name + MASK_SUFFIX!r}, in which "
                "the mask would be, exists already"
            )
        if policy.masked and next(c for c in columns if c.name == name).dims:
            raise ArgumentValueError(
                f"nulls={{{name!r}: data.mask()}}: {name!r} is an array column; its elements "
                "can be filled with data.fill(value), rows without an array coalesced or dropped"
            )


def with_masks(columns: Sequence[Column], nulls: Mapping[str, NullPolicy]) -> list[Column]:
    """Add the columns that say where nulls were.

    Parameters
    ----------
    columns
        The columns of the DataFrame.
    nulls
        Policies by column name.

    Returns
    -------
    list of Column
        Each mask follows its column.
    """
    found: list[Column] = []
    for column in columns:
        found.append(column)
        policy = nulls.get(column.name)
        if policy is not None and policy.masked:
            path = (*column.path[:-1], column.path[-1] + MASK_SUFFIX)
            found.append(Column(path, "number", "bool"))
    return found
