"""Bad input is refused before anything starts."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import horovodrunner
from horovodrunner import HorovodRunner
from horovodrunner.core import payload


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something was launched")

    monkeypatch.setattr(HorovodRunner, "_run_locally", refuse)
    monkeypatch.setattr(HorovodRunner, "_run_on_spark", refuse)


def train(lr: float, *, epochs: int = 1) -> None:
    """Train nothing."""


def test_the_documented_interface() -> None:
    init = inspect.getfullargspec(HorovodRunner.__init__)
    assert init.args == ["self"]
    assert init.kwonlyargs[:2] == ["np", "driver_log_verbosity"]
    assert init.kwonlydefaults is not None
    assert init.kwonlydefaults["driver_log_verbosity"] == "log_callback_only"
    assert "np" not in init.kwonlydefaults
    run = inspect.getfullargspec(HorovodRunner.run)
    assert (run.args, run.varkw, run.varargs) == (["self", "main"], "kwargs", None)


def test_np_is_keyword_only() -> None:
    with pytest.raises(TypeError):
        HorovodRunner(2)  # type: ignore[call-arg]


@pytest.mark.parametrize("np", [True, False, 2.0, "2", None, [2]])
def test_np_must_be_an_int(np: Any) -> None:
    with pytest.raises(horovodrunner.ArgumentTypeError, match=r"np=.*must be an int"):
        HorovodRunner(np=np)


def test_numpy_integers_are_ints() -> None:
    numpy = pytest.importorskip("numpy")
    HorovodRunner(np=numpy.int64(2))


@pytest.mark.parametrize("verbosity", ["ALL", "", None, 1])
def test_a_wrong_verbosity_is_a_value_error_that_names_both(verbosity: Any) -> None:
    with pytest.raises(ValueError, match=r"'all'.*'log_callback_only'"):
        HorovodRunner(np=-1, driver_log_verbosity=verbosity)


@pytest.mark.parametrize(
    ("timeout", "kind"),
    [("600", TypeError), (True, TypeError), (0, ValueError), (-1.0, ValueError)],
)
def test_a_wrong_timeout_is_refused(timeout: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="start_timeout"):
        HorovodRunner(np=-1, start_timeout=timeout)


def test_calling_main_instead_of_passing_it_is_explained() -> None:
    with pytest.raises(TypeError, match=r"run\(train\), not run\(train\(\)\)"):
        HorovodRunner(np=-1).run(train(0.1))  # type: ignore[func-returns-value, arg-type]


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"learning_rate": 0.1}, "learning_rate"),
        ({}, "missing a required argument: 'lr'"),
        ({"lr": 1, "batch": 2}, "unexpected keyword argument 'batch'"),
        ({"batch": 2}, "missing a required argument: 'lr'; it has no argument 'batch'"),
    ],
)
def test_arguments_main_does_not_take_are_refused(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text) as caught:
        HorovodRunner(np=-2).run(train, **kwargs)
    assert "train(lr" in str(caught.value)


def test_a_large_call_is_warned_about_with_the_culprit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(payload, "WARN_BYTES", 1000)
    with (
        pytest.warns(UserWarning, match=r"Largest: the argument 'lr' \(9\.8 KiB\)"),
        pytest.raises(AssertionError, match="launched"),
    ):
        HorovodRunner(np=-1).run(train, lr=bytes(10_000))


def test_the_public_names_are_exported_and_documented() -> None:
    assert sorted(horovodrunner.__all__) == horovodrunner.__all__
    for name in horovodrunner.__all__:
        assert getattr(horovodrunner, name).__doc__
