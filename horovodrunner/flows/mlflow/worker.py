"""Keeps ranks other than 0 from logging by themselves into MLflow. Runs in: the worker."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from horovodrunner.flows.call.import_hook import after_import
from horovodrunner.placement.environment import MLFLOW

__all__ = ["keep_autologging_to_rank_0"]

_switched_off: list[Any] = []
"""What would switch autologging on again when it is freed."""


def keep_autologging_to_rank_0() -> None:
    """See to it that autologging does nothing on other ranks, even if main turns it on there.

    That is so where the driver reports the run to MLflow; every rank would log the same otherwise.
    """
    if os.environ.get(MLFLOW) and os.environ.get("RANK", "0") != "0":
        after_import("mlflow.utils.autologging_utils", _switch_off)


def _switch_off(module: Any) -> None:
    with contextlib.suppress(Exception):  # another version, whose import is not to fail
        autologging = module.disable_autologging()
        autologging.__enter__()
        _switched_off.append(autologging)
