"""Columns of a batch become the arrays a model takes: the ones predict_batch_udf makes."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from horovodrunner import DataError
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError
from horovodrunner.inference.inputs import (
    BadRows,
    InputError,
    InputPlan,
    null_rows,
    numpy_inputs,
    to_numpy,
)

NAN = float("nan")


def inputs(*columns: Any, shapes: Any = None, expected: int | None = 1, **how: Any) -> Any:
    names = [f"c{number}" for number in range(len(columns))]
    arrays = [column if isinstance(column, pa.Array) else pa.array(column) for column in columns]
    plan = InputPlan.of(shapes)
    found = numpy_inputs(arrays, names, plan, expected=expected, **how)
    return found[0] if len(found) == 1 else found


def bad_rows(*columns: Any, **how: Any) -> dict[int, str]:
    with pytest.raises(BadRows) as found:
        inputs(*columns, **how)
    return found.value.rows


def shares_memory(column: pa.Array, values: np.ndarray) -> bool:
    leaves = column
    while isinstance(leaves, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        leaves = leaves.values
    return np.shares_memory(leaves.to_numpy(), values)


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "float32", "float64"])
def test_numbers_are_not_copied(kind: str) -> None:
    column = pa.array(np.arange(10).astype(kind)).slice(3, 4)
    found = inputs(column)
    assert found.dtype == kind
    assert found.tolist() == [3, 4, 5, 6]
    assert shares_memory(column, found)
    assert not found.flags.writeable


@pytest.mark.parametrize(
    ("column", "dtype", "values"),
    [
        (pa.array([1, None], pa.int32()), "float64", [1, NAN]),
        (pa.array([1.5, None], pa.float32()), "float32", [1.5, NAN]),
        (pa.array([True, False, True]).slice(1), "bool", [False, True]),
        (pa.array([True, None]), "object", [True, None]),
        (pa.array(["a", None]), "object", ["a", None]),
        (pa.array(["a", "b"]).dictionary_encode(), "object", ["a", "b"]),
        (pa.array([b"\0x", None]), "object", [b"\0x", None]),
        (pa.array([datetime.date(1, 1, 1), None]), "object", [datetime.date(1, 1, 1), None]),
        (pa.array([decimal.Decimal("1.50"), None]), "object", [decimal.Decimal("1.50"), None]),
        (pa.array([{"a": 1}, None], pa.map_(pa.string(), pa.int8())), "object", [{"a": 1}, None]),
        (pa.array([], pa.float32()), "float32", []),
    ],
)
def test_scalars_are_what_pandas_makes_of_them(
    column: pa.Array, dtype: str, values: list[Any]
) -> None:
    found = inputs(column)
    assert found.dtype == dtype
    np.testing.assert_equal(found.tolist(), values)


def test_timestamps_are_in_the_time_zone_of_the_session() -> None:
    noon = datetime.datetime(2020, 7, 1, 12)
    utc = np.datetime64("2020-07-01T12", "ns")
    zoned = inputs(pa.array([noon, None], pa.timestamp("us", "Europe/Berlin")))
    assert zoned.dtype == "datetime64[ns]"
    assert zoned[0] == utc + np.timedelta64(2, "h")
    assert np.isnat(zoned[1])
    assert inputs(pa.array([noon], pa.timestamp("us")))[0] == utc
    assert inputs(pa.array([datetime.timedelta(1)])).dtype == "timedelta64[ns]"
    with pytest.raises(BadRows, match=r"row 0: column 'c0' of type timestamp.us. has a value"):
        inputs(pa.array([datetime.datetime(1, 1, 1)]))
    with pytest.raises(BadRows, match="column 'then' of type"):
        to_numpy(pa.array([datetime.datetime(1, 1, 1)]), "then")


LISTS = {
    "list": pa.list_(pa.float32()),
    "large_list": pa.large_list(pa.float32()),
    "fixed_size_list": pa.list_(pa.float32(), 6),
}


@pytest.mark.parametrize("kind", LISTS)
def test_arrays_become_tensors_without_a_copy(kind: str) -> None:
    rows = np.arange(60, dtype="float32").reshape(10, 6)
    whole = pa.array(list(rows), LISTS[kind])
    for start, length in [(0, 10), (3, 4), (9, 1), (4, 0), (10, 0)]:
        column = whole.slice(start, length)
        expected = rows[start : start + length]
        for shape in [[6], [2, 3], (3, 1, 2)]:
            found = inputs(column, shapes=[shape])
            assert found.dtype == "float32"
            assert np.array_equal(found, expected.reshape(length, *shape))
            assert shares_memory(whole, found) == (length > 0)
        assert inputs(column, shapes={0: [2, 3]}).shape == (length, 2, 3)
        if length or kind == "fixed_size_list":
            assert np.array_equal(inputs(column), expected)
    # a slice of a slice
    found = inputs(whole.slice(2).slice(3, 2), shapes=[[6]])
    assert np.array_equal(found, rows[5:7])


def test_arrays_of_arrays_are_flattened() -> None:
    values = np.arange(24.0).reshape(4, 3, 2)
    column = pa.array(values.tolist()).slice(1, 2)
    assert np.array_equal(inputs(column, shapes=[[3, 2]]), values[1:3])
    assert np.array_equal(inputs(column, shapes=[[6]]), values[1:3].reshape(2, 6))
    assert np.array_equal(inputs(column), values[1:3])
    assert shares_memory(column, inputs(column, shapes=[[3, 2]]))
    fixed = pa.array(values.tolist(), pa.list_(pa.list_(pa.float64(), 2), 3)).slice(1, 2)
    assert np.array_equal(inputs(fixed, shapes=[[3, 2]]), values[1:3])
    assert np.array_equal(inputs(fixed), values[1:3])


def test_nulls_within_arrays() -> None:
    floats = inputs(pa.array([[1, None], [2, 3]], pa.list_(pa.float32())), shapes=[[2]])
    assert floats.dtype == "float32"
    np.testing.assert_equal(floats, np.array([[1, NAN], [2, 3]], "float32"))
    ints = inputs([[1, None], [2, 3]], shapes=[[2]])
    assert ints.dtype == "float64"
    np.testing.assert_equal(ints, [[1, NAN], [2, 3]])
    # a null outside of the slice makes no difference
    assert inputs(pa.array([[1, None], [2, 3]]).slice(1), shapes=[[2]]).dtype == "int64"
    assert inputs([["a", None]], shapes=[[2]]).tolist() == [["a", None]]


@pytest.mark.parametrize("kind", ["list", "large_list"])
def test_rows_with_another_length_are_named(kind: str) -> None:
    column = pa.array([[1], [1, 2], [1, 2, 3], None, [3, 4], [5, 6]], LISTS[kind])
    rows = bad_rows(column.slice(1), shapes=[[2, 1]])
    assert sorted(rows) == [1, 2]
    assert rows[1] == "column 'c0' has 3 values, and its shape [2, 1] takes 2"
    assert rows[2].startswith("column 'c0' is null")
    # lengths that make up for each other
    assert sorted(bad_rows([[1, 2], [3], [4, 5, 6]], shapes=[[2]])) == [1, 2]


def test_rows_without_an_array_are_named_whatever_the_shape() -> None:
    fixed = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2))
    assert list(bad_rows(fixed, shapes=[[2]])) == [1]
    assert list(bad_rows(fixed.slice(1))) == [0]
    assert inputs(fixed.slice(2), shapes=[[2]]).tolist() == [[3, 4]]
    nested = pa.array([[[0]], [[1, 2], [3, 4]], [[1, 2], None], None, [[1, 2]]]).slice(1)
    rows = bad_rows(nested, shapes=[[2, 2]])
    assert list(rows) == [1, 2, 3]
    assert "an array in it is" in rows[1]
    assert "2 values" in rows[3]


def test_bad_rows_of_all_columns_are_found_at_once() -> None:
    found = bad_rows([[1], [2, 2], [3]], [[1, 1], [2], None], shapes=[[1], [2]], expected=2)
    assert {row: text[:11] for row, text in found.items()} == {
        1: "column 'c0'",
        2: "column 'c1'",
    }
    assert str(BadRows(found)).endswith("takes 1 (and 1 more rows)")


def test_arrays_that_differ_in_length() -> None:
    column = pa.array([[9], [1, 2], [3]]).slice(1)
    with pytest.raises(InputError, match=r"'c0' differ in length .* 1 to 2 .* input_tensor_shapes"):
        inputs(column)
    with pytest.raises(InputError, match="differ in length"):
        inputs([[[1], [2, 3]], [[1], [2, 3]]])
    found, _ = inputs(column, [1, 2], shapes=[None, None], expected=2)
    assert found.dtype == object
    assert [each.tolist() for each in found] == [[1, 2], [3]]
    said_nothing: list[Any] = [{}, [[], []]]
    for shapes in said_nothing:
        same, _ = inputs([[1, 2], [3, 4]], [1, 2], shapes=shapes, expected=2)
        assert same.tolist() == [[1, 2], [3, 4]]
    assert list(bad_rows([[1], None, [2, 3]], [1, 2, 3], expected=2)) == [1]


def test_several_columns_for_several_inputs() -> None:
    numbers, arrays = [1, 2], [[1.0, 2.0], [3.0, 4.0]]
    for shapes in ([None, [2]], {1: [2]}, [[], [2]], None):
        one, other = inputs(numbers, arrays, shapes=shapes, expected=2)
        assert one.tolist() == numbers
        assert other.tolist() == arrays
    one, _ = inputs(numbers, arrays, shapes=[[1], [2]], expected=2)
    assert one.tolist() == [[1], [2]]
    assert len(inputs(numbers, arrays, numbers, expected=None)) == 3


def test_structs_count_as_their_fields() -> None:
    struct = pa.array([{"a": 9, "b": [9]}, {"a": 1, "b": [2]}, {"a": 2, "b": [3]}]).slice(1)
    found = inputs(struct, [5, 6], shapes={1: [1]}, expected=3)
    assert [each.tolist() for each in found] == [[1, 2], [[2], [3]], [5, 6]]
    assert bad_rows(struct, shapes={1: [2]}, expected=2)[0].startswith("column 'c0.b'")
    # a struct that is null has null fields
    nulls = pa.StructArray.from_arrays([pa.array([1, 2])], ["a"], mask=pa.array([False, True]))
    np.testing.assert_equal(inputs(nulls), [1, NAN])


@pytest.mark.parametrize(
    ("columns", "dtype", "values"),
    [
        (([1, 2], [1.5, 2.5]), "float64", [[1, 1.5], [2, 2.5]]),
        (([1, 2], [3, None]), "float64", [[1, 3], [2, NAN]]),
        ((pa.array([1.5], pa.float32()), pa.array([2], pa.int16())), "float32", [[1.5, 2]]),
        (([True, False], [True, True]), "bool", [[True, True], [False, True]]),
        (([1, 2], [True, None]), "object", [[1, True], [2, None]]),
        (([1, 2], ["a", "b"]), "object", [[1, "a"], [2, "b"]]),
        (
            ([datetime.datetime(2020, 1, 1)], [1]),
            "object",
            [[datetime.datetime(2020, 1, 1), 1]],
        ),
    ],
)
def test_the_fields_of_one_struct_make_one_input(
    columns: Any, dtype: str, values: list[Any]
) -> None:
    for how in ({"grouped": True}, {"stacks_scalars": True}):
        found = inputs(*columns, **how)
        assert found.dtype == dtype
        np.testing.assert_equal(found.tolist(), values)
    assert inputs(*columns, stacks_scalars=True, expected=None).dtype == dtype
    assert inputs(*columns, grouped=True, shapes=[[2]]).shape == (len(values), 2)
    assert inputs(*columns, grouped=True, shapes=[[2, 1]]).shape == (len(values), 2, 1)


@pytest.mark.parametrize(
    ("columns", "how", "text"),
    [
        (([1], [2]), {}, r"takes one input, and there are 2 columns \(c0, c1\).*array\(\)"),
        (([[1]], [2]), {"grouped": True}, "takes one input, and there are 2 columns"),
        (([[1]], [2]), {"stacks_scalars": True}, "takes one input, and there are 2 columns"),
        (([1], [2]), {"expected": 3}, "takes 3 inputs, and there are 2 columns"),
        (([1],), {"expected": 2}, "takes 2 inputs, and there are 1 columns"),
        (
            ([1], [2]),
            {"grouped": True, "shapes": [[3]]},
            "2 values a row, and its shape .3. takes 3",
        ),
        (([1],), {"shapes": [[2]]}, "'c0' is of type int64, which is one value .* takes 2"),
        (([[1]],), {"shapes": [[1], [1]]}, "input_tensor_shapes has 2 shapes, and there are 1"),
        (([1], [1]), {"shapes": [[1]], "expected": 2}, "has 1 shapes, and there are 2 inputs"),
        (([1],), {"shapes": {1: [1]}}, "speaks of input 1, and there are 1 inputs"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: Any, how: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text) as found:
        inputs(*columns, **how)
    assert isinstance(found.value, (DataError, ValueError))


def test_shapes_of_scalars() -> None:
    assert inputs([1, 2], shapes=[[1]]).tolist() == [[1], [2]]
    said_nothing: list[Any] = [[[]], [None], [], {}]
    for shapes in said_nothing:
        assert inputs([1, 2], shapes=shapes).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("shapes", "error", "text"),
    [
        ([28, 28], ArgumentTypeError, r"has 28 for an input.*\[\[28, 28\], None\]"),
        ("ab", ArgumentTypeError, "must be a list"),
        (["ab"], ArgumentTypeError, "has 'ab' for an input"),
        (7, ArgumentTypeError, "must be a list"),
        ([[2.0]], ArgumentTypeError, "2.0 is none"),
        ([[True]], ArgumentTypeError, "True is none"),
        ([[None, 3]], ArgumentTypeError, "batch's dimension is not part"),
        ([[-1, 3]], ArgumentValueError, "-1 is not. The batch's dimension is not part"),
        ([[0]], ArgumentValueError, "0 is not"),
        ({"a": [1]}, ArgumentTypeError, "key 'a'"),
        ({-1: [1]}, ArgumentTypeError, "key -1"),
    ],
)
def test_wrong_shapes_are_refused(shapes: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        InputPlan.of(shapes)


def test_a_plan_is_plain_data() -> None:
    assert InputPlan.of([(np.int64(2), 3), None]) == InputPlan(((2, 3), None))
    assert InputPlan.of({1: [2]}).shapes_of(3) == (None, (2,), None)
    assert InputPlan.of([]) == InputPlan.of(None) == InputPlan()
    with pytest.raises(ArgumentValueError, match=r"nulls='drop': it must be .* or 'raise'"):
        InputPlan.of(nulls="drop")


def test_rows_with_nulls() -> None:
    columns = [
        pa.array([9, 1, None, 3]).slice(1),
        pa.array([[1], [1, None], [2], None]).slice(1),
        pa.array([{"x": 1}, {"x": None}, {"x": 1}, {"x": 1}]).slice(1),
    ]
    names = ["a", "b", "c"]
    assert null_rows(columns, names, InputPlan.of(nulls="pass")) is None
    found = null_rows(columns, names, InputPlan.of(nulls="null"))
    assert found is not None
    assert found.tolist() == [True, True, True]
    assert null_rows(columns[1:2], names[1:2], InputPlan.of(nulls="null")).tolist() == [  # type: ignore[union-attr]
        False,
        False,
        True,
    ]
    with pytest.raises(BadRows) as refused:
        null_rows(columns, names, InputPlan.of(nulls="raise"))
    assert {row: text[:20] for row, text in refused.value.rows.items()} == {
        0: "column 'c.x' is null",
        1: "column 'a' is null, ",
        2: "column 'b' is null, ",
    }
    for nulls in ("null", "raise"):
        assert null_rows([pa.array([1])], ["a"], InputPlan.of(nulls=nulls)) is None


def vectors(*rows: Any) -> pa.Array:
    """Make what Spark sends of MLlib's vectors: lists are dense ones, pairs and sizes sparse."""
    found: list[dict[str, Any] | None] = []
    for row in rows:
        if row is None:
            found.append(None)
        elif isinstance(row, list):
            found.append({"type": 1, "values": row})
        else:
            size, values = row
            found.append(
                {"type": 0, "size": size, "indices": list(values), "values": [*values.values()]}
            )
    return pa.array(
        found,
        pa.struct(
            [
                pa.field("type", pa.int8(), nullable=False),
                ("size", pa.int32()),
                ("indices", pa.list_(pa.int32())),
                ("values", pa.list_(pa.float64())),
            ]
        ),
    )


def test_vectors_become_tensors() -> None:
    column = vectors([9.0], [1.0, 2.0, 3.0], (3, {0: 5.0, 2: 7.0}), (3, {}), [4.0, 5.0, 6.0])
    dense = [[1, 2, 3], [5, 0, 7], [0, 0, 0], [4, 5, 6]]
    assert inputs(column.slice(1), shapes=[[3]]).tolist() == dense
    assert inputs(column.slice(1)).tolist() == dense
    assert inputs(column.slice(2, 2)).tolist() == dense[1:3]
    assert to_numpy(column.slice(1), "v").tolist() == dense
    assert inputs(column.slice(1), shapes=[[3, 1]]).shape == (4, 3, 1)
    only_dense = vectors([1.0, 2.0], [3.0, 4.0])
    assert shares_memory(only_dense.field(3), inputs(only_dense))
    assert list(bad_rows(column, shapes=[[3]])) == [0]
    with_null = vectors([1.0, 2.0], None, (2, {1: 5.0}), None)
    assert list(bad_rows(with_null, shapes=[[2]])) == [1, 3]
    assert null_rows([with_null], ["v"], InputPlan.of(nulls="null")).tolist() == [  # type: ignore[union-attr]
        False,
        True,
        False,
        True,
    ]
    one, other = inputs(column.slice(1), [1, 2, 3, 4], expected=2)
    assert one.tolist() == dense
    assert other.tolist() == [1, 2, 3, 4]


def test_a_column_without_a_shape() -> None:
    assert to_numpy(pa.array([[1, 2], [3, 4]]), "a").tolist() == [[1, 2], [3, 4]]
    ragged = to_numpy(pa.array([[1], None, [2, 3]]), "a")
    assert ragged.dtype == object
    assert [None if each is None else each.tolist() for each in ragged] == [[1], None, [2, 3]]
    nested = to_numpy(pa.array([[[1], [2, 3]], []]), "a")
    assert [[inner.tolist() for inner in each] for each in nested] == [[[1], [2, 3]], []]
    assert to_numpy(pa.array(["x"]), "a").tolist() == ["x"]
    assert to_numpy(pa.array([], pa.list_(pa.int8())), "a").shape == (0, 0)
