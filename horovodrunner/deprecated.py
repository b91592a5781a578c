"""Old names that are still taken, with a DeprecationWarning. Runs in: every process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from horovodrunner.errors import ArgumentTypeError
from horovodrunner.flows.logs.showing import warn

__all__ = ["renamed_keywords", "replace_old_keywords", "warn_renamed"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def renamed_keywords(**new_names: str) -> Callable[[_Function], _Function]:
    """Let a function take keywords by their old names: ``@renamed_keywords(old="new")``."""

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            return function(*args, **replace_old_keywords(kwargs, new_names, stacklevel=2))

        return call  # type: ignore[return-value]

    return decorate


def replace_old_keywords(
    kwargs: Mapping[str, Any], new_names: Mapping[str, str], stacklevel: int = 1
) -> dict[str, Any]:
    """Return the keywords by their new names, and warn of each old one.

    The warning points at the caller's line with ``stacklevel=1``, at the line that called the
    caller with 2.
    """
    replaced = dict(kwargs)
    for old, new in new_names.items():
        if old in replaced:
            if new in replaced:
                raise ArgumentTypeError(f"{old}= is the old name of {new}=: give {new}= alone")
            warn_renamed(f"{old}=", f"{new}=", stacklevel + 1)
            replaced[new] = replaced.pop(old)
    return replaced


def warn_renamed(old: str, new: str, stacklevel: int = 1) -> None:
    """Warn that a name, or a value such as ``remainder="share"``, has become another one.

    The warning points at the caller's line with ``stacklevel=1``.
    """
    warn(f"{old} is deprecated: it is called {new} now", DeprecationWarning, stacklevel + 1)
