"""From predictions to Arrow arrays. Runs in: the driver and Spark's Python workers.

The values are those that ``pyspark.ml.functions.predict_batch_udf`` gives in Spark 4.1, which makes
pandas objects of the predictions:

- NaN becomes null, but for NaN in arrays of float32 and float16, which stays;
- a number of another type is converted if nothing is lost: 2.0 becomes the int 2, and 2.5 is
  refused, as 300 is for a byte; a double always becomes a float. With
  ``spark.sql.execution.pandas.convertToArrowArraySafely=false`` (`safe` here) 2.5 becomes 2, and
  300 becomes 44. Within arrays, 2.5 becomes 2 whatever that says;
- Python objects become what PyArrow makes of them, None and NaN among them null.

It takes more: tensors, and lists; arrays that differ in length; arrays of arrays; boolean, binary,
date, timestamp and decimal results; ``(batch, 1)`` for a struct's scalar field; structs in structs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from horovodrunner.errors import ArgumentValueError, DataError
from horovodrunner.inference.halving import halves

__all__ = [
    "HALVES",
    "SCALARS",
    "OutputError",
    "arrow_type",
    "as_numpy",
    "to_arrow",
    "to_arrow_by_row",
]

SCALARS = {
    "boolean": pa.bool_(),
    "tinyint": pa.int8(),
    "smallint": pa.int16(),
    "int": pa.int32(),
    "bigint": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "string": pa.string(),
    "binary": pa.binary(),
}
"""The types of Spark, by name, that are the same for Arrow."""

HALVES = frozenset({"bfloat16", "float16"})
"""Types that become float32: NumPy lacks one of them, and Spark the other."""


class OutputError(DataError, ValueError):
    """What the model gave does not fit the return type."""


def arrow_type(spark_type: Any, timezone: str = "UTC") -> pa.DataType:
    """Return the Arrow type of a Spark type that predictions can have, or refuse it.

    `timezone` is the session's, in which predicted timestamps without one are.
    """
    from pyspark.sql import types

    times = {
        "date": pa.date32(),
        "timestamp": pa.timestamp("us", timezone),
        "timestamp_ntz": pa.timestamp("us"),
    }
    scalars = SCALARS | times

    def converted(kind: Any, *, in_array: bool = False) -> pa.DataType:
        if isinstance(kind, types.ArrayType):
            element = converted(kind.elementType, in_array=True)
            return pa.list_(pa.field("element", element, kind.containsNull))
        if isinstance(kind, types.StructType) and kind.fields and not in_array:
            if len(set(kind.names)) < len(kind.names):
                raise ArgumentValueError(
                    f"return_type={kind.simpleString()!r} has a field twice: predictions are put "
                    "into fields by their names"
                )
            return pa.struct(
                [pa.field(each.name, converted(each.dataType), each.nullable) for each in kind]
            )
        if isinstance(kind, types.DecimalType):
            return pa.decimal128(kind.precision, kind.scale)
        name = "string" if type(kind) is types.StringType else kind.simpleString()  # a collation
        if name not in scalars:
            raise ArgumentValueError(
                f"return_type={spark_type.simpleString()!r}: predictions cannot be of the type "
                f"{kind.simpleString()!r}. They can be numbers, booleans, strings, binary values, "
                "dates, timestamps, decimals, arrays of these, and a struct of all of them"
            )
        return scalars[name]

    return converted(spark_type)


def to_arrow(predictions: Any, rows: int, target: pa.DataType, *, safe: bool = True) -> pa.Array:
    """Make an Arrow array of what a model gave for one batch, or raise an `OutputError`.

    That is, for a scalar type, an array of shape ``(batch,)`` or ``(batch, 1)``; for an array type
    one of shape ``(batch, length)``, or ``batch`` arrays of any length; with another dimension for
    arrays of arrays; for a struct a dict of such arrays, or a list of ``batch`` dicts.
    """
    return _converted(predictions, rows, target, "the prediction", safe)


def to_arrow_by_row(
    predictions: Any, rows: int, target: pa.DataType, *, safe: bool = True
) -> tuple[pa.Array, dict[int, str]]:
    """Put null for the rows that do not fit, and return what is wrong with each.

    If all of them have another shape or type than they should, the model is wrong, not a row: that
    is an `OutputError`.
    """
    parts: list[pa.Array] = []
    bad: dict[int, OutputError] = {}
    for part, found in halves(
        rows,
        lambda part: to_arrow(_part(predictions, part), part.stop - part.start, target, safe=safe),
        OutputError,
    ):
        if isinstance(found, OutputError):
            bad[part.start] = found
        parts.append(pa.nulls(1, target) if isinstance(found, OutputError) else found)
    if len(bad) == rows:
        for each in bad.values():
            if not isinstance(each.__cause__, (pa.ArrowInvalid, OverflowError)):
                raise each
    reasons = {row: f"{type(each).__name__}: {each}" for row, each in bad.items()}
    return pa.concat_arrays(parts), reasons


def _part(predictions: Any, rows: slice) -> Any:
    if isinstance(predictions, Mapping):
        return {name: _part(each, rows) for name, each in predictions.items()}
    return predictions[rows]


def _converted(values: Any, rows: int, target: pa.DataType, what: str, safe: bool) -> pa.Array:
    if pa.types.is_struct(target):
        return _struct(values, rows, target, what, safe)
    if isinstance(values, Mapping):
        raise OutputError(
            f"{what} is a {type(values).__name__} with the keys {', '.join(map(repr, values))}, "
            f"and {_name(target)} takes an array: make return_type a struct of these, or return "
            "one of them"
        )
    try:
        arrays = as_numpy(values)
        if not isinstance(arrays, np.ndarray) and not pa.types.is_list(target):
            arrays = _as_array(arrays)
        if isinstance(arrays, np.ndarray) and arrays.ndim == 0:
            raise OutputError(
                f"{what} is a single {type(values).__name__}, and {_name(target)} takes one value "
                f"for each of the {rows} rows of the batch"
            )
        _check_rows(arrays, rows, what)
        if pa.types.is_list(target):
            return _lists(arrays, target, what)
        if arrays.ndim != 1 and arrays.shape[1:] != (1,):
            hint = f"; return_type array<{target}> takes this shape" if arrays.ndim == 2 else ""
            raise OutputError(
                f"{what} has the shape {arrays.shape}, and {target} takes ({rows},) or ({rows}, 1)"
                f"{hint}"
            )
        return _scalars(arrays.reshape(-1), target, safe=safe)
    except OutputError:
        raise
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        kind = getattr(values, "dtype", type(values).__name__)
        raise OutputError(
            f"{what} is of type {kind} and cannot become {_name(target)}: "
            f"{str(error).rstrip('.')}. Give another return_type, or convert it first"
        ) from error


def _check_rows(values: Any, rows: int, what: str) -> None:
    if len(values) != rows:
        raise OutputError(
            f"{what} has {len(values)} rows, and the batch has {rows}: return one row for each"
        )


def _name(target: pa.DataType) -> str:
    if pa.types.is_list(target):
        return f"array<{_name(target.value_type)}>"
    return str(target)


def _struct(values: Any, rows: int, target: pa.DataType, what: str, safe: bool) -> pa.Array:
    names = [field.name for field in target]
    if isinstance(values, Mapping):
        columns = values
        _check_names(columns, names, what)
    elif isinstance(values, Sequence) and all(isinstance(each, Mapping) for each in values):
        _check_rows(values, rows, what)
        for row, each in enumerate(values):
            _check_names(each, names, f"{what} for row {row} of the batch")
        columns = {name: [each[name] for each in values] for name in names}
    else:
        raise OutputError(
            f"{what} is of type {type(values).__name__}, and a struct takes a dict of arrays with "
            f"the keys {', '.join(map(repr, names))}, or a list of such dicts, one for each row"
        )
    arrays = [
        _converted(columns[field.name], rows, field.type, f"the predicted {field.name!r}", safe)
        for field in target
    ]
    return pa.StructArray.from_arrays(arrays, fields=list(target))


def _check_names(found: Mapping[Any, Any], names: Sequence[str], what: str) -> None:
    if set(found) == set(names):
        return
    missing = ", ".join(repr(name) for name in names if name not in found)
    extra = ", ".join(repr(name) for name in found if name not in names)
    parts = [
        f"{what} has not the return type's keys:",
        f"it lacks {missing}" if missing else "",
        "and" if missing and extra else "",
        f"the return type lacks {extra}" if extra else "",
    ]
    raise OutputError(" ".join(part for part in parts if part))


def as_numpy(values: Any) -> Any:
    """Return tensors as NumPy arrays, and lists as they are."""
    if isinstance(values, (np.ndarray, list, tuple)):
        return values
    if hasattr(values, "detach"):  # a tensor of torch
        values = values.detach()
        if str(values.dtype).removeprefix("torch.") in HALVES:
            values = values.float()
        return values.resolve_conj().resolve_neg().cpu().numpy()
    return np.asarray(values.numpy() if hasattr(values, "numpy") else values)


def _as_array(values: Sequence[Any]) -> np.ndarray:
    """Make one array of a list of values."""
    items = [as_numpy(each) if hasattr(each, "detach") else each for each in values]
    array = np.asarray(items)
    if array.dtype.kind not in "US":
        return array
    # strings stay what they are, and do not make strings of the numbers among them
    return np.asarray(items, object)


def _lists(values: Any, target: pa.DataType, what: str) -> pa.Array:
    element = target.value_type
    is_null = None
    if isinstance(values, np.ndarray) and values.ndim > 1:
        rows, length = values.shape[:2]
        ends = np.arange(rows + 1) * length
        elements: Any = values.reshape(rows * length, *values.shape[2:])
    elif isinstance(values, np.ndarray) and values.dtype != object:
        raise OutputError(
            f"{what} has the shape {values.shape}, and {_name(target)} takes one array a row: "
            f"return the shape ({len(values)}, length), or arrays that differ in length in a list"
        )
    else:
        is_null = np.array([each is None for each in values], bool)
        empty = np.empty(0)
        parts = [empty if each is None else _row(each, target, what) for each in values]
        ends = np.cumsum([0, *(len(each) for each in parts)])
        elements = _joined(parts, pa.types.is_list(element))
    if pa.types.is_list(element):
        converted = _lists(elements, element, what)
    elif elements.ndim != 1:
        raise OutputError(
            f"{what} has arrays of the shape {elements.shape[1:]} where {_name(target)} takes "
            "single values: flatten them, or make return_type an array of arrays"
        )
    else:
        converted = _scalars(elements, element, in_array=True)
    mask = pa.array(is_null) if is_null is not None and is_null.any() else None
    if ends[-1] >= 2**31:
        raise OutputError(f"{what} has {ends[-1]} values in a batch: ask for smaller batches")
    # NumPy converts small arrays in a tenth of the time that Arrow takes, here and below
    offsets = pa.array(ends.astype(np.int32))
    return pa.ListArray.from_arrays(offsets, converted, type=target, mask=mask)


def _row(values: Any, target: pa.DataType, what: str) -> Any:
    """Return what stands for one row of an array column."""
    found = as_numpy(values)
    if isinstance(found, np.ndarray) and found.ndim == 0:
        raise OutputError(
            f"{what} has {values!r} for a row, and {_name(target)} takes an array for each"
        )
    return found if pa.types.is_list(target.value_type) else np.asarray(found)


def _joined(parts: Sequence[Any], are_lists: bool) -> Any:
    """Put what the rows have one after the other."""
    if are_lists:
        return [each for part in parts for each in part]
    filled = [part for part in parts if len(part)]
    return np.concatenate(filled) if filled else np.empty(0)


def _scalars(
    values: np.ndarray, target: pa.DataType, *, safe: bool = True, in_array: bool = False
) -> pa.Array:
    if not len(values):
        return pa.array([], target)  # of which NumPy may say float64, whatever it is
    if values.dtype.kind in "OUST":
        return _objects(values, target)
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    is_float = values.dtype.kind == "f"
    keeps_nan = in_array and values.dtype in (np.float16, np.float32)
    is_nan = np.isnan(values) if is_float and not keeps_nan else None
    mask = is_nan if is_nan is not None and is_nan.any() else None
    if is_float and pa.types.is_floating(target):
        with np.errstate(over="ignore"):
            wanted = np.float32 if target == pa.float32() else np.float64
            values = values.astype(wanted, copy=False)
    elif values.dtype == np.float16:
        values = values.astype(np.float32)  # Arrow converts these to few types
    elif in_array and values.dtype == np.float64 and pa.types.is_integer(target):
        values = np.trunc(values)
    found = pa.array(values, mask=mask)
    if found.type == target:
        return found
    if pa.types.is_string(target) or pa.types.is_binary(target):
        raise TypeError("it holds no text")
    if pa.types.is_timestamp(target):
        return _timestamps(found, target)
    if pa.types.is_decimal(target) and pa.types.is_integer(found.type):
        # Arrow wants room for every value of an integer type first
        found = found.cast(pa.decimal128(min(38, 20 + target.scale), target.scale))
    return found.cast(target, safe=safe)


def _timestamps(found: pa.Array, target: pa.DataType) -> pa.Array:
    """Put timestamps without a time zone into that of the session."""
    if target.tz is None or getattr(found.type, "tz", None) is not None:
        return found.cast(target, safe=False)
    local = found.cast(pa.timestamp("us"), safe=False)
    return pc.assume_timezone(local, target.tz, ambiguous="earliest", nonexistent="latest")


def _objects(values: np.ndarray, target: pa.DataType) -> pa.Array:
    if values.dtype.kind != "O":
        values = values.astype(object)
    if pa.types.is_timestamp(target):
        return _timestamps(pa.array(values, from_pandas=True), target)
    try:
        return pa.array(values, target, from_pandas=True)
    except pa.ArrowInvalid:
        # as pandas UDFs of Spark 4 do: strings that hold numbers become these
        return pa.array(values, from_pandas=True).cast(target)
