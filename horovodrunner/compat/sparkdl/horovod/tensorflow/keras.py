"""For Keras, with or without TensorFlow. Runs in: the worker."""

from horovodrunner.callbacks.keras import LogCallback
from horovodrunner.compat.absent import SPARKDL, refuse_names

__all__ = ["LogCallback"]

__getattr__ = refuse_names(__name__, SPARKDL)
