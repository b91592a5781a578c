"""An exception in plain, bounded data, whatever its class and its values do. Runs in: the worker.

What main raises belongs to the user: its ``__str__`` may raise, leave or return megabytes, it may
refer to itself, its class may lie, and memory may have run out. Each part is tried by itself.
"""

from __future__ import annotations

import contextlib
import linecache
import operator
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NamedTuple, TypeVar

from horovodrunner.formatting import class_names, cut, short_name
from horovodrunner.pickling.pickler import Pickler

__all__ = ["Description", "describe", "exit_code_of", "show_paths_as", "show_source_of_threads"]

MAX_TEXT = 20_000
MAX_TRACEBACK = 200_000
MAX_FRAMES = 100
"""Characters and frames that are kept; in JSON a character may take twelve bytes."""

MAX_PICKLE_BYTES = 4 * 1024 * 1024
"""A pickled exception larger than this is left out; its text is enough."""

RECURSION_LIMIT = 1000
"""Python's own: with a higher one, an exception that refers to itself could exhaust the C stack."""

_STARTS_SCRIPTS = "horovodrunner/flows/script/worker.py"
"""Its frames are between ours and those of a script."""

_shown_as: dict[str, str] = {}
"""Directories whose files are copies, and what they are copies of."""

_Part = TypeVar("_Part")
_OF_ITSELF: Callable[[BaseException], TracebackType | None] = vars(BaseException)[
    "__traceback__"
].__get__


class Description(NamedTuple):
    """What can be told of an exception."""

    name: str
    """Its class's name without the module."""
    types: tuple[str, ...]
    """Qualified names of its class and that one's bases."""
    text: str
    traceback: str
    frames: list[FrameType]
    """Where it was raised, innermost first."""
    pickled: bytes
    """b"" where it does not pickle or is too large."""


def describe(error: BaseException) -> Description:
    """Describe an exception; raises nothing itself."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(RECURSION_LIMIT)
    try:
        outermost = _OF_ITSELF(error)
        if issubclass(type(error), MemoryError):
            traceback.clear_frames(outermost)  # what main held is needed to tell of it
        own = _of_main(outermost)
        types = class_names(type(error))
        text = _text(error)
        last_line = f"{types[0]}: {text}"
        return Description(
            name=short_name(type(error)),
            types=types,
            text=text,
            traceback=_first(
                [
                    lambda: _formatted(error, own),
                    lambda: _formatted_by_hand(own) + last_line + "\n",
                ],
                last_line + "\n",
            ),
            frames=_first([lambda: [frame for frame, _ in traceback.walk_tb(own)][::-1]], []),
            pickled=_first([lambda: _pickled(error)], b""),
        )
    finally:
        sys.setrecursionlimit(limit)


def show_paths_as(copy: str, original: str) -> None:
    """Show the files of a directory by the names of those that they are copies of."""
    _shown_as[copy] = original.rstrip("/")


def _of_main(outermost: TracebackType | None) -> TracebackType | None:
    """Leave out our own frames, unless there are no others."""
    own = outermost.tb_next if outermost is not None and outermost.tb_next else outermost
    inner = own
    while inner is not None and inner.tb_frame.f_code.co_filename.endswith(_STARTS_SCRIPTS):
        inner = inner.tb_next
    return inner or own


def show_source_of_threads() -> None:
    """Show source in tracebacks of threads, too: before 3.13 Python reads only files for them."""
    if sys.version_info < (3, 13):
        threading.excepthook = _show_thread


def _show_thread(args: threading.ExceptHookArgs) -> None:
    if issubclass(args.exc_type, SystemExit) or sys.stderr is None:
        return
    name = args.thread.name if args.thread is not None else threading.get_ident()
    shown = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
    sys.stderr.write(f"Exception in thread {name}:\n{''.join(shown)}")
    sys.stderr.flush()


def exit_code_of(leaving: BaseException) -> int:
    """Return the exit code that an interpreter would leave with."""
    try:
        code: Any = leaving.code  # type: ignore[attr-defined]
        number = 0 if code is None else operator.index(code)
    except BaseException:  # noqa: BLE001 - it is the user's object
        return 1
    return number and (number & 0xFF or 1)


def _first(ways: list[Callable[[], _Part]], otherwise: _Part) -> _Part:
    """Return what the first of these ways gives that raises nothing."""
    for way in ways:
        with contextlib.suppress(BaseException):  # it is the user's code
            return way()
    return otherwise


def _text(error: BaseException) -> str:
    try:
        text = _plain(str.lstrip(str(error)), MAX_TEXT)
    except BaseException as problem:  # noqa: BLE001 - it is the user's code
        raised = f"its __str__ raised {short_name(type(problem))}"
        return _first(
            [lambda: f"{_plain(BaseException.__str__(error), MAX_TEXT)} ({raised})"],
            f"(its text cannot be shown: {raised})",
        )
    return text or "(no message)"


def _plain(text: str, most: int, *, keep_end: bool = False) -> str:
    """Cut a text, and make it a real one that every encoding for Unicode can take."""
    text = cut(str.__str__(text), most, keep_end=keep_end)
    escaped = text.encode(errors="backslashreplace").decode()
    return text if escaped == text else cut(escaped, most, keep_end=keep_end)


def _formatted(error: BaseException, own: TracebackType | None) -> str:
    described = traceback.TracebackException(type(error), error, own)
    # Each piece by itself first: a text of megabytes must not push the frames out.
    pieces = [_plain(piece, MAX_TEXT, keep_end=True) for piece in described.format()]
    text = "".join(pieces)
    for copy, original in _shown_as.items():
        text = text.replace(f"{copy}/", f"{original}/")
    return _plain(text, MAX_TRACEBACK, keep_end=True)


def _formatted_by_hand(own: TracebackType | None) -> str:
    lines = list(_lines_of_frames(own))
    if len(lines) > MAX_FRAMES:
        left_out = len(lines) - MAX_FRAMES
        half = MAX_FRAMES // 2
        lines[half:-half] = [f"  ...({left_out:,} frames are left out here)\n"]
    return "Traceback (most recent call last):\n" + "".join(lines)


def _lines_of_frames(own: TracebackType | None) -> Iterator[str]:
    for frame, number in traceback.walk_tb(own):
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        yield _plain(f'  File "{file}", line {number}, in {function}\n', MAX_TEXT)
        source = _first([lambda: linecache.getline(file, number).strip()], "")  # noqa: B023
        if source:
            yield _plain(f"    {source}\n", MAX_TEXT)


def _pickled(error: BaseException) -> bytes:
    sink = _BoundedSink()
    Pickler(sink).dump(error)
    return b"".join(sink.pieces)


class _BoundedSink:
    """Takes a pickle up to `MAX_PICKLE_BYTES`."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self._left = MAX_PICKLE_BYTES

    def write(self, data: Any) -> None:
        view = memoryview(data)
        self._left -= view.nbytes
        if self._left < 0:
            raise OverflowError
        self.pieces.append(bytes(view))
