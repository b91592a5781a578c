"""Predictions become Arrow arrays: the values that predict_batch_udf gives."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from horovodrunner import DataError
from horovodrunner.errors import ArgumentValueError
from horovodrunner.inference.outputs import OutputError, arrow_type, to_arrow

NAN = float("nan")
DAY = datetime.date(2020, 7, 1)
NOON = datetime.datetime(2020, 7, 1, 12)
BERLIN = pa.timestamp("us", "Europe/Berlin")


def array_of(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element))


FLOATS = array_of(pa.float32())
STRUCT = pa.struct([("x", pa.float64()), ("y", FLOATS)])


def converted(predictions: Any, target: pa.DataType, rows: int = 3, **how: Any) -> Any:
    found = to_arrow(predictions, rows, target, **how)
    found.validate(full=True)
    assert found.type == target
    assert len(found) == rows
    return found.to_pylist()


def refusal(predictions: Any, target: pa.DataType, rows: int = 3, **how: Any) -> str:
    with pytest.raises(OutputError) as found:
        to_arrow(predictions, rows, target, **how)
    assert isinstance(found.value, DataError)
    assert isinstance(found.value, ValueError)
    return str(found.value)


def test_what_has_the_right_type_is_not_copied() -> None:
    for kind in ("int8", "int16", "int32", "int64", "float32", "float64"):
        values = np.arange(6).astype(kind)
        target = pa.from_numpy_dtype(values.dtype)
        for shape in [(6,), (6, 1)]:
            found = to_arrow(values.reshape(shape), 6, target)
            assert np.shares_memory(found.to_numpy(), values)
        found = to_arrow(values.reshape(3, 2), 3, array_of(target))
        assert np.shares_memory(found.values.to_numpy(), values)


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [
        (np.array([1.5, NAN, -2.5]), pa.float64(), [1.5, None, -2.5]),
        (np.array([1.5, NAN, -2.5]), pa.float32(), [1.5, None, -2.5]),
        (np.array([1.5, NAN, -2.5], "float32"), pa.float64(), [1.5, None, -2.5]),
        (np.array([1.5, NAN, -2.5], "float16"), pa.float32(), [1.5, None, -2.5]),
        (np.array([2.0, NAN, -2.0]), pa.int8(), [2, None, -2]),
        (np.array([1.5, np.inf, 1e300]), pa.float32(), [1.5, np.inf, np.inf]),
        (np.array([1, 2, 3], "float16"), pa.int8(), [1, 2, 3]),
        (np.array([True, False, True]), pa.int8(), [1, 0, 1]),
        (np.array([True, False, True]), pa.float32(), [1, 0, 1]),
        (np.array([1, -2, 3], ">i4"), pa.int64(), [1, -2, 3]),
        (np.arange(6.0)[::2], pa.float64(), [0, 2, 4]),
        (np.array([1, None, 2], object), pa.int32(), [1, None, 2]),
        (np.array([1.5, None, NAN], object), pa.int32(), [1, None, None]),
        (np.array([1, None, 2], object), pa.float32(), [1, None, 2]),
        (np.array(["a", "ü", ""]), pa.string(), ["a", "ü", ""]),
        (np.array([b"a", b"b", b"c"]), pa.string(), ["a", "b", "c"]),
        (np.array(["a", None, NAN], object), pa.string(), ["a", None, None]),
        (np.array(["1", "2", "3"]), pa.int32(), [1, 2, 3]),
        (["a", None, "b"], pa.string(), ["a", None, "b"]),
        ([1, 2, 3], pa.float64(), [1, 2, 3]),
        ([1, None, 3], pa.int64(), [1, None, 3]),
        ((1, 2, 3), pa.int64(), [1, 2, 3]),
        (np.array([1, 0, 1]), pa.bool_(), [True, False, True]),
        ([b"\0", None, b"b"], pa.binary(), [b"\0", None, b"b"]),
        (np.array(["2020-07-01"] * 3, "datetime64[D]"), pa.date32(), [DAY] * 3),
        (np.array(["2020-07-01"] * 3, "datetime64[ns]"), pa.date32(), [DAY] * 3),
        ([DAY, None, DAY], pa.date32(), [DAY, None, DAY]),
        (np.array([1, 0, 12345]), pa.decimal128(10, 2), [1, 0, 12345]),
        (np.array([1.25, NAN, 1]), pa.decimal128(10, 2), [decimal.Decimal("1.25"), None, 1]),
        (
            [decimal.Decimal("1.5"), None, 1],
            pa.decimal128(10, 2),
            [decimal.Decimal("1.5"), None, 1],
        ),
    ],
)
def test_scalars(values: Any, target: pa.DataType, expected: list[Any]) -> None:
    assert converted(values, target) == expected


def test_timestamps_without_a_time_zone_are_in_the_session_s() -> None:
    zoned = NOON.replace(tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    aware = np.array([zoned] * 3, object)
    for values in (np.array([NOON] * 3, "datetime64[ns]"), [NOON] * 3, aware):
        assert converted(values, BERLIN) == [zoned] * 3
    plain = np.array([NOON, "NaT", NOON], "datetime64[s]")
    assert converted(plain, pa.timestamp("us")) == [NOON, None, NOON]
    finer = np.array([NOON] * 3, "datetime64[ns]") + np.timedelta64(1, "ns")
    assert converted(finer, pa.timestamp("us")) == [NOON] * 3


@pytest.mark.parametrize(
    ("values", "target", "text", "unsafely"),
    [
        (np.array([1.5, NAN, -2.7]), pa.int32(), "1.5.* truncated", [1, None, -2]),
        (np.array([300, -129, 5]), pa.int8(), "300 not in range", [44, 127, 5]),
        (np.array([2**24 + 1, 2, 3]), pa.float32(), "16777217", [2**24, 2, 3]),
    ],
)
def test_numbers_that_do_not_fit(
    values: Any, target: pa.DataType, text: str, unsafely: list[Any]
) -> None:
    with pytest.raises(OutputError, match=text):
        to_arrow(values, 3, target)
    assert converted(values, target, safe=False) == unsafely


@pytest.mark.parametrize(
    ("values", "element", "expected"),
    [
        (np.array([[1.5, NAN]] * 3), pa.float64(), [1.5, None]),
        (np.array([[1.5, NAN]] * 3), pa.float32(), [1.5, None]),
        (np.array([[1.5, 2]] * 3, "float16"), pa.float32(), [1.5, 2]),
        (np.array([[1.5, -2.7]] * 3), pa.int32(), [1, -2]),
        (np.array([[1.0, 2.0]] * 3, "float32"), pa.int32(), [1, 2]),
        (np.array([[1, 2]] * 3), pa.int8(), [1, 2]),
        (np.array([[True, False]] * 3), pa.float64(), [1, 0]),
        (np.array([["1", "b"]] * 3), pa.string(), ["1", "b"]),
        (np.array([[1, None]] * 3, object), pa.int32(), [1, None]),
        (np.arange(6, dtype=">f4").reshape(2, 3).T * 0, pa.float32(), [0, 0]),
        (np.ones((3, 0)), pa.float32(), []),
    ],
)
def test_arrays(values: Any, element: pa.DataType, expected: list[Any]) -> None:
    assert converted(values, array_of(element)) == [expected] * 3
    assert converted(list(values), array_of(element)) == [expected] * 3


def test_nan_stays_in_arrays_of_float32_alone() -> None:
    """So does Spark 4.1, where a NumPy float64 is a Python float, and a float32 is none."""
    for target in (pa.float32(), pa.float64()):
        found = converted(np.array([[NAN]] * 3, "float32"), array_of(target))
        np.testing.assert_equal(found, [[NAN]] * 3)
    assert "truncated" in refusal(np.array([[1.5]] * 3, "float32"), array_of(pa.int32()))
    assert "truncated" in refusal(np.array([[3e10]] * 3), array_of(pa.int32()))
    assert "not in range" in refusal(np.array([[300]] * 3), array_of(pa.int8()))


def test_non_contiguous_arrays() -> None:
    values = np.arange(12, dtype="float32").reshape(2, 6).T[::2]
    assert converted(values, FLOATS) == values.tolist()


def test_arrays_of_different_lengths() -> None:
    rows = [np.ones(2), None, [1, 2, 3]]
    expected = [[1, 1], None, [1, 2, 3]]
    assert converted(rows, FLOATS) == expected
    as_objects = np.empty(3, object)
    as_objects[:] = rows
    assert converted(as_objects, FLOATS) == expected
    for element in (pa.float32(), pa.string()):
        assert converted([[], None, []], array_of(element)) == [[], None, []]
    assert converted([["a"], [], ["b", None]], array_of(pa.string())) == [["a"], [], ["b", None]]


def test_arrays_of_arrays() -> None:
    nested = array_of(FLOATS)
    values = np.arange(12.0).reshape(3, 2, 2)
    assert converted(values, nested) == values.tolist()
    assert converted(list(values), nested) == values.tolist()
    assert converted([[[1], [2, 3]], None, []], nested) == [[[1], [2, 3]], None, []]
    assert "shape (2,) where array<float> takes single values" in refusal(values, FLOATS)
    assert "shape (2,) where array<float> takes single values" in refusal(list(values), FLOATS)
    assert "takes one array a row" in refusal(np.ones(3), nested)


def test_structs() -> None:
    ones, pairs = np.ones(3), np.ones((3, 2), "float32")
    whole = [{"x": 1.0, "y": [1.0, 1.0]}] * 3
    assert converted({"y": pairs, "x": ones}, STRUCT) == whole
    assert converted({"x": ones[:, None], "y": list(pairs)}, STRUCT) == whole
    assert converted([{"y": np.ones(2), "x": np.float32(1)}] * 3, STRUCT) == whole
    rows = [{"x": 1, "y": [1.0]}, {"x": None, "y": None}, {"x": NAN, "y": np.ones(2)}]
    assert converted(rows, STRUCT) == [
        {"x": 1.0, "y": [1.0]},
        {"x": None, "y": None},
        {"x": None, "y": [1.0, 1.0]},
    ]
    assert converted([], STRUCT, rows=0) == []
    label = pa.struct([("label", pa.string()), ("score", pa.float32())])
    pipeline = [{"label": "POSITIVE", "score": 0.5}] * 3
    assert converted(pipeline, label) == pipeline
    nested = pa.struct([("a", pa.struct([("b", pa.int32())]))])
    assert converted({"a": {"b": [1, 2, 3]}}, nested) == [{"a": {"b": n}} for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("values", "target", "texts"),
    [
        (np.ones((3, 2)), pa.float64(), ["shape (3, 2)", "(3,) or (3, 1)", "array<double>"]),
        (np.ones((3, 1, 1)), pa.float64(), ["shape (3, 1, 1)", "(3,) or (3, 1)"]),
        (np.float64(3), pa.float64(), ["single float64", "each of the 3 rows"]),
        (None, FLOATS, ["single NoneType", "array<float>"]),
        (np.ones(2), pa.float64(), ["2 rows, and the batch has 3"]),
        (np.ones((2, 2)), FLOATS, ["2 rows, and the batch has 3"]),
        (np.ones(3), FLOATS, ["shape (3,)", "(3, length)"]),
        ([1, 2, 3], FLOATS, ["has 1 for a row"]),
        (np.array([1, 2, 3]), pa.string(), ["int64", "string", "no text"]),
        (np.array([[1.5]] * 3), array_of(pa.string()), ["float64", "array<string>"]),
        (np.array(["a", 5, "b"], object), pa.string(), ["object", "string"]),
        (np.array(["1", "x", "2"]), pa.int32(), ["int32", "'x'"]),
        (np.array([1j] * 3), pa.float64(), ["complex128"]),
        ([[1], [2, 3], []], pa.float64(), ["list", "double"]),
        ({"x": np.ones(3)}, pa.float64(), ["dict with the keys 'x'", "double takes an array"]),
        ({"x": np.ones(3)}, STRUCT, ["it lacks 'y'"]),
        ({"x": 1, "y": 1, "z": 1}, STRUCT, ["keys: the return type lacks 'z'"]),
        ({"x": 1, "z": 1, "w": 1}, STRUCT, ["lacks 'y' and the return type lacks 'z', 'w'"]),
        ([{"x": 1, "y": [1]}, {"x": 1}, {}], STRUCT, ["for row 1", "it lacks 'y'"]),
        ([{"x": 1, "y": [1]}] * 2, STRUCT, ["2 rows, and the batch has 3"]),
        (np.ones(3), STRUCT, ["ndarray", "dict of arrays with the keys 'x', 'y'"]),
        ({"x": np.ones(3), "y": np.ones(3)}, STRUCT, ["the predicted 'y' has the shape (3,)"]),
        ({"x": np.ones(2), "y": np.ones((3, 1))}, STRUCT, ["the predicted 'x' has 2 rows"]),
        ({"x": ["a"] * 3, "y": np.ones((3, 1))}, STRUCT, ["the predicted 'x'", "double"]),
    ],
)
def test_what_does_not_fit_is_refused(values: Any, target: pa.DataType, texts: list[str]) -> None:
    found = refusal(values, target)
    for text in texts:
        assert text in found


def test_batches_without_rows() -> None:
    for target in (pa.float32(), pa.string(), pa.int8(), BERLIN, FLOATS):
        assert converted([], target, rows=0) == []
    assert converted(np.empty((0, 4)), FLOATS, rows=0) == []
    assert converted({"x": [], "y": np.empty((0, 4))}, STRUCT, rows=0) == []


def test_tensors() -> None:
    torch = pytest.importorskip("torch")
    assert converted(torch.ones(3, 2, requires_grad=True), FLOATS) == [[1, 1]] * 3
    assert converted(torch.ones(3, 1, dtype=torch.bfloat16), pa.float32()) == [1, 1, 1]
    assert converted([torch.tensor(1.0)] * 3, pa.float32()) == [1, 1, 1]
    rows = [torch.ones(2), torch.ones(1), torch.ones(0)]
    assert converted(rows, FLOATS) == [[1, 1], [1], []]
    values = torch.arange(6.0)
    found = to_arrow(values.reshape(3, 2), 3, FLOATS)
    assert np.shares_memory(found.values.to_numpy(), values.numpy())
    assert "to_dense" in refusal(torch.ones(3, 2).to_sparse(), FLOATS)


def spark_types() -> list[tuple[Callable[[Any], Any], Any]]:
    return [
        (lambda t: t.BooleanType(), pa.bool_()),
        (lambda t: t.ByteType(), pa.int8()),
        (lambda t: t.ShortType(), pa.int16()),
        (lambda t: t.IntegerType(), pa.int32()),
        (lambda t: t.LongType(), pa.int64()),
        (lambda t: t.FloatType(), pa.float32()),
        (lambda t: t.DoubleType(), pa.float64()),
        (lambda t: t.StringType(), pa.string()),
        (lambda t: t.BinaryType(), pa.binary()),
        (lambda t: t.DateType(), pa.date32()),
        (lambda t: t.TimestampType(), BERLIN),
        (lambda t: t.TimestampNTZType(), pa.timestamp("us")),
        (lambda t: t.DecimalType(10, 2), pa.decimal128(10, 2)),
        (lambda t: t.ArrayType(t.ArrayType(t.FloatType())), array_of(FLOATS)),
        (
            lambda t: t.StructType().add("x", t.DoubleType()).add("y", t.ArrayType(t.FloatType())),
            STRUCT,
        ),
        (
            lambda t: t.StructType().add("a", t.StructType().add("b", t.LongType(), False)),
            pa.struct([("a", pa.struct([pa.field("b", pa.int64(), nullable=False)]))]),
        ),
    ]


def test_spark_types() -> None:
    types = pytest.importorskip("pyspark.sql.types")
    for make, expected in spark_types():
        assert arrow_type(make(types), "Europe/Berlin").equals(expected), expected
    row = types.StructType().add("a", types.LongType())
    for refused, text in [
        (types.MapType(types.StringType(), types.LongType()), "'map<string,bigint>'"),
        (types.ArrayType(row), "cannot be of the type 'struct<a:bigint>'"),
        (types.StructType(), "cannot be of the type 'struct<>'"),
        (types.NullType(), "void"),
        (types.StructType([*row, *row]), "has a field twice"),
    ]:
        with pytest.raises(ArgumentValueError, match="return_type=") as found:
            arrow_type(refused)
        assert text in str(found.value)
