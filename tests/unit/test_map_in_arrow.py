"""PySpark's warning of pandas 3, where no pandas is used."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from horovodrunner.spark.arrow import map_in_arrow

WARNING = "PySpark does not yet fully support pandas >= 3.0.0. Some features may not work"


class Frame:
    def __init__(self, text: str) -> None:
        self._text = text

    def mapInArrow(self, *arguments: Any, **options: Any) -> tuple[Any, Any]:  # noqa: N802
        warnings.warn(self._text, FutureWarning, stacklevel=2)
        return arguments, options


def test_it_ends_no_run_where_warnings_are_errors() -> None:
    before = list(warnings.filters)
    frame = Frame(WARNING)
    assert map_in_arrow(frame, len, "a int", barrier=True) == ((len, "a int"), {"barrier": True})
    assert warnings.filters == before


def test_others_are_not_hidden() -> None:
    with pytest.warns(FutureWarning, match="another"):
        map_in_arrow(Frame("another"), len, "a int")
