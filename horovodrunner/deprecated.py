"""Old names that are still taken, with a DeprecationWarning. Runs in: every process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from horovodrunner.errors import ArgumentTypeError
from horovodrunner.flows.logs.showing import warn

__all__ = ["replace_old_keywords", "warn_renamed"]


def replace_old_keywords(kwargs: Mapping[str, Any], new_names: Mapping[str, str]) -> dict[str, Any]:
    """Return the keywords by their new names; warn of old ones where the caller was called."""
    replaced = dict(kwargs)
    for old, new in new_names.items():
        if old in replaced:
            if new in replaced:
                raise ArgumentTypeError(f"{old}= is the old name of {new}=: give {new}= alone")
            warn_renamed(f"{old}=", f"{new}=", stacklevel=3)
            replaced[new] = replaced.pop(old)
    return replaced


def warn_renamed(old: str, new: str, stacklevel: int = 1) -> None:
    """Warn that a name, or a value such as ``remainder="share"``, has become another one.

    The warning points at the caller's line with ``stacklevel=1``.
    """
    warn(f"{old} is deprecated: it is called {new} now", DeprecationWarning, stacklevel + 1)
