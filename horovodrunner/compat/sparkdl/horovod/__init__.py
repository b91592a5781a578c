"""What main() can ask for. Runs in: the worker."""

from horovodrunner import log_to_driver

__all__ = ["log_to_driver"]
