"""Rows that are the same in every process, so that each rank can take its share of them."""

from __future__ import annotations

import numpy as np

ROWS = 256
BATCH = 32
"""Rows of a step, over all ranks."""


def load() -> tuple[np.ndarray, np.ndarray]:
    """Return features (rows, 3) and prices (rows, 1)."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, 3)).astype("float32")
    noise = generator.normal(scale=0.01, size=(ROWS, 1))
    y = x @ np.array([[1.0], [-2.0], [0.5]]) + noise
    return x, y.astype("float32")


def batch(step: int) -> slice:
    """Return which rows a step takes; it follows from the step alone, so a restart finds them."""
    first = step * BATCH % ROWS
    return slice(first, first + BATCH)
