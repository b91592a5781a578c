"""Trainings of frameworks end bit for bit as undisturbed ones, wherever a rank is killed."""

from __future__ import annotations

import random
from typing import Any

import pytest

from horovodrunner.testing import assert_resumes
from tests.process.resuming import fit_lightning


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("package", "every_steps", "workers", "steps"),
    [
        ("lightning.pytorch", 3, 0, range(4, 11)),  # within the first of epochs of 11 steps
        ("lightning.pytorch", 3, 1, range(14, 33)),
        ("pytorch_lightning", None, 0, range(11, 33)),
    ],
)
def test_lightning(
    package: str, every_steps: int | None, workers: int, steps: range, horovod_runner: Any
) -> None:
    step = random.choice(steps)
    print(f"killed at step {step}")
    assert_resumes(
        fit_lightning,
        at_step=step,
        rank=1,
        runner=horovod_runner,
        package=package,
        epochs=3,
        every_steps=every_steps,
        workers=workers,
    )
