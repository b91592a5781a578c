"""Output on streams that may be anything: showing it never ends a run. Runs in: the driver."""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import Any

from horovodrunner.formatting import in_one_line

__all__ = ["show_text", "warn"]

_CLEAR_LINE = "\r\x1b[K"
"""Takes Spark's progress bar off the line it shares with us on a terminal."""


def show_text(text: str, name: str = "stdout") -> str:
    """Write to standard output or "stderr", whatever the user has put there."""
    try:
        stream: Any = getattr(sys, name)
        with contextlib.suppress(Exception):  # what stands in for it may have none
            if stream.isatty():
                text = _CLEAR_LINE + text
        _write(stream, text)
        if hasattr(stream, "flush"):
            stream.flush()
    except Exception as error:  # noqa: BLE001 - it is the user's object
        return in_one_line(error)
    return ""


def _write(stream: Any, text: str) -> None:
    with contextlib.suppress(UnicodeEncodeError):
        stream.write(text)
        return
    with contextlib.suppress(Exception):  # it has no encoding, or a wrong one
        encoding = stream.encoding
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return
    stream.write(text.encode("ascii", "backslashreplace").decode())


def warn(text: str, category: type[Warning] = UserWarning, stacklevel: int = 1) -> None:
    """Warn, unless that cannot be shown."""
    try:
        warnings.warn(text, category, stacklevel=stacklevel + 1)
    except Warning:
        raise
    except Exception:  # noqa: BLE001, S110 - standard error may be anything, too
        pass
