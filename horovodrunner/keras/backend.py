"""Horovod for the backend that Keras was imported with. Runs in: the worker."""

from __future__ import annotations

import importlib
from typing import Any

import keras

from horovodrunner.errors import ConfigurationError

__all__ = ["collectives", "hvd"]

if not keras.__version__.startswith("3."):
    raise ConfigurationError(
        f"horovodrunner.keras is for Keras 3, and this is Keras {keras.__version__}: use "
        "horovod.tensorflow.keras, which is right for Keras 2"
    )

_MODULES = {
    "tensorflow": ("horovod.tensorflow", "horovodrunner.keras.collectives_tensorflow"),
    "torch": ("horovod.torch", "horovodrunner.keras.collectives_torch"),
}
if keras.backend.backend() not in _MODULES:
    raise ConfigurationError(
        f"Keras uses the backend {keras.backend.backend()!r}, which Horovod cannot average "
        "gradients for: set KERAS_BACKEND to tensorflow or torch before Keras is imported"
    )

hvd: Any
collectives: Any
hvd, collectives = map(importlib.import_module, _MODULES[keras.backend.backend()])
