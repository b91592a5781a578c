"""Pickling, with the culprit named."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from horovodrunner.core import payload
from horovodrunner.errors import PayloadError


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
    function, kwargs = payload.load(payload.dump_call(main, {"x": 14}))
    assert function(**kwargs) == 42


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


def test_an_unpicklable_result_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(PayloadError, match=r"that main returned\['model'\] \(_thread.lock\)"),
        (tmp_path / "result").open("wb") as file,
    ):
        payload.write_result({"loss": 1.0, "model": threading.Lock()}, file.fileno())


def test_what_makes_a_call_large_is_named_largest_first() -> None:
    main = in_a_notebook("table = bytes(3_000_000)\ndef main(small, large): return len(table)")
    parts = payload.largest_parts(main, {"small": b"x", "large": bytes(5_000_000)}, 1_000_000)
    assert [where for where, _ in parts] == [
        "the argument 'large'",
        "the global 'table' used by main",
    ]
    assert [round(size, -6) for _, size in parts] == [5_000_000, 3_000_000]
