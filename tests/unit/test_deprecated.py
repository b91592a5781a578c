"""Old names of arguments: taken, with a warning that names the new one."""

from __future__ import annotations

import inspect

import pytest

from horovodrunner.deprecated import warn_renamed
from horovodrunner.errors import ArgumentTypeError
from horovodrunner.usage import explained


@explained(keep="keep_columns")
def predict(model: str, *, keep_columns: tuple[str, ...] = ()) -> tuple[str, tuple[str, ...]]:
    return model, keep_columns


def test_an_old_keyword_is_taken_with_a_warning_at_the_line_that_uses_it() -> None:
    with pytest.warns(DeprecationWarning, match=r"keep= is .* called keep_columns= now") as caught:
        assert predict("m", keep=("id",)) == ("m", ("id",))  # type: ignore[call-arg]
    assert caught[0].filename == __file__
    assert predict("m", keep_columns=("id",)) == ("m", ("id",))
    assert list(inspect.signature(predict).parameters) == ["model", "keep_columns"]


def test_both_names_of_one_keyword_are_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="give keep_columns= alone"):
        predict("m", keep=(), keep_columns=())  # type: ignore[call-arg]


def test_an_old_value_is_warned_of_at_the_line_that_is_asked_for() -> None:
    with pytest.warns(DeprecationWarning, match="'share' is .* called 'split' now") as caught:
        warn_renamed("'share'", "'split'")
    assert caught[0].filename == __file__
