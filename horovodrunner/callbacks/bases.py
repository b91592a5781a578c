"""What the callbacks of frameworks share. Runs in: the worker."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from horovodrunner.errors import ArgumentTypeError, ArgumentValueError
from horovodrunner.flows.logs.training_log import TrainingLog
from horovodrunner.metrics import number_of, progress, report
from horovodrunner.processes.worker.context import current_context, notice

__all__ = ["FrameworkCallback", "Reporter", "WithFrameworkBase", "base_classes"]


class WithFrameworkBase:
    """Something whose instances also have the base class that the framework asks for."""

    _chosen_class: type
    _options: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to the workers as a new one, of the framework there."""
        return self._chosen_class, self._options

    @classmethod
    def _with_bases(cls, *bases: type) -> Any:
        return object.__new__(type(cls.__name__, (cls, *bases), {"_chosen_class": cls}))


class FrameworkCallback(WithFrameworkBase):
    """A callback that sends lines to the driver."""

    def __init__(self, per_batch_log: bool = False) -> None:
        super().__init__()
        self._options = (per_batch_log,)
        self._per_batch_log = per_batch_log
        self._log = TrainingLog()


class Reporter:
    """Reports what a framework logs as metrics, and its epochs or steps as a progress bar."""

    def __init__(self) -> None:
        self._bar: Any = None

    def open(self, description: str, total: int | None) -> None:
        """Begin a bar; outside a run the framework's own is enough."""
        self.close()
        if current_context() is not None:
            self._bar = progress(desc=description, total=total)

    def at(self, done: int) -> None:
        """Note how many of them are done."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @staticmethod
    def report(step: Any, logs: Mapping[str, Any] | None) -> None:
        """Report the numbers among what was logged; whatever else is there, training goes on."""
        numbers: dict[str, Any] = {}
        for name, value in (logs or {}).items():
            if _may_be_number(value):
                own_name = f"{name}_" if name in ("step", "ranks") else str(name)
                with contextlib.suppress(ArgumentTypeError, ArgumentValueError):
                    numbers[own_name] = number_of(own_name, value)
        if numbers:
            try:
                # Lightning takes a float that somebody logs as "step"
                report(None if step is None else int(step), **numbers)
            except (ArgumentTypeError, ArgumentValueError, TypeError, ValueError) as error:
                notice("metrics.callback", f"metrics of a callback are not kept: {error}")


def _may_be_number(value: Any) -> bool:
    """Leave out what it takes long to find out about, such as a large tensor."""
    try:
        size_is_one = all(length == 1 for length in getattr(value, "shape", ()))
        return size_is_one and not isinstance(value, (str, bytes)) and hasattr(value, "__float__")
    except Exception:  # noqa: BLE001 - it is somebody's object
        return False


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
