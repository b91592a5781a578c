"""Puts horovodrunner.keras in the place of what Horovod has for Keras. Runs in: the worker.

``import horovod.tensorflow.keras as hvd`` and ``import horovod.keras as hvd`` go through an import
hook. When Keras 3 is in use, the optimizer, the callbacks and ``load_model`` in them are those of
:mod:`horovodrunner.keras`: Horovod's own do not average gradients there, and say nothing. With
Keras 2 (``TF_USE_LEGACY_KERAS=1``) Horovod's own stay. ``HOROVODRUNNER_KERAS=horovod``, on the
driver or in main before the import, leaves everything as Horovod has it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from horovodrunner.core.env import KERAS_SWITCH
from horovodrunner.worker.context import current_context, log_to_driver

if TYPE_CHECKING:  # it imports a lot, and every worker would pay for it
    from importlib.abc import Loader

__all__ = ["announce", "install"]

_OF_TENSORFLOW = "horovod.tensorflow"
_OF_KERAS = ("horovod.tensorflow.keras", "horovod.keras")
_CALLBACKS = tuple(f"{name}.callbacks" for name in _OF_KERAS)

_state = {"replaced": "", "announced": ""}


def install() -> None:
    """Be asked whenever one of Horovod's modules for Keras is imported in this process."""
    sys.meta_path.insert(0, _Finder())


def announce() -> None:
    """Say once, from rank 0, that Horovod's code for Keras was replaced, if it was."""
    context = current_context()
    if context is None or not _state["replaced"] or _state["announced"]:
        return
    _state["announced"] = "yes"
    if context.spec.rank == 0:
        log_to_driver(
            f"HorovodRunner: with Keras {_state['replaced']}, hvd.DistributedOptimizer, load_model "
            "and the callbacks are those of horovodrunner.keras, because Horovod's own do not "
            f"average gradients ({KERAS_SWITCH}=horovod brings them back)"
        )


class _Finder:
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _OF_TENSORFLOW and fullname not in _OF_KERAS + _CALLBACKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _Loader(spec.loader))
        return spec


class _Loader:
    def __init__(self, horovods: Loader) -> None:
        self._horovods = horovods

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._horovods.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if os.environ.get(KERAS_SWITCH, "").lower() == "horovod":
            self._horovods.exec_module(module)
        elif name == _OF_TENSORFLOW:
            self._horovods.exec_module(module)
            _take_keras_variables(module)
        elif _uses_keras_2():
            self._horovods.exec_module(module)
            if name.startswith(_OF_TENSORFLOW):
                # What Horovod took is Keras 3's, which lacks most of what its callbacks call.
                module.K = importlib.import_module("tensorflow").keras.backend  # type: ignore[attr-defined]
            else:
                # There "keras" is Keras 3, even when TensorFlow's is not.
                right = name.replace("horovod", _OF_TENSORFLOW)
                _take_names(module, importlib.import_module(right))
        else:
            self._execute_for_keras_3(module)
            announce()

    def _execute_for_keras_3(self, module: ModuleType) -> None:
        ours = importlib.import_module("horovodrunner.keras")
        keras = importlib.import_module("keras")
        is_main = module.__name__ in _OF_KERAS
        if keras.backend.backend() == "tensorflow":
            self._horovods.exec_module(module)
        elif is_main:
            _take_names(module, importlib.import_module("horovod.torch"))
            module.callbacks = importlib.import_module(f"{module.__name__}.callbacks")  # type: ignore[attr-defined]
        for name in ("DistributedOptimizer", "load_model") if is_main else ours.__all__:
            setattr(module, name, getattr(ours, name))
        _state["replaced"] = f"{keras.__version__} on {keras.backend.backend()}"


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
    """Let what a training loop calls take variables of Keras 3, which are none of TensorFlow's."""
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
    """Give Keras 3's class of variables, if it has been imported."""
    kind = getattr(sys.modules.get("keras"), "Variable", None)
    return () if kind is None else (kind,)
