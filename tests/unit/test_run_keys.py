"""What is kept of runs under a key, and who may write it."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import math
import os
import re
import resource
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest

from horovodrunner import storage
from horovodrunner.errors import RunSupersededError
from horovodrunner.flows.call.record import RunRecord, changes
from horovodrunner.flows.call.recording import record_call
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.runkeys.place import Epoch, KeyPlace, directory_of_key, has_ended
from horovodrunner.pickling.buffers import BufferedPickle
from tests import processes

RECORD = RunRecord("1f0c", 2)
KEYS = [
    "a",
    "a/b",
    "a-b",
    "../x",
    "..",
    ".",
    "/",
    "ä",
    "日本",
    "A",
    " a b ",
    "x" * 200,
    "a\\b",
    "a:b",
]


@pytest.fixture(scope="module", autouse=True)
def bucket() -> Iterator[str]:
    """A bucket of a local S3, where s3fs and moto are installed: botocore wants dateutil 2."""
    try:
        s3fs, server = (importlib.import_module(name) for name in ("s3fs", "moto.server"))
    except ImportError:
        yield ""
        return
    service = server.ThreadedMotoServer(port=0, verbose=False)
    service.start()
    host, port = service.get_host_and_port()
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
    fsspec.config.conf["s3"] = options
    s3fs.S3FileSystem(**options).mkdir("bucket")
    yield "s3://bucket"
    del fsspec.config.conf["s3"]
    s3fs.S3FileSystem.clear_instance_cache()
    service.stop()


@pytest.fixture(params=["path", "file", "memory", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> Iterator[str]:
    if request.param == "s3":
        if not bucket:
            pytest.skip("needs s3fs and moto[s3]")
        yield f"{bucket}/{uuid.uuid4().hex}"
    elif request.param == "memory":
        url = f"memory://{uuid.uuid4().hex}/runs"
        yield url
        fs, root = fsspec.core.url_to_fs(url)
        fs.rm(root.rpartition("/")[0], recursive=True)
    else:
        yield f"file://{tmp_path}/runs" if request.param == "file" else str(tmp_path / "runs")


def test_every_key_has_a_directory_of_its_own() -> None:
    names = {directory_of_key(key) for key in KEYS}
    assert len({name.lower() for name in names}) == len(KEYS)
    assert all(re.fullmatch("[A-Za-z0-9_-]+", name) for name in names)
    assert all(
        len(name) < 80 and "/" not in name and not name.startswith(("-", ".")) for name in names
    )


def winners(location: str, racers: int = 12) -> list[Epoch]:
    """Let several drivers begin the same epoch at once."""
    barrier, found = threading.Barrier(racers), []
    places = [KeyPlace(location, "k") for _ in range(racers)]

    def race(place: KeyPlace) -> None:
        barrier.wait()
        found.append(place.begin(1, "k", "g", RECORD))

    threads = [threading.Thread(target=race, args=[place]) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == racers
    return [each for each in found if each is not None]


def test_one_driver_begins_an_epoch(location: str) -> None:
    (winner,) = winners(location)
    place = KeyPlace(location, "k")
    assert place.newest() == [winner]
    assert winner.record == RECORD
    assert not has_ended(winner)
    assert KeyPlace(location, "another").newest() == []


def test_one_driver_begins_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert len(winners(str(tmp_path))) == 1


def test_one_driver_begins_where_nothing_is_created_in_one_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "_CREATE_ONCE", frozenset())
    monkeypatch.setattr(storage, "SETTLE_SECONDS", 0.5)
    location = f"memory://{uuid.uuid4().hex}"
    assert len(winners(location, racers=4)) == 1
    assert KeyPlace(location, "k").begin(1, "k", "g", RECORD) is None


def pickled(value: bytes) -> BufferedPickle:
    whole = BufferedPickle((len(value),))

    def fill(view: memoryview) -> None:
        view[:] = value

    whole.fill(fill)
    return whole


def test_a_value_counts_when_all_of_it_is_there(location: str) -> None:
    place = KeyPlace(location, "k")
    place.begin(1, "k", "g", RECORD)

    def look() -> None:
        assert place.value(1) is None

    stored = place.store(1, pickled(b"N."), ranks=2, record="r", check=look)
    assert place.value(1) == stored
    assert place.load(stored).load() is None

    def refuse() -> None:
        raise RunSupersededError("somebody else")

    with pytest.raises(RunSupersededError):
        place.store(2, pickled(b"N."), ranks=2, record="r", check=refuse)
    assert place.value(2) is None


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda file: file.write_bytes(b"I1\n."), "SHA-256"),
        (lambda file: file.write_bytes(b"I"), "1 bytes instead of 4"),
        (Path.unlink, "is missing"),
    ],
)
def test_a_damaged_value_is_noticed(
    damage: Callable[[Path], object], problem: str, tmp_path: Path
) -> None:
    place = KeyPlace(str(tmp_path), "k")
    stored = place.store(1, pickled(b"I2\n."), ranks=1, record="", check=lambda: None)
    damage(Path(place.path_of(stored)))
    with pytest.raises(ValueError, match=problem):
        place.load(stored)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"number": 1}', b"\xff"])
def test_files_that_cannot_be_read_are_not_believed(content: bytes, tmp_path: Path) -> None:
    place = KeyPlace(str(tmp_path), "k")
    first = place.begin(1, "k", "g", RECORD)
    for name in ("epoch-000002.json", "value-000002.json", "ended-000002.json"):
        Path(place.location, name).write_bytes(content)
    newest, older = place.newest()
    assert (newest, older) == (Epoch(2), first)
    assert place.value(2) is None


def test_what_cannot_be_written_whole_is_not_left(tmp_path: Path) -> None:
    place = KeyPlace(str(tmp_path), "k")
    place.begin(1, "k", "g", RECORD)
    before = {*tmp_path.rglob("*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            place.store(1, pickled(bytes(200_000)), ranks=1, record="", check=lambda: None)
        others = [pickled(bytes(200_000))]
        with pytest.raises(OSError, match="too large"):
            place.store(1, pickled(b"N."), others, ranks=2, record="", check=lambda: None)
        with pytest.raises(OSError, match="too large"):
            place.end(1, "x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {*tmp_path.rglob("*")} == before


def test_a_value_outside_is_not_read(tmp_path: Path) -> None:
    place = KeyPlace(str(tmp_path), "k")
    stored = place.store(1, pickled(b"N."), ranks=1, record="", check=lambda: None)
    place.confirm(1, dataclasses.replace(stored, file="../../x"))
    assert place.value(1) is None


def test_a_process_that_is_gone_is_known_at_once(tmp_path: Path) -> None:
    place = KeyPlace(str(tmp_path), "k")
    mine = place.begin(1, "k", "g", RECORD)
    assert mine is not None
    child = processes.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    assert not has_ended(mine)
    assert has_ended(dataclasses.replace(mine, pid=int(child.stdout)))
    # the same number again, by another process
    assert has_ended(dataclasses.replace(mine, process=f"{mine.process}1"))
    # of another machine nothing is known
    assert not has_ended(dataclasses.replace(mine, process="elsewhere 1", pid=int(child.stdout)))


def saved(store: CheckpointStore, step: int, tmp_path: Path, text: str = "") -> None:
    files = tmp_path / f"files-{uuid.uuid4().hex}"
    files.mkdir()
    (files / "a.txt").write_text(text or f"step {step}")
    store.put(step, files)


def steps(store: CheckpointStore) -> list[int]:
    return [each.step for each in store.manifests()]


def test_a_driver_goes_on_from_an_older_ones_checkpoints(location: str, tmp_path: Path) -> None:
    root = CheckpointStore(location, 2)
    first = root.begin_epoch(1, resume=True)
    for step in (1, 2, 3):
        saved(first, step, tmp_path)
    second = root.begin_epoch(2, resume=True)
    found, damaged = second.find_latest()
    assert found is not None
    assert (found.step, damaged, steps(second)) == (3, [], [3, 2])
    saved(second, 4, tmp_path)
    assert steps(second) == [4, 3]
    assert [each.step for each in root.newest_epoch().manifests()] == [4, 3]
    assert root.directories() == ["epoch-000002"]


def test_what_an_older_driver_stores_later_is_refused(location: str, tmp_path: Path) -> None:
    root = CheckpointStore(location, 3)
    first = root.begin_epoch(1, resume=True)
    saved(first, 1, tmp_path)
    second = root.begin_epoch(2, resume=True)
    with pytest.raises(RunSupersededError, match=r"another driver .*epoch-000002"):
        saved(first, 2, tmp_path)
    assert steps(first) in ([], [1])
    # it looked just before the other one began
    late = CheckpointStore(first.location, 3)
    saved(late, 9, tmp_path)
    assert steps(second) == [1]
    third = root.begin_epoch(3, resume=True)
    assert steps(third) == [1]
    with pytest.raises(RunSupersededError):
        saved(second, 3, tmp_path)


def test_the_one_who_is_superseded_while_it_writes_is_refused(
    location: str, tmp_path: Path
) -> None:
    root = CheckpointStore(location, 3)
    first = root.begin_epoch(1, resume=True)
    write_part = first._write_part

    def write(*args: Any) -> Any:
        root.begin_epoch(2, resume=True)
        return write_part(*args)

    first._write_part = write  # type: ignore[method-assign, assignment]
    with pytest.raises(RunSupersededError):
        saved(first, 1, tmp_path)
    assert steps(first) == []


def test_a_driver_that_died_while_it_took_over_loses_nothing(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = CheckpointStore(location, 3)
    first = root.begin_epoch(1, resume=True)
    for step in (1, 2, 3):
        saved(first, step, tmp_path)
    kind = type(first._storage)
    take = kind.take
    taken: list[str] = []

    def die(self: Any, other: Any, name: str) -> None:
        if taken:
            raise KeyboardInterrupt
        taken.append(name)
        take(self, other, name)

    monkeypatch.setattr(kind, "take", die)
    with pytest.raises(KeyboardInterrupt):
        root.begin_epoch(2, resume=True)
    monkeypatch.undo()
    assert steps(root.begin_epoch(3, resume=True)) == [3, 2, 1]


def test_starting_anew_keeps_what_there_is(location: str, tmp_path: Path) -> None:
    root = CheckpointStore(location, 3)
    saved(root.begin_epoch(1, resume=True), 7, tmp_path)
    anew = root.begin_epoch(2, resume=False)
    assert steps(anew) == []
    assert steps(root.newest_epoch()) == [7]
    # it saved nothing: there is only the older one to go on from
    assert steps(root.begin_epoch(3, resume=True)) == [7]
    anew = root.begin_epoch(4, resume=False)
    saved(anew, 1, tmp_path)
    assert steps(root.begin_epoch(5, resume=True)) == [1]


def describe(value: Any) -> RunRecord:
    def main(value: Any) -> None: ...

    return record_call("", 1, main, {"value": value}, exactly=True)


class Opaque:
    __slots__ = ()


class Holder:
    def __init__(self, value: Any) -> None:
        self._value = value
        self.itself = self

    def one(self) -> None: ...
    def other(self) -> None: ...


def nested(value: Any) -> Any:
    for _ in range(8):
        value = [{"a": value}]
    return value


def one() -> int:
    return 1


def other() -> int:
    return 2


frame = pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.arange(1000), np.arange(1000)[::-1]),
        (np.zeros(3, "f4"), np.zeros(3, "f8")),
        (np.array(["a", None], object), np.array(["b", None], object)),
        (list(range(500)), [*range(499), 0]),
        ({i: i for i in range(500)}, {i: i + 1 for i in range(500)}),
        ({str(i) for i in range(500)}, {str(i + 1) for i in range(500)}),
        ([{"a": [1] * 200}], [{"a": [1] * 199 + [2]}]),
        ("x" * 3_000_000, "x" * 1_500_000 + "y" + "x" * 1_499_999),
        (frame, frame.assign(a=[1.0, 3.0])),
        (frame["b"], frame["b"].str.upper()),
        ([frame], [frame[::-1]]),
        ({f"a{i}": {j: j for j in range(90)} for i in range(4)},) * 2,
        (Holder(Holder(1)), Holder(Holder(2))),
        (Holder({"a": [np.arange(3)]}), Holder({"a": [np.arange(3) + 1]})),
        (Holder(one), Holder(other)),
        (nested(Holder(1)), nested(Holder(2))),
        ([("a", 10**5000)] * 200, [("a", 10**5000 + 1)] * 200),
        ([("a", "\udcff")] * 200, [("a", "\udcfe")] * 200),
        (Holder(1).one, Holder(1).other),
        (re.compile("a"), re.compile("a", re.I)),
        (deque([1]), deque([2])),
        (slice(1), slice(2)),
        (frame["b"].astype("category").array, frame["b"].iloc[::-1].astype("category").array),
        (json, math),
    ],
)
def test_values_are_compared_by_what_they_hold(one: Any, other: Any) -> None:
    if one is other:
        other = {**one, "a3": {**one["a3"], 89: 0}}
    assert changes(describe(one), describe(one)) == []
    assert changes(describe(one), describe(other)) != []


DEFINED = """
import collections, enum, functools, math, textwrap, typing
def one(): return 1
def other(): return 2
class Kind(enum.Enum):
    A = {value}
class Point(typing.NamedTuple):
    x: int = {value}
class Meta(type):
    def made(cls): return {value}
class One(metaclass=Meta):
    settings = {{"a": [{value}]}}
    _hidden = {value}
    @property
    def held(self): return 1
    @held.setter
    def held(self, value): self.value = {value}
class Other(One): pass
def main(): return used
def helpers(): return [{helpers}]
{many}
"""


def defined(used: str, value: int = 1, called: str = "main") -> RunRecord:
    """Record a call of what a cell defines."""
    names: dict[str, Any] = {"__name__": "__main__"}
    many = "\n".join(f"def h{i}(): return {value if i == 99 else i}" for i in range(300))
    helpers = ", ".join(f"h{i}()" for i in range(300))
    exec(DEFINED.format(value=value, many=many, helpers=helpers), names)
    exec(f"used = {used}", names)
    return record_call("", 1, names[called], {}, exactly=True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("one", "other"),
        ("One", "Other"),
        ("textwrap.dedent", "textwrap.indent"),
        ("collections.OrderedDict", "collections.Counter"),
        ("functools.partial(one)", "functools.partial(other)"),
        ("functools.partial(textwrap.dedent)", "functools.partial(textwrap.fill)"),
        ("math", "textwrap"),
        ("'a'.upper", "'a'.lower"),
    ],
)
def test_another_thing_of_the_same_name_is_a_change(one: str, other: str) -> None:
    assert changes(defined(one), defined(one)) == []
    assert changes(defined(one), defined(other)) != []


@pytest.mark.parametrize("used", ["Kind.A", "Kind", "Point", "Meta('M', (), {}).made", "One"])
def test_what_a_class_holds_is_compared(used: str) -> None:
    assert changes(defined(used, 1), defined(used, 2)) != []


@pytest.mark.parametrize("member", ["_hidden", "settings", "held"])
def test_each_member_of_a_class_is_compared(member: str) -> None:
    found = "; ".join(changes(defined("One", 1), defined("One", 2)))
    assert f"One.{member}" in found


def test_the_code_of_many_helpers_is_compared() -> None:
    record = defined("1", 1, "helpers")
    assert RunRecord.from_fields(dataclasses.asdict(record)) == record
    assert changes(record, defined("1", 1, "helpers")) == []
    assert changes(record, defined("1", 2, "helpers")) == ["the code of others has changed"]


VALUES = """
import abc, collections, enum, json, logging, re, sys, threading, numpy as np
from dataclasses import asdict
from horovodrunner.flows.call.recording import record_call
class Model:
    def __init__(self):
        self.weights, self._name, self._lock, self.me = object(), "m", threading.Lock(), self
        self.parts = [re.compile("a"), collections.deque({"x"}), self.helper, logging.getLogger()]
    def helper(self): ...
class Kind(enum.Enum):
    A = 1
class Bare(abc.ABC): kind = Kind.A
def helper(): return {"b", "a", "c"}
data = np.arange(10)
def main(a, b, c=helper, d={"x", "y", "z"}):
    return helper(), data, [v for v in {"q", "r"}]
many = {str(i) for i in range(300)}
values = {"a": [Model(), Bare(), lambda: 0, open("/dev/null")], "b": {Bare: many}}
record = asdict(record_call("", 1, main, values, exactly=True))
json.dump(record, sys.stdout, sort_keys=True)
"""


def test_the_same_call_in_another_process_is_the_same(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(VALUES)
    found = [
        processes.run(
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
    record = RunRecord.from_fields(json.loads(found[0]))
    assert record is not None
    assert record.variables["data"].startswith("of type ndarray and shape (10,) (")
