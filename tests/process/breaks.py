"""What a main may break before it ends."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import io
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def broken(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("this is main's own")


class _NoStream:
    """Neither flush nor write."""


class _Leaves:
    """A stream whose methods end the process."""

    def write(self, text: str) -> int:
        sys.exit(3)

    flush = write


def _replace_streams(stream: Any) -> None:
    sys.stdout = sys.stderr = stream


def _close_descriptors(*numbers: int) -> None:
    for number in numbers:
        os.close(number)


def _delete_streams() -> None:
    del sys.stdout, sys.stderr


def cover(first: int, last: int) -> None:
    """Put another file in the place of every descriptor, as a daemon does."""
    other = os.open(os.devnull, os.O_RDWR)
    for number in range(first, last):
        if number != other:
            os.dup2(other, number)


def _leave_directory() -> None:
    directory = Path("gone").absolute()
    directory.mkdir()
    os.chdir(directory)
    directory.rmdir()


def _set(module: Any, **names: Any) -> None:
    for name, value in names.items():
        setattr(module, name, value)


def _alarm_at_any_moment() -> None:
    signal.signal(signal.SIGALRM, broken)
    with contextlib.suppress(RuntimeError):
        signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0005)
        time.sleep(0.01)


BREAKS: dict[str, Callable[[], object]] = {
    "no methods": lambda: _replace_streams(_NoStream()),
    "no streams": lambda: _replace_streams(None),
    "leaving": lambda: _replace_streams(_Leaves()),
    "closed": lambda: [sys.stdout.close(), sys.stderr.close()],
    "detached": lambda: [sys.stdout.detach(), sys.stderr.detach()],  # type: ignore[union-attr]
    "deleted": _delete_streams,
    "closed below": lambda: _close_descriptors(1, 2),
    "redirected": lambda: contextlib.redirect_stderr(io.StringIO()).__enter__(),
    "descriptors closed": lambda: os.closerange(3, 900),
    "descriptors covered": lambda: cover(3, 64),
    "warnings are errors": lambda: warnings.simplefilter("error"),
    "no environment": os.environ.clear,
    "no directory": _leave_directory,
    "no modules": sys.modules.clear,
    "built-ins": lambda: _set(builtins, open=broken, print=broken, __import__=broken),
    "clocks": lambda: _set(time, time=broken, monotonic=broken),
    "JSON": lambda: _set(json, dumps=broken, loads=broken),
    "hooks": lambda: _set(sys, excepthook=broken, unraisablehook=broken),
    "recursion": lambda: sys.setrecursionlimit(40),
    "tracing": lambda: sys.settrace(broken),
    "exit functions": lambda: [atexit.register(broken), atexit.register(lambda: os._exit(9))],
    "SIGTERM": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "alarm": _alarm_at_any_moment,
}


def break_and_end(what: str, directory: str, how: str) -> str:
    os.chdir(directory)
    BREAKS[what]()
    if how == "raise":
        raise ValueError("told")
    return "value"


class _Name:
    __str__ = broken


def run_in_a_module_without_a_name() -> str:
    exec("import time\ntime.sleep(1.5)", {"__name__": _Name()})
    return "value"
