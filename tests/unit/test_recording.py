"""What a run is called with, written down the same way by every process, and what differs."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import decimal
import enum
import functools
import json
import os
import sys
import types
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from horovodrunner.flows.call.record import MAX_ENTRIES, RunRecord, calls_another_main, changes
from horovodrunner.flows.call.recording import record_call
from horovodrunner.flows.checkpoints.manifest import Manifest
from tests import processes

CELL = """
import dataclasses, enum, functools, json, sys, threading
from horovodrunner.flows.call.recording import record_call
LR = 0.1
step = 7  # optimizer.step() does not read it
lock = threading.Lock()
class CFG:
    depth, tags = 3, {"x", "y", "z"}
@dataclasses.dataclass
class Config:
    lr: float = 0.1
    names: tuple = ("a", "b")
def build(width, k=3):
    class Net:
        def forward(self, x):
            return [x * i for i in range(width)]
    return Net() if k in {"a", "b", "c", 3} else None
def logged(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)
    return call
@logged
def train(epochs, config=Config(), tags={"p", "q", "r"}, **more):
    optimizer = build(CFG.depth)
    with lock:
        optimizer.step(LR, config)
record = record_call("run", 2, train, {"epochs": 3, "o": object(), "f": lambda: LR, "m": threading})
print(json.dumps(dataclasses.asdict(record)))
"""
"""A notebook's cell. What is inserted into it by the tests does not change what it does."""

Point = namedtuple("Point", "x y")


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Inner:
    width: int = 4


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    inner: Inner = dataclasses.field(default_factory=Inner)


class Settings:
    def __init__(self, lr: float) -> None:
        self.lr = lr
        self._cache = object()
        self.model = object()


class Slotted:
    __slots__ = ("_cache", "lr", "unset")

    def __init__(self, lr: float) -> None:
        self.lr = lr


class Hostile(dict[str, int]):
    def __len__(self) -> int:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


def of(**kwargs: Any) -> RunRecord:
    def main(**kwargs: Any) -> None:
        pass

    return record_call("run", 2, main, kwargs)


def change(was: Any, now: Any) -> list[str]:
    return changes(of(a=was), of(a=now))


def in_a_fresh_kernel(cell: str, seed: str) -> RunRecord | None:
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    ran = processes.run(
        [sys.executable, "-c", cell], env=environment, capture_output=True, check=True
    )
    return RunRecord.from_fields(json.loads(ran.stdout))


def test_the_same_cell_in_a_fresh_kernel_has_the_same_record() -> None:
    moved = CELL.replace("LR = 0.1", "# a comment\n\n\nLR = 0.1").replace(
        "    optimizer = build", '    """What it does."""\n    optimizer = build'
    )
    first, second = in_a_fresh_kernel(CELL, "1"), in_a_fresh_kernel(moved, "2")
    assert first is not None
    assert first == second
    assert first.arguments["epochs"] == "3"
    assert first.arguments["tags"] == "{'p', 'q', 'r'}"
    assert (first.variables["LR"], first.variables["CFG.depth"]) == ("0.1", "3")
    assert "step" not in first.variables

    edits = [
        ("LR = 0.1", "LR = 0.01", "the variable LR was 0.1, is 0.01"),
        ("depth, tags = 3", "depth, tags = 4", "the variable CFG.depth was 3, is 4"),
        ('epochs": 3', 'epochs": 5', "epochs was 3, is 5"),
        ("lr: float = 0.1", "lr: float = 0.2", "config.lr was 0.1, is 0.2"),
        ("k=3", "k=4", "the variable k of build was 3, is 4"),
        ("x * i", "x + i", "the code of build has changed"),
        ("optimizer.step(LR", "optimizer.leap(LR", "the code of train has changed"),
    ]
    changed = CELL
    for old, new, _ in edits:
        assert old in changed
        changed = changed.replace(old, new)
    third = in_a_fresh_kernel(changed, "3")
    assert third is not None
    found = changes(first, third)
    for _, _, text in edits[:5]:
        assert text in found
    assert any(text.startswith("the code of ") and "build" in text for text in found)
    assert any(text.startswith("the code of ") and "train" in text for text in found)


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        (0.1, 0.01, "a was 0.1, is 0.01"),
        (np.float64(0.1), 0.1, ""),
        (np.int32(3), np.int64(4), "a was 3, is 4"),
        (np.bool_(True), False, "a was True, is False"),
        (np.array(0.5), 0.5, ""),
        (float("nan"), float("nan"), ""),
        pytest.param(10**5000, 10**5000 + 1, "a was 0x", id="long"),
        ("sgd", "adam", "a was 'sgd', is 'adam'"),
        ("x" * 5000, "x" * 5000, ""),
        ("x" * 5000, "x" * 4999 + "y", "(5000 characters, "),
        ("a\x1b[2Jb", "b", r"a was 'a\x1b[2Jb', is 'b'"),
        ((1, 2), (1, 3), "a was (1, 2), is (1, 3)"),
        ((1,), [1], "a was (1,), is [1]"),
        ({"q", "p"}, {"p", "q"}, ""),
        ({"x": {"y": 1, "z": 2}}, {"x": {"y": 1, "z": 3}}, "a['x']['z'] was 2, is 3"),
        ([{"units": 8}], [{"units": 9}], "a[0]['units'] was 8, is 9"),
        (None, 1, "a was None, is 1"),
        (Colour.RED, "RED", "a was Colour.RED, is 'RED'"),
        (Config(), Config(inner=Inner(5)), "a.inner.width was 4, is 5"),
        (Point(1, 2), Point(1, 3), "a.y was 2, is 3"),
        (argparse.Namespace(lr=1), argparse.Namespace(lr=2), "a.lr was 1, is 2"),
        (types.SimpleNamespace(lr=1), types.SimpleNamespace(lr=2), "a.lr was 1, is 2"),
        (Settings(1), Settings(1), ""),
        (Settings(1), Settings(2), "a.lr was 1, is 2"),
        (Slotted(1), Slotted(1), ""),
        (Slotted(1), Slotted(2), "a.lr was 1, is 2"),
        (Path("/data/a"), Path("/data/b"), "a was '/data/a', is '/data/b'"),
        (b"ab", b"ac", "a was 'ab', is 'ac'"),
        (np.dtype("float32"), np.dtype("float64"), "a was float32, is float64"),
        (np.zeros((3, 2)), np.ones((3, 2)), ""),
        (np.zeros((3, 2)), np.ones((4, 2)), "of type ndarray and shape (4, 2)"),
        (list(range(10_000)), list(range(1, 10_001)), ""),
        (object(), object(), ""),
        (open, max, "a was the function open, is the function max"),
        (Hostile(), Hostile(), ""),
        (lambda: 1, lambda: 1, ""),
        (lambda: 1, lambda: 2, "the code of "),
        (functools.partial(max, 1), functools.partial(max, 2), "was 1, is 2"),
    ],
)
def test_a_change_is_told_and_nothing_else(was: Any, now: Any, told: str) -> None:
    found = change(was, now)
    assert len(found) == bool(told)
    assert all(told in text and len(text) < 500 for text in found)
    assert change(now, was) == [] or told


def test_a_main_that_hides_its_name_is_recorded_all_the_same() -> None:
    class Main:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name) if name == "__qualname__" else AttributeError(name)

        def __call__(self, lr: float) -> None:
            pass

    record = record_call("r", 2, Main(), {"lr": 0.1})
    assert (record.main, record.arguments) == ("", {"lr": "0.1"})


def test_nothing_of_a_value_that_has_a_cycle_or_no_end_takes_long() -> None:
    around: list[Any] = [1]
    around.append(around)
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"d": deep}
    wide = {str(n): {str(m): m for m in range(100)} for n in range(100)}
    record = of(around=around, deep=deep, wide=wide)
    assert 3 < len(record.arguments) <= MAX_ENTRIES
    assert RunRecord.from_fields(json.loads(json.dumps(dataclasses.asdict(record)))) == record


class Zone(datetime.tzinfo):
    def utcoffset(self, _: datetime.datetime | None) -> None: ...
    def tzname(self, _: datetime.datetime | None) -> None: ...
    def dst(self, _: datetime.datetime | None) -> None: ...


class Guarded:
    def __init__(self) -> None:
        self.__dict__["lr"] = 0.1
        self.depth = 3

    @property
    def lr(self) -> float:
        raise RuntimeError("nobody asked for it")


def test_the_record_of_an_object_has_no_address_and_runs_no_property() -> None:
    def main(**_: Any) -> None: ...

    call = {"zone": Zone(), "context": decimal.Context(), "settings": Guarded()}
    assert record_call("run", 1, main, call).arguments == {
        "zone": "of type Zone",
        "context": "of type Context",
        "settings.lr": "0.1",
        "settings.depth": "3",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("password", "hunter2"),
        ("password", 4711),
        ("dbPassword", "hunter2"),
        ("api_key", "hunter2"),
        ("token", "hunter2"),
        ("credentials", {"user": "bob", "code": "hunter2"}),
        ("options", {"auth": {"x": ["hunter2"]}}),
        ("url", "postgres://bob:hunter2@host/db"),
        ("header", "Authorization: Bearer hunter2hunter2"),
        ("where", "Server=x;Password=hunter2;"),
        ("anything", "ghp_hunter2hunter2hunter2"),
        ("anything", "dapi0123456789abcdef0123456789abcdef"),
        ("anything", ["AKIA0123456789ABCDEF"]),
        ("anything", "0a1b2c3d4e5f60718293a4b5c6d7e8f9hunter2"),
        ("anything", b"-----BEGIN PRIVATE KEY-----hunter2"),
    ],
)
def test_what_may_be_a_secret_is_not_written(name: str, value: Any) -> None:
    text = json.dumps(dataclasses.asdict(of(**{name: value})))
    assert "(not shown)" in text
    for part in ("hunter2", "4711", "0123456789"):
        assert part not in text


def test_another_secret_is_told_without_it() -> None:
    (text,) = changes(of(token="one"), of(token="two"))
    assert text == "token has changed (not shown, because it may be a secret)"
    assert changes(of(token="one"), of(token="one")) == []
    assert of(max_tokens=512, tokenizer="bert", author="x").arguments == {
        "max_tokens": "512",
        "tokenizer": "'bert'",
        "author": "'x'",
    }


def test_arguments_that_come_and_go_and_edited_defaults() -> None:
    def first(epochs: int, lr: float = 0.1) -> None:
        pass

    def second(epochs: int, lr: float = 0.2, *, momentum: float = 0.9) -> None:
        pass

    second.__qualname__ = first.__qualname__
    old, new = (record_call("r", 2, main, {"epochs": 3}) for main in (first, second))
    assert changes(old, new)[:2] == ["lr was 0.1, is 0.2", "momentum is new: 0.9"]
    assert "momentum was 0.9, is gone" in changes(new, old)
    given = record_call("r", 2, first, {"epochs": 3, "lr": 0.1})
    assert changes(old, given) == []


def test_a_main_of_another_name_is_told_by_its_name() -> None:
    def train(epochs: int = 3, lr: float = 0.1) -> None:
        pass

    def renamed(epochs: int = 3, lr: float = 0.1) -> None:
        pass

    def evaluate(split: str = "test", lr: float = 0.1) -> str:
        return split

    old, same, new = (record_call("r", 2, main, {}) for main in (train, renamed, evaluate))
    assert changes(old, same) == []
    assert not calls_another_main(old, same)
    assert calls_another_main(old, new)
    names = f"main was {train.__qualname__}, is {evaluate.__qualname__}"
    assert changes(old, new) == [names, "split is new: 'test'"]
    assert not calls_another_main(dataclasses.replace(old, main=""), new)  # of an earlier release


def test_a_helper_that_is_cached_is_compared() -> None:
    records = []
    for width in (1, 1, 2):
        names: dict[str, Any] = {"functools": functools, "__name__": "__main__"}
        code = f"""
class Sizes:
    @functools.cached_property
    def depth(self):
        return {width}
@functools.lru_cache
def build():
    return {width}
def train():
    return build(), Sizes().depth
"""
        exec(code, names)
        records.append(record_call("r", 2, names["train"], {}))
    assert changes(records[0], records[1]) == []
    assert changes(records[0], records[2]) == ["the code of Sizes.depth, build has changed"]


def test_a_method_a_partial_and_an_object_that_is_called() -> None:
    class Trainer:
        def __init__(self, lr: float) -> None:
            self.lr = lr

        def train(self, epochs: int) -> None:
            pass

        def __call__(self, epochs: int) -> None:
            pass

    def plain(scale: float, epochs: int, lr: float) -> None:
        pass

    mains: list[Callable[[float], Callable[..., Any]]] = [
        lambda lr: Trainer(lr).train,
        Trainer,
        lambda lr: functools.partial(plain, lr, lr=1),
        lambda lr: functools.partial(plain, 1, lr=lr),
    ]
    for make in mains:
        old, same, new = (record_call("r", 2, make(lr), {"epochs": 3}) for lr in (0.1, 0.1, 0.2))
        assert changes(old, same) == []
        (text,) = changes(old, new)
        assert "0.1, is 0.2" in text


def test_another_python_has_other_bytecode_and_other_ranks_are_told() -> None:
    old, new = of(a=1), of(a=1)
    other = dataclasses.replace(new, python="3.99", size=4, code={"": "00000000"})
    assert changes(old, other) == ["the number of ranks was 2, is 4"]
    assert changes(old, dataclasses.replace(new, size=0)) == []
    many = of(**{f"a{number}": number for number in range(50)})
    none = of(**{f"a{number}": -1 for number in range(50)})
    told = changes(many, none)
    assert len(told) == 9
    assert told[-1] == "42 more"


@pytest.mark.parametrize(
    "run",
    [
        None,
        [],
        {},
        {"run_id": 1, "size": 2},
        {"run_id": "r", "size": "2"},
        {"run_id": "r", "size": 2, "arguments": []},
        {"run_id": "r", "size": 2, "arguments": {"a": 1}},
        {"run_id": "r", "size": 2, "arguments": {"a": "\x1b[2J"}},
        {"run_id": "r", "size": 2, "arguments": {"a": "x" * 10_000}},
        {"run_id": "r", "size": 2, "arguments": {str(n): "x" for n in range(10_000)}},
        {"run_id": "r", "size": 2, "unheard": "of"},
    ],
)
def test_a_manifest_whose_record_is_missing_or_malformed_is_a_whole_one(run: Any) -> None:
    manifest = Manifest(1, 1, "2026-02-03T04:05:06+00:00", (), (), of(a=1))
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    fields = json.loads(text)
    assert Manifest.from_json(json.dumps({**fields, "run": run})).run is None
    del fields["run"]
    assert Manifest.from_json(json.dumps(fields)).run is None
