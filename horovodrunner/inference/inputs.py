"""From the columns of a batch to the arrays a model takes. Runs in: Spark's Python workers.

The same arrays as ``pyspark.ml.functions.predict_batch_udf`` makes by way of pandas, made from
Arrow's buffers: numbers, and tensors without nulls, are not copied, and no row becomes a Python
object. Only what NumPy itself holds as objects is: strings, binary values, dates, decimals.

What it does not take, and this does:

- MLlib's vectors, dense and sparse ones, as ``(batch, size)`` float64;
- tensor columns without ``input_tensor_shapes``, if all arrays of a batch have the same length;
- arrays of arrays with a shape, and with None beside other inputs;
- shapes given as tuples, and None as the only shape.

Where the two differ:

- a tensor column without a shape beside other inputs is an array of arrays there, and here only if
  the arrays of the batch differ in length; else it is ``(batch, length)``. Both have the same rows;
- a null string is None here; there it is NaN since pandas 3;
- timestamps in arrays are datetime64 here, objects of pandas there;
- an array with too many or too few values is refused with its row, also where those of other rows
  make up for it.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError, DataError

__all__ = [
    "BadRows",
    "InputError",
    "InputPlan",
    "Nulls",
    "UsualShape",
    "as_one_array",
    "is_vector",
    "null_rows",
    "numpy_inputs",
    "shape_of",
    "to_numpy",
]

Nulls = Literal["pass", "null", "raise"]
Shape = tuple[int, ...]

_VECTOR_FIELDS = ["type", "size", "indices", "values"]


class InputError(DataError, ValueError):
    """The columns do not fit the model's inputs, whatever their rows hold."""


class BadRows(Exception):  # noqa: N818 - says which rows of a batch to leave out; caught by the caller
    """Rows of a batch that the model cannot take.

    Parameters
    ----------
    rows
        By the row's number in the batch: what is wrong with it.
    """

    def __init__(self, rows: Mapping[int, str]) -> None:
        super().__init__(rows)
        self.rows = dict(rows)

    def __str__(self) -> str:
        row, text = next(iter(self.rows.items()))
        more = f" (and {len(self.rows) - 1} more rows)" if len(self.rows) > 1 else ""
        return f"row {row}: {text}{more}"


@dataclass(frozen=True)
class InputPlan:
    """What was asked for about a model's inputs; made by :meth:`of`.

    Parameters
    ----------
    shapes
        Each input's shape without the batch's dimension, or None; None: nothing was said.
    is_sparse
        Whether inputs beyond those of `shapes` have no shape, rather than being one too many.
    nulls
        What becomes of rows with null inputs: "pass" gives them to the model as pandas would,
        "null" leaves them out, "raise" refuses them.
    """

    shapes: tuple[Shape | None, ...] | None = None
    is_sparse: bool = False
    nulls: Nulls = "pass"

    @classmethod
    def of(cls, input_tensor_shapes: Any = None, nulls: Any = "pass") -> InputPlan:
        """Check what the user gave.

        Parameters
        ----------
        input_tensor_shapes
            A list of shapes and None, or a dict of shapes by the input's number, or None.
        nulls
            "pass", "null" or "raise".

        Returns
        -------
        InputPlan
            To give to :func:`numpy_inputs`.

        Raises
        ------
        ArgumentTypeError
            If it is something else, or a shape is.
        ArgumentValueError
            If a length in a shape or a key is out of range, or `nulls` is unknown.
        """
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
        """Give the shape of each input.

        Parameters
        ----------
        inputs
            How many there are.

        Returns
        -------
        tuple
            As many shapes, or None.

        Raises
        ------
        InputError
            If input_tensor_shapes speaks of another number of inputs.
        """
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
    for length in shape:
        if isinstance(length, bool) or not isinstance(length, numbers.Integral):
            raise ArgumentTypeError(
                f"input_tensor_shapes has the shape {list(shape)}: its lengths must be ints, and "
                f"{length!r} is none. The batch's dimension is not part of a shape"
            )
        if length < 1:
            raise ArgumentValueError(
                f"input_tensor_shapes has the shape {list(shape)}: its lengths must be 1 or more, "
                f"and {length} is not. The batch's dimension is not part of a shape"
            )
    return tuple(int(length) for length in shape)


def numpy_inputs(
    columns: Sequence[pa.Array],
    names: Sequence[str],
    plan: InputPlan,
    *,
    expected: int | None,
    stacks_scalars: bool = False,
    grouped: bool = False,
    lengths: UsualShape | None = None,
) -> tuple[np.ndarray, ...]:
    """Make the arrays a model takes from the columns of one batch.

    Structs among the columns count as their fields.

    Parameters
    ----------
    columns
        One array per column, all of the same length.
    names
        What the columns are called in error texts.
    plan
        What was asked for.
    expected
        How many inputs the model takes; None: any number.
    stacks_scalars
        Whether several columns of numbers are to make one input of shape ``(batch, columns)``.
    grouped
        Whether the columns were the fields of one struct, which makes one such input, too.
    lengths
        What arrays of which no shape is known had until now, where those that differ are bad rows;
        None: they are an error.

    Returns
    -------
    tuple of ndarray
        One array per input, each ``(batch, ...)``; those that share memory with `columns` are
        read-only.

    Raises
    ------
    InputError
        If the columns do not fit the model's inputs.
    BadRows
        If some of the rows do not.
    """
    fields, paths = _fields(columns, names)
    number = len(fields)
    may_stack = (grouped or stacks_scalars) and not any(_is_list(each.type) for each in fields)
    if number > 1 and may_stack and (expected == 1 or (expected is None and stacks_scalars)):
        try:
            inputs = [_stacked(fields, paths, plan.shapes_of(1)[0])]
        except pa.ArrowInvalid:
            for field, path in zip(fields, paths, strict=True):
                _refuse_rows(_scalars, field, path)
            raise
    elif expected == 1 and number > 1:
        raise InputError(
            f"the model takes one input, and there are {number} columns ({', '.join(paths)}): "
            "make them one with pyspark.sql.functions.array(), or concat() of arrays"
        )
    elif expected is not None and expected != number:
        raise InputError(
            f"the model takes {expected} inputs, and there are {number} columns "
            f"({', '.join(paths)}): give one column for each input"
        )
    else:
        inputs = _one_each(fields, paths, plan.shapes_of(number), lengths)
    return tuple(inputs)


def _one_each(
    columns: Sequence[pa.Array],
    names: Sequence[str],
    shapes: Sequence[Shape | None],
    lengths: UsualShape | None,
) -> list[np.ndarray]:
    inputs = []
    bad: dict[int, str] = {}
    is_alone = len(columns) == 1
    for column, name, shape in zip(columns, names, shapes, strict=True):
        try:
            # as in predict_batch_udf, an empty shape says nothing beside other inputs
            said = shape if is_alone else shape or None
            if lengths is not None and is_alone and said is None and _is_list(column.type):
                inputs.append(lengths.of_usual_shape(_tensor(column, name, None), name))
            else:
                inputs.append(_input(column, name, said, is_alone=is_alone))
        except BadRows as found:
            bad = {**found.rows, **bad}
        except pa.ArrowInvalid:
            try:
                _refuse_rows(_arrays if _is_list(column.type) else _scalars, column, name)
            except BadRows as found:
                bad = {**found.rows, **bad}
    if bad:
        raise BadRows(dict(sorted(bad.items())))
    return inputs


def null_rows(
    columns: Sequence[pa.Array], names: Sequence[str], plan: InputPlan
) -> np.ndarray | None:
    """Find the rows that the plan keeps from the model because an input is null.

    A null among the elements of an array is not a null input; one among a struct's fields is.

    Parameters
    ----------
    columns
        One array per column, all of the same length.
    names
        What the columns are called in error texts.
    plan
        What was asked for.

    Returns
    -------
    ndarray of bool or None
        Shape ``(batch,)``: whether to leave the row out; None: there are none to leave out.

    Raises
    ------
    BadRows
        If there are such rows and the plan refuses them.
    """
    if plan.nulls == "pass":
        return None
    fields, paths = _fields(columns, names)
    bad: dict[int, str] = {}
    found: np.ndarray | None = None
    for column, name in zip(fields, paths, strict=True):
        if not column.null_count:
            continue
        is_null = column.is_null().to_numpy(zero_copy_only=False)
        found = is_null if found is None else found | is_null
        if plan.nulls == "raise":
            for row in np.flatnonzero(is_null).tolist():
                bad.setdefault(row, f"column {name!r} is null, and nulls='raise' refuses that")
    if bad:
        raise BadRows(dict(sorted(bad.items())))
    return found


def to_numpy(column: pa.Array, name: str) -> np.ndarray:
    """Make one array of a column of which no shape is known.

    Parameters
    ----------
    column
        The column's values in one batch.
    name
        What the column is called in error texts.

    Returns
    -------
    ndarray
        ``(batch,)`` of scalars; ``(batch, length, ...)`` of arrays that have the same length; of
        others ``(batch,)`` objects which are arrays, None for a null. It may share memory with
        `column`, and is read-only then.

    Raises
    ------
    InputError
        If NumPy cannot hold the values.
    """
    if is_vector(column.type):
        column = _vectors_as_lists(column)
    try:
        return _arrays(column)[0] if _is_list(column.type) else _scalars(column)
    except pa.ArrowInvalid:
        _refuse_rows(_arrays if _is_list(column.type) else _scalars, column, name)
        raise


def _refuse_rows(convert: Callable[[pa.Array], Any], column: pa.Array, name: str) -> None:
    """Find the rows with values that NumPy cannot hold."""
    bad = {}
    waiting = [(0, len(column))]
    while waiting:
        start, stop = waiting.pop()
        try:
            convert(column.slice(start, stop - start))
        except pa.ArrowInvalid as error:
            if stop - start > 1:
                half = (start + stop) // 2
                waiting += [(half, stop), (start, half)]
            else:
                bad[start] = (
                    f"column {name!r} of type {column.type} has a value that NumPy cannot hold: "
                    f"{error}"
                )
    if bad:
        raise BadRows(bad)


class UsualShape:
    """What shape the arrays of a partition's rows have, where nobody has said it.

    Rows with another shape than most are bad rows. Where as many have one shape as another, all
    of these reach the model, which knows.
    """

    def __init__(self) -> None:
        self._counts: Counter[Shape] = Counter()

    def of_usual_shape(self, values: np.ndarray, name: str) -> np.ndarray:
        """Refuse the rows whose arrays have an unusual shape.

        Parameters
        ----------
        values
            Arrays of the next rows: one array, or objects where they differ.
        name
            What their column is called in error texts.

        Returns
        -------
        ndarray
            The same, if there is no such row.

        Raises
        ------
        BadRows
            If there are some.
        """
        if values.dtype != object and len(values):
            shapes: list[Shape | None] = [values.shape[1:]] * len(values)
        else:
            shapes = [shape_of(each) for each in values]
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


def shape_of(value: Any) -> Shape | None:
    """Return the shape that an array of a row has, or would have as one array.

    Parameters
    ----------
    value
        An array, of arrays perhaps; or anything else, whose shape is ().

    Returns
    -------
    tuple of int or None
        None if arrays in it differ.
    """
    if not isinstance(value, np.ndarray):
        return ()
    if value.dtype != object or not any(isinstance(each, np.ndarray) for each in value):
        return tuple(value.shape)
    inner = {shape_of(each) for each in value}
    shape = inner.pop()
    return None if inner or shape is None else (len(value), *shape)


def as_one_array(values: np.ndarray) -> np.ndarray:
    """Make one array of objects that are arrays of one shape; what is none stays as it is.

    Parameters
    ----------
    values
        Some rows.

    Returns
    -------
    ndarray
        ``(batch, ...)``, if that is possible.
    """
    is_of_arrays = values.dtype == object and len(values) and isinstance(values[0], np.ndarray)
    if not is_of_arrays or len({shape_of(each) for each in values} | {None}) > 2:
        return values
    if shape_of(values[0]) is None:
        return values
    return np.stack([as_one_array(each) for each in values])


def _fields(columns: Sequence[pa.Array], names: Sequence[str]) -> tuple[list[pa.Array], list[str]]:
    """Put fields in the place of structs, and lists in the place of vectors."""
    fields: list[pa.Array] = []
    paths: list[str] = []
    for column, name in zip(columns, names, strict=True):
        if is_vector(column.type):
            fields.append(_vectors_as_lists(column))
            paths.append(name)
        elif pa.types.is_struct(column.type):
            fields += column.flatten()
            paths += [f"{name}.{field.name}" for field in column.type]
        else:
            fields.append(column)
            paths.append(name)
    return fields, paths


def is_vector(kind: pa.DataType) -> bool:
    """Tell whether a type is what MLlib's VectorUDT is in Arrow.

    Parameters
    ----------
    kind
        Any type.

    Returns
    -------
    bool
        True for the struct of a vector's parts.
    """
    return (
        pa.types.is_struct(kind)
        and [field.name for field in kind] == _VECTOR_FIELDS
        and pa.types.is_int8(kind.field(0).type)
        and pa.types.is_int32(kind.field(1).type)
        and _is_list(kind.field(2).type)
        and _is_list(kind.field(3).type)
    )


def _is_list(kind: pa.DataType) -> bool:
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
    arrays = [_scalars(column) for column in columns]
    # NumPy would make numbers of booleans among numbers, and strings of numbers among strings
    if len({each.dtype for each in arrays}) > 1 and any(
        each.dtype.kind not in "iuf" for each in arrays
    ):
        arrays = [_as_objects(each) for each in arrays]
    stacked = np.stack(arrays, axis=1)
    if shape is None:
        return stacked
    if math.prod(shape) != len(columns):
        raise InputError(
            f"the columns {', '.join(names)} make an input of {len(columns)} values a row, and its "
            f"shape {list(shape)} takes {math.prod(shape)}: give [{len(columns)}], or other columns"
        )
    return stacked.reshape(len(stacked), *shape)


def _as_objects(values: np.ndarray) -> np.ndarray:
    # NumPy's objects for nanoseconds are bare integers
    return (values.astype("datetime64[us]") if values.dtype.kind == "M" else values).astype(object)


def _input(column: pa.Array, name: str, shape: Shape | None, *, is_alone: bool) -> np.ndarray:
    if _is_list(column.type):
        return _tensor(column, name, shape, is_alone=is_alone)
    values = _scalars(column)
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
    column: pa.Array, name: str, shape: Shape | None, *, is_alone: bool = False
) -> np.ndarray:
    leaves, ends, nulls = _leaves(column)
    bad = {}
    lengths = ends[1:] - ends[:-1]
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
        return _scalars(leaves).reshape(len(column), *shape)
    values, is_ragged = _arrays(column)
    if is_ragged and is_alone:
        raise InputError(
            f"the arrays of column {name!r} differ in length within a batch (from {lengths.min()} "
            f"to {lengths.max()} values), and no shape is known: give input_tensor_shapes, one "
            "shape for each input without the batch's dimension, as in [[28, 28]], and arrays of "
            "that many values"
        )
    return values


def _leaves(column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Give what is in arrays, and in arrays of arrays, one row after the other.

    Returns
    -------
    tuple
        The values; where in them each row begins, and the last one's end, shape ``(rows + 1,)``;
        and the numbers of the rows which have a null in the place of an array.
    """
    values, ends = _elements(column)
    nulls = np.flatnonzero(column.is_null()) if column.null_count else np.empty(0, np.int64)
    if not _is_list(values.type):
        return values, ends, nulls
    leaves, inner_ends, inner_nulls = _leaves(values)
    rows = np.searchsorted(ends, inner_nulls, side="right") - 1
    return leaves, inner_ends[ends], np.union1d(nulls, rows)


def _elements(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Give what is in lists, where in it each of them begins, and the last one's end."""
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
    """Give lists as one array if their lengths allow it, else each as an array of its own.

    Returns
    -------
    tuple
        ``(rows, length, ...)`` or ``(rows,)`` objects; whether there is a level of such objects.
    """
    values, ends = _elements(column)
    inner, is_ragged = _arrays(values) if _is_list(values.type) else (_scalars(values), False)
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
    """Give what pandas would: integers with nulls as float64, dates and decimals as objects."""
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
