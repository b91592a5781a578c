"""What the callbacks of frameworks share. Runs in: the worker."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from horovodrunner.flows.logs.training_log import TrainingLog

__all__ = ["FrameworkCallback", "base_classes"]


class FrameworkCallback:
    """A callback whose instances also have the base class that the framework asks for."""

    _chosen_class: type

    def __init__(self, per_batch_log: bool = False) -> None:
        super().__init__()
        self._per_batch_log = per_batch_log
        self._log = TrainingLog()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to the workers as a new one, of the framework there."""
        return self._chosen_class, (self._per_batch_log,)

    @classmethod
    def _with_bases(cls, *bases: type) -> Any:
        return object.__new__(type(cls.__name__, (cls, *bases), {"_chosen_class": cls}))


def base_classes(packages: Sequence[str], attribute: str) -> tuple[type, ...]:
    """Return a class of those packages that are imported already, else of the first one there is.

    Several may be imported: tensorflow alone imports Keras 3, beside which somebody uses tf_keras.
    A callback that has all their base classes suits each of them.
    """
    imported = [name for name in packages if name in sys.modules]
    find = attrgetter(attribute)
    if imported:
        return tuple(find(importlib.import_module(name)) for name in imported)
    for name in packages:
        try:
            return (find(importlib.import_module(name)),)
        except ModuleNotFoundError:
            continue
    raise ImportError(
        f"none of {', '.join(packages)} is installed here, and this callback needs one: "
        f"pip install {packages[0].partition('.')[0]}"
    )
