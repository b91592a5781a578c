"""The state of random number generators as plain values."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest

from horovodrunner import ArgumentTypeError
from horovodrunner.checkpoint import RandomState


def test_python_and_numpy_go_on_where_they_were() -> None:
    state = RandomState()
    before = random.getstate(), np.random.get_state()
    try:
        saved = state.state_dict()
        numbers = random.random(), np.random.normal()
        random.seed(1)
        np.random.seed(1)
        state.load_state_dict(saved)
        assert (random.random(), np.random.normal()) == numbers
        json.dumps(saved)  # nothing but plain values
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def test_torch_goes_on_where_it_was_and_trusts_the_file() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_rng_state()
    try:
        file = io.BytesIO()
        torch.save(RandomState().state_dict(), file)
        numbers = torch.rand(3).tolist()
        file.seek(0)
        RandomState().load_state_dict(torch.load(file, weights_only=True))
        assert torch.rand(3).tolist() == numbers
    finally:
        torch.set_rng_state(before)


def test_what_is_no_state_is_refused() -> None:
    for wrong in ({"weights": 1}, [1, 2], None):
        with pytest.raises(ArgumentTypeError, match="no state of random numbers"):
            RandomState().load_state_dict(wrong)  # type: ignore[arg-type]
