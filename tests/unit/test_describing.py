"""Exceptions whose classes and values are broken, in plain and bounded text."""

from __future__ import annotations

import builtins
import json
import pickle
import re
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from horovodrunner.flows.outcome import worker as describing
from horovodrunner.flows.outcome.worker import Description, describe, exit_code_of


def described(error: BaseException) -> Description:
    """Raise it, two frames deep as in a worker, and describe it."""

    def main() -> NoReturn:
        raise error

    limit = sys.getrecursionlimit()
    try:
        main()
    except BaseException as caught:
        told = describe(caught)
    assert sys.getrecursionlimit() == limit
    assert re.search(r"in main\n\W+raise error", told.traceback)
    assert [frame.f_code.co_name for frame in told.frames] == ["main"]
    return told


def raising(problem: type[BaseException]) -> Callable[..., NoReturn]:
    def method(*_: Any) -> NoReturn:
        raise problem("of the user's own")

    return method


def error_with(**members: Any) -> BaseException:
    """Make an exception ``Told`` whose class has such members, and whose argument is "told"."""
    cls = type("Told", (ValueError,), {"__module__": "models", "__qualname__": "Told", **members})
    error = cls("told")
    assert isinstance(error, BaseException)
    return error


@pytest.mark.parametrize("problem", [RuntimeError, SystemExit, KeyboardInterrupt, MemoryError])
def test_a_text_that_cannot_be_had_is_made_of_the_arguments(problem: type[BaseException]) -> None:
    told = described(error_with(__str__=raising(problem), __repr__=raising(problem)))
    assert (told.name, told.text) == ("Told", f"told (its __str__ raised {problem.__name__})")
    assert told.types[:2] == ("models.Told", "builtins.ValueError")


class _Text(str):
    """One whose every method may raise."""

    __len__ = __getitem__ = __format__ = __str__ = __iter__ = encode = raising(RuntimeError)


class _Unspeakable:
    __str__ = __repr__ = raising(RuntimeError)


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"__str__": lambda self: 5}, "told (its __str__ raised TypeError)"),
        ({"__str__": lambda self: f"{self}"}, "told (its __str__ raised RecursionError)"),
        ({"__str__": lambda self: _Text("told")}, "told"),
        ({"__str__": lambda self: ""}, "(no message)"),
        ({"__str__": lambda self: "\n\n  told"}, "told"),  # its first line is the summary's
        ({"__getattribute__": raising(RuntimeError)}, "told"),
        ({"__traceback__": property(raising(RuntimeError))}, "told"),
        ({"__cause__": property(raising(RuntimeError))}, "told"),
        ({"__context__": property(raising(SystemExit))}, "told"),
        ({"__notes__": property(raising(RuntimeError))}, "told"),
        ({"__class__": property(raising(RuntimeError))}, "told"),
        ({"__reduce__": raising(SystemExit)}, "told"),
        ({"__module__": 5}, "told"),
    ],
)
def test_whatever_its_class_does_it_is_told(members: dict[str, Any], text: str) -> None:
    told = described(error_with(**members))
    assert (told.name, told.text) == ("Told", text)
    assert "builtins.ValueError" in told.types


def test_whatever_its_metaclass_does_it_is_told() -> None:
    class Meta(type):
        __getattribute__ = raising(RuntimeError)

    told = described(Meta("Told", (ValueError,), {})("told"))
    assert (told.name, told.text) == ("Told", "told")
    assert told.types[0].endswith(".Told")
    assert told.types[1] == "builtins.ValueError"


@pytest.mark.parametrize("error", [ValueError(_Unspeakable()), KeyError(_Unspeakable())])
def test_without_a_text_the_class_and_the_place_are_told(error: BaseException) -> None:
    told = described(error)
    assert told.text == "(its text cannot be shown: its __str__ raised RuntimeError)"
    assert told.name == type(error).__name__


def of_itself(how: str) -> BaseException:
    error, other = ValueError("told"), KeyError("other")
    if how == "cause":
        error.__cause__ = error
    elif how == "context":
        error.__context__, other.__context__ = other, error
    elif how == "arguments":
        error.args = (error,)
    else:
        error.itself = error  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("limit", [1000, 10_000_000])
@pytest.mark.parametrize("how", ["cause", "context", "arguments", "attribute"])
def test_one_that_refers_to_itself_is_told(
    how: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where main has raised the limit so far that the C stack would be exhausted first."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        told = described(of_itself(how))
    finally:
        sys.setrecursionlimit(before)
    assert told.name == "ValueError"
    assert ("told" in told.text) == (how != "arguments")


def odd_syntax_error() -> SyntaxError:
    error = SyntaxError("told")
    error.lineno, error.text, error.offset = "x", 5, object()  # type: ignore[assignment]
    return error


def with_notes(notes: Any) -> ValueError:
    error = ValueError("told")
    error.__notes__ = notes  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    "error", [odd_syntax_error(), with_notes(5), with_notes([_Unspeakable()]), with_notes([5])]
)
def test_odd_attributes_do_no_harm(error: BaseException) -> None:
    assert described(error).text.startswith("told")


@pytest.mark.parametrize("character", ["x", "é", "\U0001f600", "\udc80", "\n", "\0"])
def test_a_text_of_megabytes_is_cut_with_a_mark_and_the_frames_stay(character: str) -> None:
    error = ValueError("first " + character * 2_000_000)
    error.__cause__ = OSError(character * 2_000_000)
    told = described(error)
    assert told.text.startswith("first ")
    assert re.search(r"\.\.\.\(truncated: [\d,]+ characters\)$", told.text)
    assert "OSError: " in told.traceback
    assert len(json.dumps([told.text, told.traceback])) < 2_000_000
    assert len(told.pickled) < describing.MAX_PICKLE_BYTES


def test_a_note_of_megabytes_is_cut() -> None:
    assert len(described(with_notes(["n" * 5_000_000])).traceback) < describing.MAX_TRACEBACK


def test_a_deep_stack_is_cut_in_the_middle() -> None:
    def one(depth: int) -> None:
        another(depth - 1) if depth else int("no number")

    def another(depth: int) -> None:
        one(depth)

    try:
        one(450)
    except ValueError as error:
        text = describing._formatted_by_hand(error.__traceback__)
    assert text.count("\n") < 2 * describing.MAX_FRAMES + 5
    assert "frames are left out here" in text
    assert text.splitlines()[-1].strip() == 'another(depth - 1) if depth else int("no number")'


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_a_group_is_told_with_what_is_in_it() -> None:
    kind: Any = vars(builtins)["ExceptionGroup"]
    group = kind("several", [ValueError("told"), ValueError("z" * 100_000)])
    told = described(group)
    assert told.text == "several (2 sub-exceptions)"
    assert "ValueError: told" in told.traceback
    assert len(told.traceback) < describing.MAX_TRACEBACK


def test_lone_surrogates_become_escapes() -> None:
    told = described(ValueError("a\udc80b"))
    assert told.text == "a\\udc80b"
    assert told.traceback.endswith("ValueError: a\\udc80b\n")


def test_an_exception_that_pickles_comes_along_and_no_other() -> None:
    assert str(pickle.loads(described(ValueError("told")).pickled)) == "told"
    with_lock = ValueError("told")
    with_lock.lock = threading.Lock()  # type: ignore[attr-defined]
    assert described(with_lock).pickled == b""
    assert described(ValueError(bytes(describing.MAX_PICKLE_BYTES))).pickled == b""


def test_without_the_traceback_module_the_frames_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import linecache
    import traceback

    monkeypatch.setattr(traceback, "TracebackException", raising(RuntimeError))
    assert described(ValueError("told")).traceback.endswith("ValueError: told\n")
    monkeypatch.setattr(linecache, "getline", raising(RuntimeError))
    with pytest.raises(AssertionError):  # the source lines are missing, all else is there
        described(ValueError("told"))


class _Index:
    def __init__(self, problem: type[BaseException]) -> None:
        self._raise = raising(problem)

    def __index__(self) -> int:
        return int(self._raise())

    __eq__ = raising(RuntimeError)
    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (None, 0),
        (0, 0),
        (False, 0),
        (True, 1),
        (3, 3),
        (-1, 255),
        (256, 1),
        (2**70, 1),
        ("no data", 1),
        ("", 1),
        ((0, 1), 1),
        (_Index(RuntimeError), 1),
        (_Index(SystemExit), 1),
    ],
)
def test_exit_codes_are_what_a_process_can_have(code: Any, expected: int) -> None:
    assert exit_code_of(SystemExit(code)) == expected


def test_an_exit_whose_code_cannot_be_read_is_a_failure() -> None:
    class Exit(SystemExit):
        code = property(raising(RuntimeError))

    assert exit_code_of(Exit()) == 1
