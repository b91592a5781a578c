"""HorovodRunner for every Apache Spark. Runs in: every process.

A name is imported when it is first used: workers and tasks need nothing of the driver's, and there
is one start of each a rank.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from horovodrunner import errors
from horovodrunner.errors import *  # noqa: F403 - what its __all__ names

if TYPE_CHECKING:
    from horovodrunner import artifacts, checkpoint, metrics
    from horovodrunner.flows.checkpoints.saved import SavedCheckpoint
    from horovodrunner.processes.worker.context import log_to_driver
    from horovodrunner.runner import HorovodRunner

logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "HorovodRunner",
    "SavedCheckpoint",
    "artifacts",
    "checkpoint",
    "log_to_driver",
    "metrics",
]
__all__ += errors.__all__

__version__ = "0.1.0"

_HOMES = {
    "HorovodRunner": "horovodrunner.runner",
    "SavedCheckpoint": "horovodrunner.flows.checkpoints.saved",
    "log_to_driver": "horovodrunner.processes.worker.context",
}


def __getattr__(name: str) -> Any:
    if name in ("artifacts", "checkpoint", "metrics"):
        return importlib.import_module(f"horovodrunner.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
