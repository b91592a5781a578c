"""Tracebacks that end where the user's code does. Runs in: the driver."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from horovodrunner.pickling.installed import is_of_a_python

_Error = TypeVar("_Error", bound=BaseException)

__all__ = ["FULL_TRACEBACK", "in_cell", "of_the_user", "shorten"]

FULL_TRACEBACK = "HOROVODRUNNER_FULL_TRACEBACK"
"""Brings this package's frames back, unless it is empty or 0."""

_ALL_FRAMES = "_horovodrunner_frames"
_LED_TO = "The exception above led to this one:"
_PACKAGE = f"{Path(__file__).resolve().parents[2]}{os.sep}"


def shorten(error: _Error, handled: BaseException | None) -> _Error:
    """Return an exception that is about to leave this package, without this package's frames.

    `handled` is what the caller was handling before. IPython asks the exception itself what to show
    (`in_cell`), and gets all when the user asks. It does not ask where another exception was raised
    from this one.
    """
    if _are_full():
        return error
    chain: list[BaseException] = [error, *_causes(error)]
    for each in chain:
        if each is handled:
            break
        if _shell() is not None and not hasattr(each, _ALL_FRAMES):
            setattr(each, _ALL_FRAMES, each.__traceback__)
        each.__traceback__ = of_the_user(each.__traceback__)
    if _shell() is not None and not hasattr(error, "_render_traceback_"):
        text = functools.partial(str, error)
        error._render_traceback_ = functools.partial(in_cell, error, text)  # type: ignore[attr-defined]
    return error


def of_the_user(trace: TracebackType | None) -> TracebackType | None:
    """Return a copy of a traceback without this package's frames, and libraries' below them."""
    kept: list[TracebackType] = []
    in_package = False
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        is_own = file.startswith(_PACKAGE)
        in_package = in_package or is_own
        if not is_own and not (in_package and is_of_a_python(file)):
            kept.append(trace)
        trace = trace.tb_next
    return _linked(kept, None)


def in_cell(error: BaseException, text: Callable[[], str], told: str = "") -> list[str]:
    """Return what IPython is to show of an exception whose message is ``text()``.

    `told` comes first: the traceback of its cause in another process, say. Nothing is left out in
    IPython's verbose mode or with ``HOROVODRUNNER_FULL_TRACEBACK``.
    """
    formatter = _shell().InteractiveTB

    def show(error: BaseException, trace: TracebackType | None) -> list[str]:
        return list(formatter.structured_traceback(type(error), error, trace))

    if _are_full():
        for each in (error, *_causes(error)):
            each.__traceback__ = _with_all_frames(each)
        return show(error, error.__traceback__)
    parts = [told, ""] if told else []
    for cause in reversed(_causes(error)):
        if (trace := of_the_user(cause.__traceback__)) is not None:
            parts += [*show(_alone(cause, functools.partial(str, cause)), trace), "", _LED_TO, ""]
    return [*parts, *show(_alone(error, text), of_the_user(error.__traceback__))]


def _with_all_frames(error: BaseException) -> TracebackType | None:
    frames: TracebackType | None = getattr(error, _ALL_FRAMES, None)
    if frames is None:
        return error.__traceback__
    callers: list[TracebackType] = []
    trace = error.__traceback__
    while trace is not None and trace.tb_frame is not frames.tb_frame:
        callers.append(trace)
        trace = trace.tb_next
    return _linked(callers, frames)


def _linked(entries: list[TracebackType], rest: TracebackType | None) -> TracebackType | None:
    for each in reversed(entries):
        rest = TracebackType(rest, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return rest


def _alone(error: BaseException, text: Callable[[], str]) -> BaseException:
    """Return an exception that looks the same and was raised from nothing."""
    shown = type(type(error).__name__, (Exception,), {"__str__": lambda _: text()})()
    assert isinstance(shown, Exception)  # noqa: S101
    return shown


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return found[1:]


def _shell() -> Any:
    """Return IPython's shell, if this is one."""
    return getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()


def _are_full() -> bool:
    shell = _shell()
    is_verbose = shell is not None and shell.InteractiveTB.mode == "Verbose"
    return is_verbose or os.environ.get(FULL_TRACEBACK, "0") not in ("", "0")
