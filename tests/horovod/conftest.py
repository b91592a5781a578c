"""The rung with real Horovod uses the same two-executor cluster as tests/spark."""

from tests.spark.conftest import spark

__all__ = ["spark"]
