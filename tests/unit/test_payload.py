"""Pickling, with the culprit named."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import io
import os
import re
import socket
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest

from horovodrunner.errors import PayloadError
from horovodrunner.pickling import culprit, payload
from horovodrunner.pickling.buffers import BufferedPickle, loads
from tests import processes


def in_a_notebook(source: str, name: str = "main") -> Callable[..., Any]:
    """Define functions the way notebook cells do: in __main__, with shared globals."""
    scope: dict[str, Any] = {"__name__": "__main__", "threading": threading}
    exec(source, scope)
    function = scope[name]
    assert isinstance(function, FunctionType)
    return function


def refusal(main: Callable[..., Any], **kwargs: Any) -> str:
    with pytest.raises(PayloadError) as caught:
        payload.dump_call(main, kwargs)
    return str(caught.value)


def test_functions_of_other_cells_and_their_globals_travel() -> None:
    main = in_a_notebook(
        "scale = 3\ndef helper(x): return x * scale\ndef main(x): return helper(x)"
    )
    function, kwargs = loads(payload.dump_call(main, {"x": 14}))
    assert function(**kwargs) == 42


def test_code_keeps_the_name_of_its_file() -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    source = "def main():\n    class Net:\n        def f(self): pass\n    return Net.f"
    exec(compile(source, "/tmp/ipykernel_1/2.py", "exec"), scope)
    function, _ = loads(payload.dump_call(scope["main"], {}))
    assert function.__code__.co_filename == "/tmp/ipykernel_1/2.py"
    assert function().__code__.co_filename == "/tmp/ipykernel_1/2.py"


def test_an_unpicklable_argument_is_named() -> None:
    text = refusal(in_a_notebook("def main(lock): pass"), lock=threading.Lock())
    assert "the argument 'lock' (_thread.lock)" in text
    assert "inside main" in text


def test_an_unpicklable_global_of_a_helper_is_named_with_the_helper() -> None:
    main = in_a_notebook(
        "guard = threading.Lock()\n"
        "def helper():\n    with guard: return 1\n"
        "def main(): return helper()"
    )
    assert "the global 'guard' used by helper" in refusal(main)


async def later() -> None:
    """Do nothing."""


def in_steps() -> Iterator[int]:
    """Do nothing."""
    yield 1


@contextlib.contextmanager
def around() -> Iterator[None]:
    """Do nothing."""
    yield


STAYING: dict[str, tuple[Callable[[], Any], str]] = {
    "coroutine": (later, "coroutine.*a coroutine runs only where it is awaited. Let main make it"),
    "generator": (in_steps, "generator.*runs only where it was made.*use list"),
    "context": (around, r"\(contextlib._GeneratorContextManager\) .*a context manager stays"),
    "loop": (asyncio.new_event_loop, r"\(asyncio\..*belongs to the event loop.*inside main"),
    "pool": (ThreadPoolExecutor, r"\(concurrent.*threads and processes stay .*inside main"),
    "file": (functools.partial(open, os.devnull, "wb"), "_io.Buffered.*open file .*have the path"),
    "file that vanishes": (tempfile.TemporaryFile, "an open file stays in its process"),
    "database": (lambda: sqlite3.connect(":memory:"), "sqlite3.Connection.*Create it inside main"),
    "socket": (socket.socket, "socket.socket.*Create it inside main"),
}


@pytest.mark.parametrize("kind", STAYING)
def test_what_stays_in_its_process_is_told_with_what_to_send_instead(kind: str) -> None:
    make, text = STAYING[kind]
    thing: Any = make()
    main = in_a_notebook("def helper(): return x\ndef main(): return helper()")
    main.__globals__["x"] = [thing]
    try:
        assert re.match(rf"the global 'x' used by helper\[0\] .*{text}", refusal(main))
    finally:
        getattr(thing, "close", getattr(thing, "shutdown", lambda: None))()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
def test_what_torch_compile_made_is_told_with_what_to_send_instead() -> None:
    torch = pytest.importorskip("torch")
    compiled = torch.compile(in_a_notebook("def main(x): return x"))
    assert refusal(in_a_notebook("def main(model): pass"), model=compiled) == (
        "the argument 'model' (builtins.function) cannot be sent to the workers: what "
        "torch.compile or torch.export has made stays in its process. Send the plain function or "
        "module, and call torch.compile(...) inside main."
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_told_with_what_to_send_instead() -> None:
    torch = pytest.importorskip("torch")
    scripted = torch.jit.script(torch.nn.Linear(1, 1))
    assert re.match(
        r"the argument 'model' \(torch\.jit.*\) cannot .*Send the module that it was made of",
        refusal(in_a_notebook("def main(model): pass"), model=scripted),
    )


def test_a_variable_of_a_module_that_the_notebook_made_is_named() -> None:
    main = in_a_notebook("def main(): return settings.lock")
    main.__globals__["settings"] = ModuleType("settings")
    main.__globals__["settings"].lock = threading.Lock()
    assert refusal(main).startswith("the global 'settings' used by main.lock (_thread.lock) cannot")


def test_a_known_class_around_plain_things_does_not_hide_what_fails() -> None:
    row = pytest.importorskip("pyspark.sql").Row(lock=threading.Lock())
    text = refusal(in_a_notebook("def main(row): pass"), row=row)
    assert text.startswith("the argument 'row'[1][0] (_thread.lock) cannot be sent")


def test_an_unpicklable_attribute_is_named_by_its_path() -> None:
    class Config:
        def __init__(self) -> None:
            self.inner = {"locks": [threading.Lock()]}

    text = refusal(in_a_notebook("def main(config): pass"), config=Config())
    assert "the argument 'config'.inner['locks'][0] (_thread.lock)" in text


def test_an_unpicklable_closure_variable_is_named() -> None:
    lock = threading.Lock()

    def main() -> None:
        lock.acquire()

    assert "the variable 'lock' in the closure of" in refusal(main)


def test_an_unpicklable_bound_argument_is_named() -> None:
    main = functools.partial(in_a_notebook("def main(lock): pass"), lock=threading.Lock())
    assert "'lock' bound by functools.partial" in refusal(main)


class Node:
    """Knows its neighbours."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


@dataclasses.dataclass
class Link:
    """One of a chain."""

    next: Any = None


def raises(error: type[BaseException]) -> Any:
    class Refuses:
        def __reduce__(self) -> Any:
            raise error("refused")

    return Refuses()


class NeverEnds:
    def __reduce__(self) -> Any:
        return NeverEnds, (NeverEnds(),)


class Recurses:
    def __reduce__(self) -> Any:
        return self.__reduce__()


class HasNoName:
    """Neither its text nor its class can be asked anything."""

    def __repr__(self) -> str:
        raise ValueError("no text")


class Slots:
    __slots__ = ("locks",)


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    first: int
    lock: Any


def cyclic() -> Any:
    parent: Any = Node()
    child = Node(parent=parent)
    parent.child = child
    parent.lock = threading.Lock()
    return child


def with_slots() -> Any:
    slots: Any = Slots()
    slots.locks = [threading.Lock()]
    return slots


def within_itself() -> Any:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    loop["late"] = threading.Lock()
    return loop


CULPRITS: dict[str, tuple[Callable[[], Any], str]] = {
    "cycle": (cyclic, "the argument 'x'.parent.lock (_thread.lock)"),
    "in itself": (within_itself, "the argument 'x'['late'] (_thread.lock)"),
    "slots": (with_slots, "the argument 'x'.locks[0] (_thread.lock)"),
    "frozen slots": (
        lambda: FrozenSlots(1, threading.Lock()),
        "the argument 'x'.lock (_thread.lock)",
    ),
    "hook": (
        lambda: Node(hooks=[in_a_notebook("def main(lock=threading.Lock()): pass")]),
        "default value 0 of main (_thread.lock), in the argument 'x'.hooks[0], cannot",
    ),
    "set": (lambda: {threading.Lock()}, "the argument 'x'{…} (_thread.lock)"),
    "key": (lambda: {threading.Lock(): 1}, "the argument 'x'.keys() (_thread.lock)"),
    "queue": (
        lambda: collections.deque([1, threading.Lock()]),
        "the argument 'x'[1] (_thread.lock)",
    ),
    "huge key": (lambda: {"k" * 10**6: threading.Lock()}, "kkk…'] (_thread.lock)"),
    "broken key": (
        lambda: {HasNoName(): threading.Lock()},
        "the argument 'x'[a tests.unit.test_payload.HasNoName] (_thread.lock)",
    ),
    "array": (
        lambda: np.array([1, threading.Lock()], object),
        "the argument 'x'[1] (_thread.lock)",
    ),
    "generator": (
        lambda: [(each for each in "x")],
        "'x'[0] (builtins.generator)",
    ),
    "exit": (lambda: [raises(SystemExit)], "the argument 'x'[0] (tests.unit"),
    "no exception": (lambda: [raises(GeneratorExit)], "the argument 'x'[0] (tests.unit"),
    "memory": (lambda: [raises(MemoryError)], "the argument 'x'[0] (tests.unit"),
    "recursion": (lambda: [Recurses()], "the argument 'x'[0] (tests.unit.test_payload.Recurses)"),
    "deep": (lambda: chain(5000, threading.Lock()), "… (4,988 more) … .next"),
}


def chain(length: int, end: Any = None) -> Any:
    for _ in range(length):
        end = Link(end)
    return end


@pytest.mark.parametrize(("make", "expected"), CULPRITS.values(), ids=CULPRITS.keys())
def test_what_does_not_pickle_is_named_wherever_it_is(
    make: Callable[[], Any], expected: str, tmp_path: Path
) -> None:
    value = make()
    text = refusal(in_a_notebook("def main(x): pass"), x=value)
    assert expected in text
    assert len(text) < 1000
    with pytest.raises(PayloadError) as caught, (tmp_path / "result").open("wb") as file:
        payload.write_result(value, file.fileno())
    assert expected.replace("the argument 'x'", "the value that main returned").split("'x'")[
        -1
    ] in (str(caught.value))


def test_a_reducer_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(culprit, "MAX_DEPTH", 5000)
    text = refusal(in_a_notebook("def main(x): pass"), x=NeverEnds())
    assert "nested more than 5,000 levels deep" in text
    assert "NeverEnds" in text


def test_an_interrupt_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt):
        payload.dump_call(print, {"x": raises(KeyboardInterrupt)})


def test_a_search_that_takes_too_long_ends() -> None:
    many = [[number] for number in range(5000)]
    assert culprit.find_culprit([("it", [many, threading.Lock()])], seconds=-1) is None


def test_each_object_is_looked_at_once() -> None:
    seen: list[int] = []

    class Counted:
        def __reduce__(self) -> Any:
            seen.append(1)
            return Counted, ()

    counted = [Counted() for _ in range(100)]
    found = culprit.find_culprit([("it", [[[counted]], {"a": {"b": threading.Lock()}}])])
    assert found is not None
    assert found[0] == "it[1]['a']['b'] (_thread.lock)"
    assert len(seen) == 100


@pytest.mark.heavy
@pytest.mark.parametrize("length", [5_000, 20_000])
def test_what_is_nested_deeply_travels_both_ways(length: int, tmp_path: Path) -> None:
    nested: Any = []
    for _ in range(length):
        nested = [nested]
    for value in (nested, chain(length)):
        call = payload.dump_call(in_a_notebook("def main(x): pass"), {"x": value})
        arrived = loads(call)[1]["x"]
        with (tmp_path / "result").open("w+b") as file:
            layout = payload.write_result([arrived, np.zeros(100_000)], file.fileno())
            result = BufferedPickle(layout)
            file.seek(0)
            result.fill(file.readinto)
        arrived, array = result.load()
        assert array.nbytes == 800_000
        depth = 0
        while arrived:
            arrived = arrived.next if isinstance(arrived, Link) else arrived[0]
            depth += 1
        assert depth == length


def test_a_high_recursion_limit_of_the_notebook_overflows_no_stack() -> None:
    script = """if True:
        import sys
        from horovodrunner.pickling import payload
        from tests.unit.test_payload import chain
        sys.setrecursionlimit(10**6)
        payload.dump_call(print, {"x": chain(40_000)})
        print("limit", sys.getrecursionlimit())
    """
    done = processes.run([sys.executable, "-c", script], capture_output=True)
    assert done.stdout == "limit 1000000\n", (done.returncode, done.stderr)


def test_the_pickler_without_recursion_pickles_the_same(tmp_path: Path) -> None:
    loop: list[Any] = [1]
    loop.append((loop,))
    main = in_a_notebook(
        "class Net:\n    scale = 2\n    def run(self, x): return x * self.scale\n"
        "def helper(x): return helper if x is None else Net().run(x)\n"
        "def main(x): return helper(x)"
    )
    value = [
        main,
        loop,
        {"a": None, 2: (1, 2, 3, 4), (): 1.5, True: -(2**70)},
        {1, "x"},
        frozenset([b"y" * 70_000]),
        "é" * 70_000,
        bytearray(3),
        collections.OrderedDict(a=collections.Counter("aab")),
        collections.deque([1, 2], 5),
        np.arange(100_000),
        np.array([1, "x"], object),
        functools.partial(int, base=2),
        ValueError("x"),
        Path("x"),
        type(None),
        Link(Link()),
    ]
    with io.BytesIO() as file:
        culprit.DeepPickler(file).dump([*value, value[3]])
        arrived = loads(file.getvalue())
    assert arrived[0](21) == 42
    assert arrived[1][1][0] is arrived[1]
    assert arrived[3] is arrived[-1]
    assert repr(arrived[2:]) == repr([*value, value[3]][2:])


def test_an_unpicklable_result_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(PayloadError, match=r"that main returned\['model'\] \(_thread.lock\)"),
        (tmp_path / "result").open("wb") as file,
    ):
        payload.write_result({"loss": 1.0, "model": threading.Lock()}, file.fileno())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            later,
            r"main returned \(builtins.coroutine\) .*awaited. Return what it gives, asyncio.run",
        ),
        (in_steps, r"main returned \(builtins.generator\) .*it was made. Return list\(...\) of it"),
        (threading.Lock, r"main returned \(_thread.lock\) .*pickle.*Return plain data"),
    ],
    ids=["coroutine", "generator", "lock"],
)
def test_a_result_that_runs_later_is_told_with_what_to_return(
    make: Any, text: str, tmp_path: Path
) -> None:
    value = make()
    with (tmp_path / "result").open("wb") as file, pytest.raises(PayloadError, match=text):
        payload.write_result(value, file.fileno())
    getattr(value, "close", int)()  # a coroutine would be missed


def test_functions_that_dispatch_on_a_type_travel() -> None:
    source = """
import functools

@functools.singledispatch
def size(x):
    "Say how large it is."
    return 1

@size.register
def _(x: list):
    return sum(map(size, x))

@size.register(str)
@size.register(bytes)
def letters(x):
    return len(x)

size.note = "mine"

class Shape:
    @functools.singledispatchmethod
    def of(self, x):
        return "anything"

    @of.register
    def _(self, x: int):
        return "int"

def main(x):
    return size(x), Shape().of(1), Shape().of("")
"""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(source, scope)
    assert scope["size"](["a", [b"bc", 3]]) == 4  # what it remembers of classes is left behind
    function, kwargs = loads(payload.dump_call(scope["main"], {"x": ["a", [b"bc", 3]]}))
    assert function(**kwargs) == (4, "int", "anything")
    size = function.__globals__["size"]
    assert size is not scope["size"]
    assert (size.__name__, size.__doc__, size.note) == ("size", "Say how large it is.", "mine")
    assert size.dispatch(bytes).__name__ == "letters"
    assert size.registry.keys() == {object, list, str, bytes}


def test_what_makes_a_call_large_is_named_largest_first() -> None:
    main = in_a_notebook("table = bytes(3_000_000)\ndef main(small, large): return len(table)")
    parts = payload.largest_parts(main, {"small": b"x", "large": bytes(5_000_000)}, 1_000_000)
    assert [where for where, _ in parts] == [
        "the argument 'large'",
        "the global 'table' used by main",
    ]
    assert [round(size, -6) for _, size in parts] == [5_000_000, 3_000_000]
