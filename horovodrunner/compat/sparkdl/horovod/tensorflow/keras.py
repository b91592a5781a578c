"""For Keras, with or without TensorFlow. Runs in: the worker."""

from horovodrunner.callbacks.keras import LogCallback

__all__ = ["LogCallback"]
