"""What main() can ask for. Runs in: the worker."""

from horovodrunner import log_to_driver
from horovodrunner.compat.absent import SPARKDL, refuse_names

__all__ = ["log_to_driver"]

__getattr__ = refuse_names(__name__, SPARKDL)
