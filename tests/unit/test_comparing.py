"""Weights of every kind, compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from horovodrunner import ArgumentTypeError, ArgumentValueError
from horovodrunner.testing import (
    assert_equal_to_single_process,
    assert_resumes,
    assert_same_weights,
)


@dataclass
class State:
    w: Any


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        (np.array([np.nan, 1.0]), np.array([2.0, 1.0]), "1 of 2 numbers differ, by nan"),
        (np.array([np.nan, 1.0]), np.array([np.nan, 3.0]), "1 of 2 numbers differ, by 2 at most"),
        (np.array([np.inf]), np.array([-np.inf]), "by inf at most"),
        ({1: np.ones(1), "1": np.zeros(1)}, {1: np.zeros(1), "1": np.zeros(1)}, "1: 1 of 1"),
        ({"a.b": 1, "a": {"b": 2}}, {"a.b": 1, "a": {"b": 3}}, "a.b#1: 1 of 1"),
        (State(np.ones(2)), State(np.zeros(2)), "w: 2 of 2"),
        (np.ones(2), np.ones(2, "float32"), "float64 of shape (2,), and float32"),
    ],
)
def test_what_differs_is_found(one: Any, other: Any, told: str) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_same_weights([one, other])
    assert told in str(caught.value)


def test_nan_is_as_good_as_nan() -> None:
    assert_same_weights([np.array([np.nan, 1.0]), np.array([np.nan, 1.0])])


def test_types_that_numpy_does_not_know() -> None:
    torch = pytest.importorskip("torch")
    for kind in torch.bfloat16, torch.float8_e4m3fn:
        low = torch.ones(2, dtype=torch.float32)
        assert_same_weights([low.to(kind), low.to(kind)])
        with pytest.raises(AssertionError, match=f"is float32 .* and {str(kind)[6:]} of"):
            assert_same_weights([low, low.to(kind)])
    lazy = torch.tensor([1 + 1j]).conj()
    assert_same_weights([lazy, lazy.resolve_conj()])
    assert_same_weights([torch.eye(2).to_sparse(), torch.eye(2)])


class Runner:
    """Returns what it was made to return."""

    def __init__(self, **options: Any) -> None:
        self.np = abs(options["np"])

    def run(self, main: Any) -> Any:
        self.results = [main(self.np)] * self.np
        return self.results[0]


def test_tolerance_follows_from_the_type() -> None:
    torch = pytest.importorskip("torch")
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    for make in (
        lambda value: torch.tensor([value], dtype=torch.bfloat16),
        lambda value: np.array([value]).astype(bfloat16),
    ):
        for apart, is_equal in (0.01, True), (0.2, False):

            def train(size: int, make: Any = make, apart: float = apart) -> Any:
                return make(1.0 + apart * (size - 1))

            if is_equal:
                assert_equal_to_single_process(train, runner=Runner)
                continue
            with pytest.raises(AssertionError, match=r"and 0.03 is allowed"):
                assert_equal_to_single_process(train, runner=Runner)


def test_arguments_are_checked_before_anything_runs() -> None:
    with pytest.raises(ArgumentTypeError, match="give what every rank returned"):
        assert_same_weights(np.ones((2, 2)))  # type: ignore[arg-type]
    with pytest.raises(ArgumentValueError, match="tolerance=-1"):
        assert_equal_to_single_process(np.ones, tolerance=-1)
    with pytest.raises(ArgumentValueError, match="rank=2: np=-2 has ranks 0 to 1"):
        assert_resumes(np.ones, at_step=1, rank=2)
    with pytest.raises(ArgumentValueError, match="at_step=0"):
        assert_resumes(np.ones, at_step=0)
