"""Datasets of TensorFlow that MLflow must not read to their end. Runs in: the worker."""

from __future__ import annotations

import sys
from typing import Any

from horovodrunner.errors import DataError

__all__ = ["refuse_without_end"]


def refuse_without_end(*values: Any) -> None:
    """Fail if one of some values is a dataset that says it has no end."""
    if any(map(_has_no_end, values)):
        raise DataError(
            "MLflow wants to read all rows, for a digest, and this dataset has no end: train "
            "without it, with autolog(log_datasets=False), or give from_tensorflow a digest="
        )


def _has_no_end(value: Any) -> bool:
    tf = sys.modules["tensorflow"]
    if not isinstance(value, tf.data.Dataset):
        return False
    rows = int(value.cardinality())
    if rows == tf.data.experimental.UNKNOWN_CARDINALITY:  # as after filter()
        return any(map(_has_no_end, value._inputs()))
    return bool(rows == tf.data.experimental.INFINITE_CARDINALITY)
