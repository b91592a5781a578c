"""From the columns of a batch to the arrays a model takes. Runs in: Spark's Python workers.

The same arrays as ``pyspark.ml.functions.predict_batch_udf`` makes by way of pandas, made from
Arrow's buffers: numbers, and tensors without nulls, are not copied, and no row becomes a Python
object. It takes more: MLlib's vectors, as ``(batch, size)`` float64; tensors without a shape, if
all arrays of a batch have one length; arrays of arrays; shapes as tuples.

Where the two differ: beside other inputs, a tensor column without a shape is an array of arrays
there, and here only if the arrays differ in length; a null string is None here, and there NaN since
pandas 3; timestamps in arrays are datetime64 here, and pandas' objects there; an array with too
many or too few values is refused with its row here, even where other rows make up for it.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError, DataError
from horovodrunner.inference.halving import halves

__all__ = [
    "BadRows",
    "InputError",
    "InputPlan",
    "Nulls",
    "UsualShape",
    "as_one_array",
    "is_list",
    "is_vector",
    "null_rows",
    "numpy_inputs",
    "to_numpy",
]

Nulls = Literal["pass", "null", "raise"]
Shape = tuple[int, ...]
T = TypeVar("T")

_VECTOR_FIELDS = ["type", "size", "indices", "values"]


class InputError(DataError, ValueError):
    """The columns do not fit the model's inputs, whatever their rows hold."""


class BadRows(Exception):  # noqa: N818 - says which rows of a batch to leave out; caught by the caller
    """What is wrong with rows that the model cannot take, by their number in the batch."""

    def __init__(self, rows: Mapping[int, str]) -> None:
        super().__init__(rows)
        self.rows = dict(sorted(rows.items()))

    def __str__(self) -> str:
        row, text = next(iter(self.rows.items()))
        more = f" (and {len(self.rows) - 1} more rows)" if len(self.rows) > 1 else ""
        return f"row {row}: {text}{more}"


@dataclass(frozen=True)
class InputPlan:
    """What was asked for about a model's inputs; made by :meth:`of`."""

    shapes: tuple[Shape | None, ...] | None = None
    """Of each input without the batch's dimension; None: nothing was said."""
    is_sparse: bool = False
    """Whether inputs beyond those of `shapes` have no shape, rather than being one too many."""
    nulls: Nulls = "pass"

    @classmethod
    def of(cls, input_tensor_shapes: Any = None, nulls: Any = "pass") -> InputPlan:
        """Check what the user gave."""
        nulls = checked.choice("nulls", nulls, get_args(Nulls))
        if isinstance(input_tensor_shapes, np.ndarray):
            input_tensor_shapes = input_tensor_shapes.tolist()
        if input_tensor_shapes is None:
            return cls(None, nulls=nulls)
        if isinstance(input_tensor_shapes, Mapping):
            for index in input_tensor_shapes:
                if isinstance(index, bool) or not isinstance(index, numbers.Integral) or index < 0:
                    raise ArgumentTypeError(
                        f"input_tensor_shapes has the key {index!r}: its keys are the inputs' "
                        "numbers, from 0"
                    )
            number = max((int(index) + 1 for index in input_tensor_shapes), default=0)
            shapes = tuple(_shape(input_tensor_shapes.get(index)) for index in range(number))
            return cls(shapes, is_sparse=True, nulls=nulls)
        if isinstance(input_tensor_shapes, str) or not isinstance(input_tensor_shapes, Sequence):
            raise ArgumentTypeError(
                "input_tensor_shapes must be a list with a shape, or None, for each input, or a "
                f"dict of shapes by the input's number; got {input_tensor_shapes!r}"
            )
        # as in predict_batch_udf, an empty list says nothing
        return cls(tuple(_shape(shape) for shape in input_tensor_shapes) or None, nulls=nulls)

    def shapes_of(self, inputs: int) -> tuple[Shape | None, ...]:
        """Return the shape of each of so many inputs."""
        if self.shapes is None:
            return (None,) * inputs
        given = len(self.shapes)
        if given > inputs or (given < inputs and not self.is_sparse):
            last = f"speaks of input {given - 1}" if self.is_sparse else f"has {given} shapes"
            raise InputError(
                f"input_tensor_shapes {last}, and there are {inputs} inputs: give one shape for "
                "each of them, None for numbers"
            )
        return self.shapes + (None,) * (inputs - given)


def _shape(shape: Any) -> Shape | None:
    if isinstance(shape, np.ndarray):
        shape = shape.tolist()
    if shape is None:
        return None
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise ArgumentTypeError(
            f"input_tensor_shapes has {shape!r} for an input: give a shape, which is a list of "
            "lengths without the batch's, or None, as in input_tensor_shapes=[[28, 28], None]"
        )
    shape = [checked.plain(length) for length in shape]
    wrong = f"input_tensor_shapes has the shape {shape}: its lengths must be"
    note = "The batch's dimension is not part of a shape"
    for length in shape:
        if isinstance(length, bool) or not isinstance(length, numbers.Integral):
            raise ArgumentTypeError(f"{wrong} ints, and {length!r} is none. {note}")
        if length < 1:
            raise ArgumentValueError(f"{wrong} 1 or more, and {length} is not. {note}")
    return tuple(int(length) for length in shape)


def numpy_inputs(
    columns: Sequence[pa.Array],
    names: Sequence[str],
    plan: InputPlan,
    *,
    expected: int | None,
    stacks_scalars: bool = False,
    grouped: bool = False,
    usual_shape: UsualShape | None = None,
) -> tuple[np.ndarray, ...]:
    """Make the arrays a model takes, one for each of its inputs, from the columns of one batch.

    Structs among the columns count as their fields. Several columns of numbers make one input of
    shape ``(batch, columns)`` if the model `stacks_scalars`, or if they were one struct's fields
    (`grouped`). Arrays of which no shape is known have to be of one shape; with `usual_shape`,
    those that are not are bad rows.
    """
    fields, paths = _fields(columns, names)
    number = len(fields)
    may_stack = (grouped or stacks_scalars) and not any(is_list(each.type) for each in fields)
    if number > 1 and may_stack and (expected == 1 or (expected is None and stacks_scalars)):
        return (_stacked(fields, paths, plan.shapes_of(1)[0]),)
    if expected == 1 and number > 1:
        raise InputError(
            f"the model takes one input, and there are {number} columns ({', '.join(paths)}): "
            "make them one with pyspark.sql.functions.array(), or concat() of arrays"
        )
    if expected is not None and expected != number:
        raise InputError(
            f"the model takes {expected} inputs, and there are {number} columns "
            f"({', '.join(paths)}): give one column for each input"
        )
    inputs = []
    bad: dict[int, str] = {}
    is_alone = number == 1
    for column, name, shape in zip(fields, paths, plan.shapes_of(number), strict=True):
        try:
            # as in predict_batch_udf, an empty shape says nothing beside other inputs
            known = shape if is_alone else shape or None
            if is_list(column.type):
                inputs.append(_tensor(column, name, known, usual_shape, is_alone=is_alone))
            else:
                inputs.append(_numbers(column, name, known))
        except BadRows as found:
            bad = {**found.rows, **bad}
    if bad:
        raise BadRows(bad)
    return tuple(inputs)


def null_rows(
    columns: Sequence[pa.Array], names: Sequence[str], plan: InputPlan
) -> np.ndarray | None:
    """Find the rows to leave out because an input is null; None: there are none.

    A null among the elements of an array is not a null input; one among a struct's fields is.
    """
    if plan.nulls == "pass":
        return None
    bad: dict[int, str] = {}
    found: np.ndarray | None = None
    for column, name in zip(*_fields(columns, names), strict=True):
        if not column.null_count:
            continue
        is_null = column.is_null().to_numpy(zero_copy_only=False)
        found = is_null if found is None else found | is_null
        if plan.nulls == "raise":
            for row in np.flatnonzero(is_null).tolist():
                bad.setdefault(row, f"column {name!r} is null, and nulls='raise' refuses that")
    if bad:
        raise BadRows(bad)
    return found


def to_numpy(column: pa.Array, name: str) -> np.ndarray:
    """Make one array of a column of which no shape is known.

    That is ``(batch,)`` of scalars; ``(batch, length, ...)`` of arrays of one length; and of others
    ``(batch,)`` objects, which are arrays, or None for a null.
    """
    if is_vector(column.type):
        column = _vectors_as_lists(column)
    if is_list(column.type):
        return _named(_arrays, column, name)[0]
    return _named(_scalars, column, name)


def _named(convert: Callable[[pa.Array], T], column: pa.Array, name: str) -> T:
    """Convert a column, and name the rows with values that NumPy cannot hold."""
    try:
        return convert(column)
    except pa.ArrowInvalid:
        parts = halves(
            len(column),
            lambda part: convert(column.slice(part.start, part.stop - part.start)),
            pa.ArrowInvalid,
        )
        bad = {
            part.start: f"column {name!r} of type {column.type} has a value that NumPy cannot "
            f"hold: {found}"
            for part, found in parts
            if isinstance(found, pa.ArrowInvalid)
        }
        if bad:
            raise BadRows(bad) from None
        raise


class UsualShape:
    """What shape the arrays of a partition's rows have, where nobody has said it.

    Rows with another shape than most are bad rows. Where as many have one shape as another, all
    of these reach the model, which knows.
    """

    def __init__(self) -> None:
        self._counts: Counter[Shape] = Counter()

    def of_usual_shape(self, values: np.ndarray, name: str) -> np.ndarray:
        """Return the next rows' arrays, unless the shape of some is unusual."""
        shapes: list[Shape | None]
        if values.dtype != object and len(values):
            shapes = [values.shape[1:]] * len(values)
        else:
            shapes = [_shape_of(each) for each in values]
        counts = self._counts + Counter(shape for shape in shapes if shape is not None)
        most = max(counts.values(), default=0)
        usual = {shape for shape, count in counts.items() if count == most}
        bad = {
            row: f"column {name!r} has an array of {_sizes(shape)}, and most rows have "
            f"{_sizes(next(iter(usual)))}: input_tensor_shapes would say what is right"
            if usual
            else f"column {name!r} has an array of arrays that differ in length"
            for row, shape in enumerate(shapes)
            if shape not in usual
        }
        if bad:
            raise BadRows(bad)
        self._counts = counts
        return values


def _sizes(shape: Shape | None) -> str:
    return "arrays that differ" if shape is None else f"{' x '.join(map(str, shape))} values"


def _shape_of(value: Any) -> Shape | None:
    """Return the shape that an array has, or would have as one array; None if arrays in it differ.

    Of anything else that is ().
    """
    if not isinstance(value, np.ndarray):
        return ()
    if value.dtype != object or not any(isinstance(each, np.ndarray) for each in value):
        return tuple(value.shape)
    inner = {_shape_of(each) for each in value}
    shape = inner.pop()
    return None if inner or shape is None else (len(value), *shape)


def as_one_array(values: np.ndarray) -> np.ndarray:
    """Make one array of objects that are arrays of one shape, if that is what they are."""
    if values.dtype != object or not len(values) or not isinstance(values[0], np.ndarray):
        return values
    shapes = {_shape_of(each) for each in values}
    if len(shapes) > 1 or None in shapes:
        return values
    return np.stack([as_one_array(each) for each in values])


def _fields(columns: Sequence[pa.Array], names: Sequence[str]) -> tuple[list[pa.Array], list[str]]:
    """Put fields in the place of structs, and lists in the place of vectors."""
    fields: list[pa.Array] = []
    paths: list[str] = []
    for column, name in zip(columns, names, strict=True):
        if pa.types.is_struct(column.type) and not is_vector(column.type):
            fields += column.flatten()
            paths += [f"{name}.{field.name}" for field in column.type]
        else:
            fields.append(_vectors_as_lists(column) if is_vector(column.type) else column)
            paths.append(name)
    return fields, paths


def is_vector(kind: pa.DataType) -> bool:
    """Whether it is what MLlib's VectorUDT is in Arrow."""
    return (
        pa.types.is_struct(kind)
        and [field.name for field in kind] == _VECTOR_FIELDS
        and pa.types.is_int8(kind.field(0).type)
        and pa.types.is_int32(kind.field(1).type)
        and is_list(kind.field(2).type)
        and is_list(kind.field(3).type)
    )


def is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _vectors_as_lists(column: pa.Array) -> pa.Array:
    """Make lists of float64 of MLlib's vectors, with the zeros that sparse ones leave out."""
    kinds, sizes, indices, values = column.flatten()
    is_sparse = _filled(kinds, 1) == 0
    if not is_sparse.any():
        return values
    counts = _filled(pc.list_value_length(values), 0)
    ends = np.zeros(len(column) + 1, np.int64)
    np.cumsum(np.where(is_sparse, _filled(sizes, 0), counts), out=ends[1:])
    rows = np.repeat(np.arange(len(column)), counts)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    places[is_sparse[rows]] = indices.flatten().to_numpy(zero_copy_only=False)
    dense = np.zeros(ends[-1])
    dense[ends[rows] + places] = values.flatten().to_numpy(zero_copy_only=False)
    mask = column.is_null() if column.null_count else None
    return pa.LargeListArray.from_arrays(pa.array(ends), pa.array(dense), mask=mask)


def _filled(column: pa.Array, value: int) -> np.ndarray:
    return _raw(pc.fill_null(column, value))


def _stacked(columns: Sequence[pa.Array], names: Sequence[str], shape: Shape | None) -> np.ndarray:
    """Put columns of scalars side by side, as DataFrame.to_numpy() does."""
    arrays = [_named(_scalars, *each) for each in zip(columns, names, strict=True)]
    # NumPy would make numbers of booleans among numbers, and strings of numbers among strings
    if len({each.dtype for each in arrays}) > 1 and any(
        each.dtype.kind not in "iuf" for each in arrays
    ):
        # NumPy's objects for nanoseconds are bare integers
        arrays = [
            each.astype("datetime64[us]") if each.dtype.kind == "M" else each for each in arrays
        ]
        arrays = [each.astype(object) for each in arrays]
    stacked = np.stack(arrays, axis=1)
    if shape is None:
        return stacked
    if math.prod(shape) != len(columns):
        raise InputError(
            f"the columns {', '.join(names)} make an input of {len(columns)} values a row, and its "
            f"shape {list(shape)} takes {math.prod(shape)}: give [{len(columns)}], or other columns"
        )
    return stacked.reshape(len(stacked), *shape)


def _numbers(column: pa.Array, name: str, shape: Shape | None) -> np.ndarray:
    values = _named(_scalars, column, name)
    if not shape:
        return values
    if math.prod(shape) != 1:
        raise InputError(
            f"column {name!r} is of type {column.type}, which is one value a row, and its shape "
            f"{list(shape)} takes {math.prod(shape)}: give None for it in input_tensor_shapes, or "
            "an array column"
        )
    return values.reshape(len(values), *shape)


def _tensor(
    column: pa.Array,
    name: str,
    shape: Shape | None,
    usual_shape: UsualShape | None,
    *,
    is_alone: bool,
) -> np.ndarray:
    _, ends, nulls = _leaves(column)
    lengths = ends[1:] - ends[:-1]
    bad = {}
    if shape is not None:
        takes = math.prod(shape)
        for row in np.flatnonzero(lengths != takes).tolist():
            bad[row] = (
                f"column {name!r} has {lengths[row]} values, and its shape {list(shape)} "
                f"takes {takes}"
            )
    for row in nulls.tolist():
        bad[row] = f"column {name!r} is null, or an array in it is, and an array must be there"
    if bad:
        raise BadRows(bad)
    if shape is not None:
        flat = _named(lambda part: _scalars(_leaves(part)[0]), column, name)
        return flat.reshape(len(column), *shape)
    values, is_ragged = _named(_arrays, column, name)
    if not is_alone:
        return values
    if usual_shape is not None:
        return usual_shape.of_usual_shape(values, name)
    if is_ragged:
        raise InputError(
            f"the arrays of column {name!r} differ in length within a batch (from {lengths.min()} "
            f"to {lengths.max()} values), and no shape is known: give input_tensor_shapes, one "
            "shape for each input without the batch's dimension, as in [[28, 28]], and arrays of "
            "that many values"
        )
    return values


def _leaves(column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Return what is in arrays, and in arrays of arrays, one row after the other.

    Also where in that each row begins, and the last one's end; and the rows that have a null in the
    place of an array.
    """
    values, ends = _elements(column)
    nulls = np.flatnonzero(column.is_null()) if column.null_count else np.empty(0, np.int64)
    if not is_list(values.type):
        return values, ends, nulls
    leaves, inner_ends, inner_nulls = _leaves(values)
    rows = np.searchsorted(ends, inner_nulls, side="right") - 1
    return leaves, inner_ends[ends], np.union1d(nulls, rows)


def _elements(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Return what is in lists, where in it each of them begins, and the last one's end."""
    rows = len(column)
    if pa.types.is_fixed_size_list(column.type):
        size = column.type.list_size
        return column.values.slice(column.offset * size, rows * size), np.arange(rows + 1) * size
    if not rows:
        return column.values.slice(0, 0), np.zeros(1, np.int64)
    ends = column.offsets.to_numpy()
    first = ends[0]
    return column.values.slice(first, ends[-1] - first), ends - first if first else ends


def _arrays(column: pa.Array) -> tuple[np.ndarray, bool]:
    """Return lists as one array if their lengths allow it, else as objects, and which it is."""
    values, ends = _elements(column)
    inner, is_ragged = _arrays(values) if is_list(values.type) else (_scalars(values), False)
    lengths = ends[1:] - ends[:-1]
    length = int(lengths[0]) if len(lengths) else 0
    if pa.types.is_fixed_size_list(column.type):
        length = column.type.list_size
    if not column.null_count and (lengths == length).all():
        return inner.reshape(len(column), length, *inner.shape[1:]), is_ragged
    objects = np.empty(len(column), object)
    for row, is_valid in enumerate(column.is_valid().to_pylist()):
        objects[row] = inner[ends[row] : ends[row + 1]] if is_valid else None
    return objects, True


def _scalars(column: pa.Array) -> np.ndarray:
    """Return what pandas would: integers with nulls as float64, dates and decimals as objects."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _scalars(column.dictionary_decode())
    if pa.types.is_date(kind):
        return _raw(column).astype("datetime64[D]").astype(object)
    if pa.types.is_timestamp(kind):
        local = column if kind.tz is None else pc.local_timestamp(column)
        return _raw(local.cast(pa.timestamp("ns")))
    if pa.types.is_duration(kind):
        return _raw(column.cast(pa.duration("ns")))
    if pa.types.is_nested(kind):
        values = np.empty(len(column), object)
        convert = dict if pa.types.is_map(kind) else lambda value: value
        values[:] = [None if each is None else convert(each) for each in column.to_pylist()]
        return values
    return _raw(column)


def _raw(column: pa.Array) -> np.ndarray:
    values: np.ndarray = column.to_numpy(zero_copy_only=False)
    return values
