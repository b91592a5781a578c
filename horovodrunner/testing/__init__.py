"""Tests of training code: real executors, real faults, and what is to come of them.

pytest finds its fixtures by itself, where ``pip install horovodrunner[pytest]`` was run: see
``docs/testing.md``. The same works without pytest, and with other frameworks for tests::

    from horovodrunner.testing import Faults, assert_resumes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from horovodrunner.testing.comparing import (
        assert_equal_to_single_process,
        assert_resumes,
        assert_same_weights,
    )
    from horovodrunner.testing.faults import Faults

__all__ = [
    "Faults",
    "assert_equal_to_single_process",
    "assert_resumes",
    "assert_same_weights",
]

_HOMES = {"Faults": "faults"}


def __getattr__(name: str) -> Any:
    """Import what is asked for: pytest loads this package in every session."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'comparing')}"), name)
