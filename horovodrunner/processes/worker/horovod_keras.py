"""Puts horovodrunner.keras in the place of what Horovod has for Keras. Runs in: the worker.

An import hook does so where Keras 3 is in use: Horovod's own optimizer silently does not average
gradients there. ``HOROVODRUNNER_KERAS=horovod`` leaves everything as Horovod has it.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from horovodrunner.flows.call.import_hook import Execute, instead_of_import
from horovodrunner.placement.environment import KERAS_SWITCH
from horovodrunner.processes.worker.context import notice

__all__ = ["install"]

_OF_TENSORFLOW = "horovod.tensorflow"
_OF_KERAS = ("horovod.tensorflow.keras", "horovod.keras")
_CALLBACKS = tuple(f"{name}.callbacks" for name in _OF_KERAS)


def install() -> None:
    for name in (_OF_TENSORFLOW, *_OF_KERAS, *_CALLBACKS):
        instead_of_import(name, _execute)


def _execute(module: ModuleType, horovods: Execute) -> None:
    name = module.__name__
    if os.environ.get(KERAS_SWITCH, "").lower() == "horovod":
        horovods(module)
    elif name == _OF_TENSORFLOW:
        horovods(module)
        _take_keras_variables(module)
    elif _uses_keras_2():
        horovods(module)
        if name.startswith(_OF_TENSORFLOW):
            # What Horovod took is Keras 3's, which lacks most of what its callbacks call.
            module.K = importlib.import_module("tensorflow").keras.backend  # type: ignore[attr-defined]
        else:
            # There "keras" is Keras 3, even when TensorFlow's is not.
            right = name.replace("horovod", _OF_TENSORFLOW)
            _take_names(module, importlib.import_module(right))
    else:
        _execute_for_keras_3(module, horovods)


def _execute_for_keras_3(module: ModuleType, horovods: Execute) -> None:
    ours = importlib.import_module("horovodrunner.keras")
    keras = importlib.import_module("keras")
    is_main = module.__name__ in _OF_KERAS
    if keras.backend.backend() == "tensorflow":
        horovods(module)
    elif is_main:
        _take_names(module, importlib.import_module("horovod.torch"))
        module.callbacks = importlib.import_module(f"{module.__name__}.callbacks")  # type: ignore[attr-defined]
    for name in ("DistributedOptimizer", "load_model") if is_main else ours.__all__:
        setattr(module, name, getattr(ours, name))
    notice(
        "keras 3",
        f"with Keras {keras.__version__} on {keras.backend.backend()}, hvd.DistributedOptimizer, "
        "load_model and the callbacks are those of horovodrunner.keras, because Horovod's own do "
        f"not average gradients ({KERAS_SWITCH}=horovod brings them back)",
    )


def _uses_keras_2() -> bool:
    # As TensorFlow decides it; the oldest TensorFlow with Keras 3 is 2.16.
    if os.environ.get("TF_USE_LEGACY_KERAS") in ("true", "True", "1"):
        return True
    return str(importlib.import_module("keras").__version__).startswith("2.")


def _take_names(module: ModuleType, source: ModuleType) -> None:
    for name, value in vars(source).items():
        if not name.startswith("__"):
            setattr(module, name, value)


def _take_keras_variables(hvd: Any) -> None:
    """Let what a training loop calls take variables of Keras 3, which are not TensorFlow's."""
    for name in ("DistributedGradientTape", "PartialDistributedGradientTape"):
        setattr(hvd, name, _whose_variables_have_ref(getattr(hvd, name)))
    broadcast: Callable[..., Any] = hvd.broadcast_variables

    @functools.wraps(broadcast)
    def broadcast_variables(variables: Any, *args: Any, **kwargs: Any) -> Any:
        kind = _keras_variable()
        return broadcast(
            [v.value if isinstance(v, kind) else v for v in variables], *args, **kwargs
        )

    hvd.broadcast_variables = broadcast_variables


def _whose_variables_have_ref(make_tape: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make_tape)
    def make(*args: Any, **kwargs: Any) -> Any:
        for kind in _keras_variable():
            if not hasattr(kind, "ref"):
                kind.ref = lambda self: self.value.ref()
        return make_tape(*args, **kwargs)

    return make


def _keras_variable() -> tuple[Any, ...]:
    """Return Keras 3's class of variables, if it has been imported."""
    kind = getattr(sys.modules.get("keras"), "Variable", None)
    return () if kind is None else (kind,)
