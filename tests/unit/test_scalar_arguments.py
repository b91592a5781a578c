"""Scalars of NumPy and others as arguments: what was checked is what is used, at every door."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from horovodrunner import ArgumentTypeError, ArgumentValueError, HorovodRunner, checkpoint, data
from horovodrunner import validation as checked
from horovodrunner.callbacks import keras as keras_callbacks
from horovodrunner.callbacks.torch import LogCallback
from horovodrunner.compat.petastorm import pytorch as petastorm_torch
from horovodrunner.compat.petastorm.options import ReaderOptions
from horovodrunner.data.dataset import DataSet
from horovodrunner.flows.checkpoints.retention import Retention
from horovodrunner.flows.logs import training_log
from horovodrunner.inference import options as inference_options
from horovodrunner.inference.frame import predict


class Size(enum.IntEnum):
    two = 2


class Word(str, enum.Enum):
    all = "all"


@pytest.fixture(scope="module")
def rows() -> Iterator[DataSet]:
    table = pa.table({"row": np.arange(100), "odd": np.arange(100) % 2})
    with data.from_arrow(table) as found:
        yield found


def runner(**options: Any) -> HorovodRunner:
    return HorovodRunner(**{"np": -1, **options})


def kept(**options: Any) -> Retention:
    store = runner(checkpoint_dir="x", **options)._options.store
    assert store is not None
    return store.keep


def read(rows: DataSet, **options: Any) -> Any:
    return rows.numpy(**{"batch_size": 10, **options})


def scoring(**options: Any) -> Any:
    """Check the options of predict and predict_udf."""
    defaults = {
        "batch_size": 8,
        "input_tensor_shapes": None,
        "on_error": "raise",
        "nulls": "pass",
        "key_columns": (),
        "batch_transform": dict,
        "transform_workers": 0,
        "prefetch": 2,
    }
    return inference_options.checked_options(**{**defaults, **options})


def loaded(rows: DataSet, **state: Any) -> Any:
    batches = read(rows)
    batches.load_state_dict({"epoch": 1, "position": 10, **state})
    return batches.state_dict()


def set_epoch(rows: DataSet, epoch: Any) -> Any:
    batches = read(rows)
    batches.epoch = epoch
    return batches.epoch


def saved_step(step: Any) -> int:
    """Save, and return the step that the driver would be told."""
    steps: list[int] = []
    check = checked.integer

    def noted(*arguments: Any, **options: Any) -> int:
        steps.append(check(*arguments, **options))
        return steps[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checked, "integer", noted)
        with checkpoint.save(step=step):
            pass
    return steps[0]


def padded(length: Any) -> int:
    ragged = data.Ragged(np.arange(3), np.array([0, 1, 3]))
    return int(ragged.padded(length).shape[1])


def image_size(size: Any) -> Any:
    decoder: Any = data.decode_images("image", size=(size, 5))
    return decoder.args[1][0]


def petastorm(**options: Any) -> ReaderOptions:
    return ReaderOptions.checked(options)


INTEGERS: dict[str, Callable[[DataSet, Any], Any]] = {
    "np": lambda _, n: runner(np=n)._options.np,
    "keep_checkpoints": lambda _, n: kept(keep_checkpoints=n).newest,
    "keep_every": lambda _, n: kept(keep_every=n).every,
    "keep_best": lambda _, n: getattr(kept(keep_best=("loss", "min", n)).best, "count", None),
    "max_restarts": lambda _, n: runner(max_restarts=n)._options.max_restarts,
    "batch_size": lambda rows, n: read(rows, batch_size=n)._options.batch_size,
    "seed": lambda rows, n: read(rows, seed=n)._options.seed,
    "epoch": lambda rows, n: read(rows, epoch=n).state_dict()["epoch"],
    "epoch, set": set_epoch,
    "shuffle_window": lambda rows, n: read(rows, shuffle_window=n)._options.shuffle_window,
    "threads": lambda rows, n: read(rows, threads=n)._threads,
    "rank": lambda rows, n: read(rows, rank=n, size=3)._options.rank,
    "size": lambda rows, n: read(rows, rank=0, size=n)._options.size,
    "num_workers": lambda rows, n: rows.torch(10, num_workers=n)._loader["num_workers"],
    "position": lambda rows, n: loaded(rows, position=n)["position"],
    "epoch, loaded": lambda rows, n: loaded(rows, epoch=n)["epoch"],
    "length": lambda _, n: padded(n),
    "size, of images": lambda _, n: image_size(n),
    "step": lambda _, n: saved_step(n),
    "batch_size of predict": lambda _, n: scoring(batch_size=n).batch_size,
    "prefetch of predict": lambda _, n: scoring(prefetch=n).prefetch,
    "transform_workers": lambda _, n: scoring(transform_workers=n).transform_workers,
    "epochs": lambda _, n: max(LogCallback().epochs(n)) + 1,
    "start": lambda _, n: next(LogCallback().epochs(5, start=n)),
    "num_epochs": lambda _, n: petastorm(num_epochs=n).num_epochs,
    "workers_count": lambda _, n: petastorm(workers_count=n).workers_count,
    "seed of petastorm": lambda _, n: petastorm(seed=n).seed,
    "shard_seed": lambda _, n: petastorm(shard_seed=n).seed,
    "cur_shard": lambda _, n: petastorm(cur_shard=n, shard_count=3).cur_shard,
    "shard_count": lambda _, n: petastorm(cur_shard=0, shard_count=n).shard_count,
    "batch_size of petastorm": lambda _, n: petastorm_torch.DataLoader(None, n).batch_size,
    "shuffling_queue_capacity": lambda _, n: (
        petastorm_torch.BatchedDataLoader(None, shuffling_queue_capacity=n).shuffling_queue_capacity
    ),
}
BOOLEANS: dict[str, Callable[[DataSet, Any], Any]] = {
    "resume": lambda _, yes: runner(resume=yes)._options.resume,
    "tf_config": lambda _, yes: runner(tf_config=yes)._options.tf_config,
    "profile_launch": lambda _, yes: runner(profile_launch=yes)._options.profile_launch,
    "keep_warm": lambda _, yes: runner(keep_warm=yes)._options.keep_warm,
    "shuffle": lambda rows, yes: read(rows, shuffle=yes)._options.shuffle,
    "pin_memory": lambda rows, yes: rows.torch(10, pin_memory=yes)._loader["pin_memory"],
}
SECONDS: dict[str, Callable[[Any], Any]] = {
    "start_timeout": lambda number: runner(start_timeout=number)._options.start_timeout,
    "stall_timeout": lambda number: runner(stall_timeout=number)._options.stall_timeout,
}
WHOLE: dict[str, Any] = {
    "int64": np.int64(2),
    "uint8": np.uint8(2),
    "int32 array": np.array(2, np.int32),
    "enum": Size.two,
}
NOT_WHOLE: dict[str, Any] = {
    "float": 2.0,
    "float64": np.float64(2),
    "float array": np.array(2.0),
    "decimal": Decimal(2),
    "fraction": Fraction(2),
    "text": "2",
    "str_": np.str_("2"),
    "bool": True,
    "bool_": np.True_,
    "list": [2],
    "two numbers": np.array([2, 2]),
    "timedelta": np.timedelta64(2, "s"),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("door", INTEGERS)
def test_a_whole_number_of_any_library_becomes_an_int(rows: DataSet, door: str, kind: str) -> None:
    used = INTEGERS[door](rows, WHOLE[kind])
    assert (type(used), used) == (int, 2)


@pytest.mark.parametrize("kind", NOT_WHOLE)
@pytest.mark.parametrize("door", INTEGERS)
def test_what_is_no_whole_number_is_refused_by_name(rows: DataSet, door: str, kind: str) -> None:
    name = {"shard_seed": "seed"}.get(door, door.partition(",")[0].partition(" of ")[0])
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match=rf"{name}\b") as caught:
        INTEGERS[door](rows, NOT_WHOLE[kind])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.True_, np.array(True)], ids=["bool_", "array"])
@pytest.mark.parametrize("door", BOOLEANS)
def test_a_bool_of_numpy_is_one(rows: DataSet, door: str, value: Any) -> None:
    assert BOOLEANS[door](rows, value) is True


@pytest.mark.parametrize("value", [1, np.int64(1), "yes", np.array([True])], ids=str)
@pytest.mark.parametrize("door", BOOLEANS)
def test_what_is_no_bool_is_refused_by_name(rows: DataSet, door: str, value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=f"{door}=.*True or False"):
        BOOLEANS[door](rows, value)


@pytest.mark.parametrize("door", SECONDS)
def test_seconds_are_any_real_number(door: str) -> None:
    numbers: list[Any] = [60, np.int64(60), np.float32(60), np.array(60.0), Decimal(60)]
    for number in (*numbers, Fraction(60), np.longdouble(60)):
        used = SECONDS[door](number)
        assert (type(used), used) == (float, 60.0)
    for wrong in (np.True_, np.str_("60"), np.timedelta64(60, "s"), np.array([60]), 60j):
        with pytest.raises(ArgumentTypeError, match=f"{door}=.*number of seconds"):
            SECONDS[door](wrong)
    for wrong in (np.float32("nan"), np.int64(0), Decimal("NaN"), 10**400):
        with pytest.raises(ArgumentValueError, match=f"{door}="):
            SECONDS[door](wrong)


def test_tensors_are_scalars_as_well(rows: DataSet) -> None:
    torch = pytest.importorskip("torch")
    assert type(runner(np=torch.tensor(-2))._options.np) is int
    assert runner(resume=torch.tensor(False))._options.resume is False
    assert runner(start_timeout=torch.tensor(0.5))._options.start_timeout == 0.5
    assert saved_step(torch.tensor(3)) == 3
    with pytest.raises(ArgumentTypeError, match="not a bool"):
        runner(np=torch.tensor(True))


def test_text_of_numpy_and_members_of_enums_are_plain_text(tmp_path: Path) -> None:
    for word in (np.str_("all"), Word.all, np.array("all")):
        assert runner(driver_log_verbosity=word)._options.shows_output is True
    for auto in (np.str_("auto"), np.array("auto")):
        assert type(runner(keep_warm=auto)._options.keep_warm) is str
    for path in (tmp_path, np.str_(tmp_path), np.array(str(tmp_path))):
        store = runner(checkpoint_dir=path)._options.store
        assert store is not None
        assert type(store.location) is str
    for wrong in (np.array(["all", "x"]), b"all", 3, None):
        with pytest.raises(ArgumentValueError, match="'all' or 'log_callback_only'"):
            runner(driver_log_verbosity=wrong)


def test_amounts_of_resources_are_numbers_of_python() -> None:
    amounts = runner(
        resources={np.str_("gpu"): np.float32(0.5), "cpus": np.int64(2)}
    )._options.resources
    assert amounts == {"gpu": 0.5, "cpus": 2}
    assert [type(each) for each in (*amounts, *amounts.values())] == [str, str, float, int]
    with pytest.raises(ArgumentValueError, match="'gpu' must be a whole number"):
        runner(resources={"gpu": Decimal("NaN")})


def test_a_state_is_json_whatever_was_given(rows: DataSet) -> None:
    options: dict[str, Any] = {"epoch": np.uint64(2**63), "shuffle": np.True_}
    batches = rows.numpy(np.int64(10), seed=np.int64(2**62), **options)
    next(iter(batches))  # shuffling computes with more than 64 bits
    batches.load_state_dict({"epoch": np.int64(2), "position": np.int32(30)})
    assert json.loads(json.dumps(batches.state_dict())) == {"epoch": 2, "position": 30}
    same = rows.numpy(10, seed=2**62, epoch=2, shuffle=True)
    same.load_state_dict({"epoch": 2, "position": 30})
    assert [b["row"].tolist() for b in batches] == [b["row"].tolist() for b in same]


def test_names_may_come_from_numpy_and_pandas(rows: DataSet) -> None:
    pandas = pytest.importorskip("pandas")
    for names in (np.array(["odd"]), pandas.Index(["odd"]), ("odd",), {"odd": 1}.keys()):
        assert list(next(iter(read(rows, columns=names)))) == ["odd"]
    assert scoring(key_columns=np.array(["a"])).keys == ("a",)
    for wrong in ("odd", np.str_("odd"), 3, [3], b"odd", [], np.array([])):
        with pytest.raises(ArgumentTypeError, match="columns"):
            read(rows, columns=wrong)
        if not isinstance(wrong, (list, np.ndarray)):
            with pytest.raises(ArgumentTypeError, match="key_columns"):
                scoring(key_columns=wrong)


def test_a_null_is_filled_with_a_scalar_of_any_library() -> None:
    torch = pytest.importorskip("torch")
    table = pa.table({"x": pa.array([1.0, None]), "yes": pa.array([True, None])})
    for number in (np.int64(7), np.float32(7), np.array(7.0), torch.tensor(7.0)):
        nulls = {np.str_("x"): data.fill(number), "yes": data.fill_with_indicator(np.True_)}
        with data.from_arrow(table, nulls=nulls) as filled:
            (batch,) = filled.numpy(np.int64(2))
        assert batch["x"].tolist() == [1.0, 7.0]
        assert batch["yes"].tolist() == [True, True]
        assert batch["yes_is_null"].tolist() == [False, True]
    with pytest.raises(ArgumentTypeError, match=r"nulls=.*give a dict"):
        data.from_arrow(table, nulls=["x"])  # type: ignore[arg-type]


def test_predict_reads_files_only_if_that_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"inputs": "x", "return_type": "double", "batch_size": 2}
    for wrong in (1, "never", ["auto"], None):
        with pytest.raises(ArgumentTypeError, match=r"read_files=.*'auto', True or False"):
            predict(None, dict, **options, read_files=wrong)  # type: ignore[arg-type]
    for name in ("output", "error_column", "inputs"):
        with pytest.raises(ArgumentTypeError, match=f"{name}"):
            predict(None, dict, **{**options, name: 3})  # type: ignore[arg-type]


def test_frameworks_count_with_numpy_too() -> None:
    assert training_log.count_or_none(np.int64(3)) == 3
    assert [training_log.count_or_none(n) for n in (0, -1, None, float("inf"))] == [None] * 4
    callback = type("Callback", (), {"params": {"epochs": np.int64(3)}})()
    assert keras_callbacks._of(callback, "epochs") == 3


def test_shapes_and_words_of_numpy() -> None:
    from horovodrunner.inference.inputs import InputPlan

    plan = InputPlan.of([np.array([2, 3]), (np.array(4),)], np.array("null"))
    assert repr(plan) == repr(InputPlan.of([[2, 3], [4]], "null"))
    assert repr(InputPlan.of(np.array([[2, 3]]))) == repr(InputPlan.of([[2, 3]]))
    with pytest.raises(ArgumentValueError, match=r"^nulls=array.*'pass', 'null' or 'raise'"):
        InputPlan.of(None, np.array(["null", "raise"]))
