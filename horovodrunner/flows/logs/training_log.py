"""The lines that LogCallbacks send to the driver; knows no framework. Runs in: the worker."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError
from horovodrunner.formatting import printable
from horovodrunner.processes.worker.context import log_to_driver

__all__ = ["TrainingLog", "count_or_none", "format_logs", "format_value"]

_MAX_ITEMS = 4
_MAX_CHARACTERS = 80


class TrainingLog:
    """Sends a line when an epoch begins, when a batch ends and when an epoch ends.

    Epochs and batches count from 0 in the arguments, as in the frameworks, and from 1 in the lines.
    """

    def __init__(self) -> None:
        self._epoch = "epoch ?"
        self._began = time.monotonic()

    def epoch_begins(self, epoch: int, epochs: int | None = None) -> None:
        self._epoch = _numbered("epoch", epoch, epochs)
        self._began = time.monotonic()
        self._log(f"{self._epoch} begins")

    def batch_ends(self, batch: int, batches: int | None, logs: Mapping[str, Any] | None) -> None:
        values = format_logs(logs)
        self._log(f"{self._epoch}, {_numbered('batch', batch, batches)}: {values or 'done'}")

    def epoch_ends(self, logs: Mapping[str, Any] | None) -> None:
        took = f"({time.monotonic() - self._began:.1f} s)"
        self._log(f"{self._epoch}: {format_logs(logs) or 'done'} {took}")

    @staticmethod
    def _log(text: str) -> None:
        log_to_driver(f"{_rank_prefix()}{text}")


def count_or_none(number: Any) -> int | None:
    """Return how many epochs or batches a framework says there are, if that is known."""
    try:
        return max(0, checked.integer("number", number)) or None
    except ArgumentTypeError:
        return None


def _numbered(what: str, number: int, total: int | None) -> str:
    return f"{what} {number + 1}" + (f" of {total}" if total else "")


def _rank_prefix() -> str:
    size = os.environ.get("HOROVOD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    rank = os.environ.get("HOROVOD_RANK") or os.environ.get("RANK") or "0"
    return "" if size == "1" else f"rank {rank}: "


def format_logs(logs: Mapping[str, Any] | None) -> str:
    """Write named values in one line."""
    items = (logs or {}).items()
    return ", ".join(f"{printable(str(name))} {format_value(value)}" for name, value in items)


def format_value(value: Any) -> str:
    """Write one value for people; a number of any framework, or anything else, without failing."""
    try:
        text = _format(value)
    except Exception:  # noqa: BLE001 - a line of the log must not end the training
        text = f"({type(value).__name__})"
    text = " ".join(text.split())
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 3] + "..."


def _format(value: Any) -> str:
    if hasattr(value, "detach"):
        value = value.detach()  # a tensor of PyTorch that has a gradient
    if not isinstance(value, type) and callable(getattr(value, "tolist", None)):
        value = value.tolist()
    elif callable(getattr(value, "numpy", None)):
        value = value.numpy().tolist()
    if isinstance(value, float):
        return _format_float(value)
    if isinstance(value, (list, tuple)):
        items = [_format(item) for item in value[:_MAX_ITEMS]]
        more = [f"... ({len(value)} values)"] if len(value) > _MAX_ITEMS else []
        return f"[{', '.join(items + more)}]"
    return str(value)


def _format_float(value: float) -> str:
    size = abs(value)
    if 0.001 <= size < 1000:
        return f"{value:.4f}"
    return f"{value:.1f}" if 1000 <= size < 1e6 else f"{value:.4g}"
