"""Trainings with Horovod end bit for bit as undisturbed ones, wherever a rank is killed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from horovodrunner.testing import assert_resumes
from tests.process.resuming import ROWS, fit_keras, train_torch

pytestmark = [pytest.mark.horovod, pytest.mark.heavy]


def test_a_loop_of_torch(training_data: Any, horovod_runner: Any) -> None:
    pa = pytest.importorskip("pyarrow")
    step = random.randrange(2, 33)
    print(f"killed at step {step}")
    x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("float32")
    with training_data(pa.table({"x": list(x), "y": x.sum(axis=1)})) as rows:
        assert_resumes(
            train_torch, at_step=step, rank=1, runner=horovod_runner, rows=rows, epochs=3
        )


@pytest.mark.parametrize(
    ("backend", "every_steps", "options"),
    [
        ("tensorflow", 3, {}),
        ("tensorflow", None, {"is_built": False}),
        ("tensorflow", 3, {"is_built": False, "steps_per_execution": 2}),
        ("torch", 3, {}),
    ],
    ids=["tensorflow", "tensorflow-unbuilt", "tensorflow-two-at-once", "torch"],
)
def test_keras(
    backend: str, every_steps: int | None, options: dict[str, Any], horovod_runner: Any
) -> None:
    step = random.randrange(4 if every_steps else 11, 33)
    print(f"killed at step {step}")
    assert_resumes(
        fit_keras,
        at_step=step,
        rank=1,
        runner=horovod_runner,
        backend=backend,
        epochs=3,
        every_steps=every_steps,
        **options,
    )
