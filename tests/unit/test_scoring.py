"""One partition, without Spark: batches, overlap, bad rows."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from horovodrunner import PredictionError
from horovodrunner.inference import Model, transforming
from horovodrunner.inference.inputs import InputError, InputPlan
from horovodrunner.inference.loading import ModelHandle
from horovodrunner.inference.outputs import OutputError
from horovodrunner.inference.scoring import PIECES_AHEAD, Scoring, score
from tests import processes
from tests.waiting import wait_until

SECONDS = 30


def of(predict: Callable[..., Any], target: pa.DataType | None = None, **options: Any) -> Scoring:
    options = {"batch_size": 4, "names": ("x",), "plan": InputPlan.of(None, "pass"), **options}
    handle = ModelHandle.of_make_predict_fn(lambda: predict)
    return Scoring(model=handle, target=target or pa.float64(), safe=True, **options)


def rows(*values: Any, **more: Sequence[Any]) -> Iterator[pa.RecordBatch]:
    """Make one batch of each sequence; of other columns, as many rows as they have."""
    start = 0
    for each in values:
        stop = start + len(each)
        columns = {"x": pa.array(each), **{k: pa.array(v[start:stop]) for k, v in more.items()}}
        yield pa.RecordBatch.from_pydict(columns)
        start = stop


def predicted(scoring: Scoring, batches: Iterator[pa.RecordBatch]) -> list[list[Any]]:
    return [predictions.to_pylist() for _, predictions, _ in score(scoring, batches)]


def with_errors(scoring: Scoring, batches: Iterator[pa.RecordBatch]) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    for _, predictions, errors in score(replace(scoring, on_error="null"), batches):
        assert errors is not None
        found += zip(predictions.to_pylist(), errors.to_pylist(), strict=True)
    return found


def fails_at(*bad: float) -> Callable[[np.ndarray], np.ndarray]:
    def predict(x: np.ndarray) -> np.ndarray:
        for each in bad:
            if each in x:
                raise ArithmeticError(f"not {each:g}")
        return x * 2.0

    return predict


# ---- batches


def test_batches_have_the_size_whatever_sparks_batches_have() -> None:
    sizes = []

    def predict(x: np.ndarray) -> np.ndarray:
        sizes.append(len(x))
        return x * 2.0

    parts = [[1, 2, 3], [], [4, 5, 6, 7, 8, 9], [10]]
    assert predicted(of(predict), rows(*(np.array(p, np.int64) for p in parts))) == [
        [2.0 * each for each in part] for part in parts
    ]
    assert sizes == [4, 4, 2]


def test_a_function_may_write_to_its_inputs_and_use_its_outputs_again() -> None:
    outputs = np.zeros(2)

    def predict(x: np.ndarray) -> np.ndarray:
        x *= 2
        outputs[: len(x)] = x
        return outputs[: len(x)]

    given = [1.0, 2.0, 3.0]
    for batch, predictions, _ in score(of(predict, batch_size=2), rows(given)):
        assert predictions.to_pylist() == [2.0, 4.0, 6.0]
        assert batch["x"].to_pylist() == given


def test_inputs_that_a_model_has_changed_are_given_again_as_they_were() -> None:
    def predict(x: np.ndarray) -> np.ndarray:
        x += 1
        if 4.0 in x:
            raise ArithmeticError("no 3")
        return x

    found = with_errors(of(predict, batch_size=8), rows([1.0, 2.0, 3.0, 5.0]))
    assert [value for value, _ in found] == [2.0, 3.0, None, 6.0]


def test_a_partition_without_rows_needs_no_model() -> None:
    def load_model() -> Callable[..., Any]:
        raise AssertionError

    handle = ModelHandle.of_make_predict_fn(load_model)
    assert predicted(replace(of(len), model=handle), iter(())) == []


def test_rows_come_with_their_predictions_as_they_came() -> None:
    batches = list(rows([1.0, 2.0], [3.0], other=["a", "b", "c"]))
    for (batch, predictions, errors), original in zip(
        score(of(lambda x: x + 1), iter(batches)), batches, strict=True
    ):
        assert batch is original
        assert predictions.to_pylist() == [x + 1 for x in original["x"].to_pylist()]
        assert errors is None


def test_the_next_rows_are_read_while_the_model_computes() -> None:
    read_on = threading.Event()

    def batches() -> Iterator[pa.RecordBatch]:
        yield from rows([1.0] * 4)
        read_on.set()
        yield from rows([2.0] * 4)

    def predict(x: np.ndarray) -> np.ndarray:
        assert read_on.wait(SECONDS)
        return x

    assert predicted(of(predict), batches()) == [[1.0] * 4, [2.0] * 4]


def test_no_more_is_read_ahead_than_said() -> None:
    numbers = []

    def batches() -> Iterator[pa.RecordBatch]:
        for number in range(50):
            numbers.append(number)
            yield from rows([float(number)] * 4)

    found = score(of(lambda x: x), batches())
    next(found)
    time.sleep(0.2)  # for the thread to go as far as it can
    # those that wait, the one in the thread's hand, the one computed, and one more in between
    assert len(numbers) <= PIECES_AHEAD + 3
    found.close()  # type: ignore[attr-defined]


def test_leaving_early_ends_the_threads() -> None:
    def threads() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name == "horovodrunner-prefetch"]

    found = score(of(lambda x: x, transform=dict), rows(*([[1.0] * 4] * 20)))
    next(found)
    assert len(threads()) == 2
    found.close()  # type: ignore[attr-defined]
    wait_until(lambda: not threads())


# ---- rows that cannot be scored


def test_the_first_bad_row_is_named_with_its_keys_and_the_cause() -> None:
    scoring = of(fails_at(3, 6), keys=("id", "day"), batch_size=8)
    batches = rows([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], id=[*"abcdef"], day=[*range(6)])
    with pytest.raises(PredictionError) as raised:
        predicted(scoring, batches)
    assert str(raised.value) == (
        "the model failed on the row with id='c', day=2: ArithmeticError: not 3"
    )
    assert isinstance(raised.value.__cause__, ArithmeticError)


def test_without_keys_its_place_is_named() -> None:
    with pytest.raises(PredictionError, match=r"failed on row 4 \(key_columns would name it\)"):
        predicted(of(fails_at(5)), rows([1.0, 2.0], [3.0, 4.0, 5.0]))


def test_a_failure_of_no_single_row_is_told_as_such() -> None:
    def predict(x: np.ndarray) -> np.ndarray:
        if len(x) > 2:
            raise MemoryError("too many")
        return x

    with pytest.raises(PredictionError, match="on 4 rows at once, and with neither half of them"):
        predicted(of(predict), rows([1.0] * 4))


def test_a_failure_of_several_rows_is_narrowed_down_in_few_calls() -> None:
    calls: list[int] = []

    def predict(x: np.ndarray) -> np.ndarray:
        calls.append(len(x))
        if len(x) > 1:
            raise MemoryError("too many")
        return x

    with pytest.raises(PredictionError, match="on 2 rows at once, and with neither half of them"):
        predicted(of(predict, batch_size=64), rows([1.0] * 64))
    assert calls == [64, 32, 16, 8, 4, 2, 1, 1]


def test_bad_rows_become_null_with_a_reason_and_all_others_are_scored() -> None:
    found = with_errors(of(fails_at(2, 7), batch_size=5), rows([*map(float, range(6))], [6.0, 7.0]))
    assert found == [
        (None, f"ArithmeticError: not {x}") if x in {2, 7} else (2.0 * x, None) for x in range(8)
    ]


def test_arrays_of_a_wrong_length_are_bad_rows() -> None:
    scoring = of(lambda x: x.sum((1, 2)), plan=InputPlan.of([[2, 2]], "pass"), keys=("id",))
    values = [[1.0] * 4, [1.0] * 3, [2.0] * 4]
    with pytest.raises(PredictionError, match=r"the row with id=8 cannot be scored: .*'x'.*3.*4"):
        predicted(scoring, rows(values, id=[7, 8, 9]))
    found = with_errors(scoring, rows(values, [[3.0] * 4, []], id=[*range(5)]))
    assert [value for value, _ in found] == [4.0, None, 8.0, 12.0, None]
    assert [error is None for _, error in found] == [True, False, True, True, False]


def test_rows_with_null_inputs() -> None:
    values = [1.0, None, 3.0]
    by_policy = {
        nulls: of(lambda x: x, plan=InputPlan.of(None, nulls))
        for nulls in ("pass", "null", "raise")
    }
    (passed,) = predicted(by_policy["pass"], rows(values))
    assert passed[::2] == [1.0, 3.0]
    assert passed[1] is None or np.isnan(passed[1])
    assert predicted(by_policy["null"], rows(values)) == [values]
    assert with_errors(by_policy["null"], rows(values)) == [(1.0, None), (None, None), (3.0, None)]
    with pytest.raises(PredictionError, match=r"row 1 .*'x'.*null"):
        predicted(by_policy["raise"], rows(values))


def test_a_model_that_gives_something_else_is_no_bad_row() -> None:
    with pytest.raises(OutputError):
        with_errors(of(lambda x: x[:-1]), rows([1.0, 2.0]))
    module: Any = pytest.importorskip("torch").nn.Module

    class Pair(module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return x, x

    with Model.from_torch(Pair()) as model:
        scoring = replace(of(len), model=model.handle(None))
        with pytest.raises(OutputError, match="is a tuple of 2"):
            with_errors(scoring, rows([1.0, 2.0]))


# ---- transforms


def halved(batch: dict[str, Any]) -> dict[str, Any]:
    if 6.0 in batch["x"]:
        raise LookupError("no 6")
    return {"y": batch["x"] / 2, "z": batch["x"]}


@pytest.mark.heavy
@pytest.mark.parametrize("workers", [0, 2])
def test_a_transform_makes_the_models_inputs(workers: int) -> None:
    scoring = of(lambda y, z: y + z, transform=halved, transform_workers=workers)
    assert predicted(scoring, rows([2.0, 4.0], [8.0] * 9)) == [[3.0, 6.0], [12.0] * 9]
    found = with_errors(scoring, rows([2.0, 6.0], [8.0, 6.0, 2.0]))
    failed = (None, "the transform failed: LookupError: no 6")
    assert found == [(3.0, None), failed, (12.0, None), failed, (3.0, None)]
    keyed = replace(scoring, keys=("id",))
    with pytest.raises(PredictionError, match=r"row with id=4 cannot .*LookupError: no 6"):
        predicted(keyed, rows([2.0] * 4, [6.0, 6.0], id=[*range(6)]))
    _end_pools()


def test_what_a_transform_may_not_give() -> None:
    with pytest.raises(InputError, match="gave list: it is to give a dict"):
        predicted(of(len, transform=list), rows([1.0]))
    with pytest.raises(InputError, match=r"was given 2 rows and gave 'x' the shape \(1,\)"):
        predicted(of(len, transform=lambda b: {"x": b["x"][:1]}), rows([1.0, 2.0]))
    with pytest.raises(InputError, match="takes 1 inputs and was given 2"):
        predicted(of(lambda x: x, transform=lambda b: {**b, "y": b["x"]}), rows([1.0]))


def test_a_transforming_process_that_is_killed_is_told() -> None:
    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return batch

    with pytest.raises(PredictionError, match=r"ended before its time.*memory"):
        predicted(of(len, transform=transform, transform_workers=1), rows([1.0]))
    _end_pools()


def test_transforming_processes_end_with_a_python_worker_that_is_killed() -> None:
    program = """
import os, signal
from tests import processes
from tests.waiting import wait_until
from tests.unit.test_scoring import *
scoring = of(lambda x: x, transform=dict, transform_workers=2)
assert predicted(scoring, rows([1.0])) == [[1.0]]
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = processes.run([sys.executable, "-c", program])
    assert ended.returncode == -signal.SIGKILL  # and nothing is left behind, as after every test


def _end_pools() -> None:
    for pool in transforming._pools.values():
        pool.shutdown()
    transforming._pools.clear()


# ---- bad rows of all kinds, where they are to be null


def linear(x: np.ndarray) -> np.ndarray:
    """Take two values a row, as a trained model does."""
    return x.astype(float) @ np.ones(2)


def summed(x: np.ndarray) -> np.ndarray:
    return np.asarray(x.sum(1), float)


GOOD = [1.0, 2.0]
RAGGED: dict[str, tuple[list[Any], list[float | None]]] = {
    "one too long": ([GOOD, [1.0, 2.0, 3.0], GOOD], [3.0, None, 3.0]),
    "the first one": ([[1.0], GOOD, GOOD], [None, 3.0, 3.0]),
    "the last one": ([GOOD, GOOD, []], [3.0, 3.0, None]),
    "several": ([[1.0], GOOD, GOOD, [], GOOD], [None, 3.0, 3.0, None, 3.0]),
    "null": ([GOOD, None, GOOD], [3.0, None, 3.0]),
    "null and ragged": ([None, GOOD, [1.0], GOOD], [None, 3.0, None, 3.0]),
}


@pytest.mark.parametrize("shape", [None, [[2]]], ids=["no shape", "a shape"])
@pytest.mark.parametrize("predict", [linear, summed], ids=["linear", "sum"])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize("case", RAGGED)
def test_one_ragged_row_costs_no_other(
    case: str, batch_size: int, predict: Callable[..., Any], shape: Any
) -> None:
    values, expected = RAGGED[case]
    scoring = of(predict, batch_size=batch_size, plan=InputPlan.of(shape, "pass"))
    bad = [place for place, value in enumerate(expected) if value is None]
    for at, pieces in ((0, [values]), (3, [[GOOD] * 3, values]), (0, [values, [GOOD] * 3])):
        found = with_errors(scoring, rows(*pieces))
        assert [value for value, _ in found[at : at + len(values)]] == expected
        assert [place for place, (_, error) in enumerate(found) if error] == [at + b for b in bad]
        assert all(error is None or "'x'" in error for _, error in found)


def test_a_model_knows_where_the_rows_do_not_tell() -> None:
    one_each = rows([[1.0]], [[1.0, 2.0]], [[3.0, 4.0, 5.0]])
    assert [value for value, _ in with_errors(of(linear), one_each)] == [None, 3.0, None]
    tied = with_errors(of(linear), rows([[1.0], GOOD]))
    assert [value for value, _ in tied] == [None, 3.0]
    assert "ValueError" in tied[0][1]
    none = with_errors(of(linear), rows([[1.0], [1.0, 2.0, 3.0], []]))
    assert [value for value, _ in none] == [None] * 3


def test_arrays_of_arrays_may_be_ragged_inside() -> None:
    square = [[1.0, 2.0], [3.0, 4.0]]
    scoring = of(lambda x: x.sum((1, 2)))
    values = [square, [[1.0], [3.0, 4.0]], square, [[1.0, 2.0]], square]
    found = with_errors(scoring, rows(values))
    assert [value for value, _ in found] == [10.0, None, 10.0, None, 10.0]


def test_a_ragged_row_beside_other_inputs_costs_no_other() -> None:
    scoring = of(lambda x, y: linear(x) + y, names=("x", "y"))
    found = with_errors(scoring, rows([GOOD, [1.0], GOOD, GOOD], y=[1.0, 2.0, 3.0, 4.0]))
    assert [value for value, _ in found] == [4.0, None, 6.0, 7.0]
    lengths = of(lambda x, y: np.array([len(each) for each in x]) + y, names=("x", "y"))
    found = with_errors(lengths, rows([GOOD, [1.0]], y=[1.0, 2.0]))
    assert found == [(3.0, None), (3.0, None)]  # it takes arrays that differ


def test_vectors_of_another_size_are_bad_rows() -> None:
    kind = pa.struct(
        [
            ("type", pa.int8()),
            ("size", pa.int32()),
            ("indices", pa.list_(pa.int32())),
            ("values", pa.list_(pa.float64())),
        ]
    )
    dense = {"type": 1, "size": None, "indices": None, "values": GOOD}
    sparse = {"type": 0, "size": 2, "indices": [1], "values": [5.0]}
    larger = {**sparse, "size": 4}
    column = pa.array([dense, larger, sparse, None, dense], kind)
    found = with_errors(of(linear), iter([pa.RecordBatch.from_arrays([column], ["x"])]))
    assert [value for value, _ in found] == [3.0, None, 5.0, None, 3.0]


def test_values_that_numpy_cannot_hold_are_bad_rows() -> None:
    late = pa.array([0, 64_000_000_000_000_000, 10**6], pa.timestamp("us"))
    batch = pa.RecordBatch.from_arrays([late], ["x"])
    found = with_errors(of(lambda x: x.astype("int64") / 1e9), iter([batch]))
    assert [value for value, _ in found] == [0.0, None, 1.0]
    named = of(lambda x: x, transform=lambda b: {"x": b["x"].astype("int64") / 1e9})
    assert [value for value, _ in with_errors(named, iter([batch]))] == [0.0, None, 1.0]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_predictions_that_the_type_cannot_hold_are_bad_rows(batch_size: int) -> None:
    numbers = [1.0, 2.5, 300.0, 4.0, float("nan")]
    scoring = of(lambda x: x, pa.int8(), batch_size=batch_size)
    found = with_errors(scoring, rows(numbers))
    assert [value for value, _ in found] == [1, None, None, 4, None]
    assert [error is None for _, error in found] == [True, False, False, True, True]
    assert "2.5" in found[1][1]
    with pytest.raises(OutputError, match=r"2\.5"):
        predicted(scoring, rows(numbers))
    texts = of(lambda x: ["7" if each < 3 else each for each in x], pa.string())
    assert [value for value, _ in with_errors(texts, rows([1.0, 3.0]))] == ["7", None]
    pair = pa.struct([("a", pa.int8()), ("b", pa.float64())])
    fields = of(lambda x: {"a": x, "b": x}, pair, batch_size=batch_size)
    assert [value for value, _ in with_errors(fields, rows(numbers[:2]))] == [
        {"a": 1, "b": 1.0},
        None,
    ]
    dicts = of(lambda x: [{"a": 1, "b": e} if e < 3 else {"a": 1} for e in x.tolist()], pair)
    assert [v and v["b"] for v, _ in with_errors(dicts, rows(numbers[:4]))] == [1, 2.5, None, None]


def sized(batch: dict[str, Any]) -> dict[str, Any]:
    """Make an image of each number, as a decoder does: one size for a batch, or an error."""
    images = [np.full((int(each), int(each)), each) for each in batch["x"]]
    if len({each.shape for each in images}) > 1:
        raise ValueError("different sizes")
    return {"image": np.stack(images)}


@pytest.mark.heavy
@pytest.mark.parametrize("workers", [0, 2])
def test_one_image_of_another_size_costs_no_other(workers: int) -> None:
    scoring = of(lambda x: x.mean((1, 2)), transform=sized, transform_workers=workers)
    found = with_errors(scoring, rows([2.0, 2.0, 3.0, 2.0], [2.0, float("nan")]))
    assert [value for value, _ in found] == [2.0, 2.0, None, 2.0, 2.0, None]
    ragged = of(lambda x: x, transform=lambda b: {"x": b["x"].sum(1)})
    found = with_errors(ragged, rows([GOOD, GOOD, [1.0], None, GOOD]))
    assert [value for value, _ in found][:2] == [3.0, 3.0]
    assert found[3][0] is None
    assert found[4] == (3.0, None)
    _end_pools()
