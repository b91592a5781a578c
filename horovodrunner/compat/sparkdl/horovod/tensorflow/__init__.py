"""For TensorFlow. Runs in: the worker."""

from horovodrunner.compat.absent import SPARKDL, refuse_names

__getattr__ = refuse_names(__name__, SPARKDL)
