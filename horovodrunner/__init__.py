"""HorovodRunner for every Apache Spark. Runs in: every process."""

from horovodrunner.driver.runner import HorovodRunner
from horovodrunner.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    BarrierStageError,
    ClusterCapacityError,
    ConfigurationError,
    HorovodBuildError,
    HorovodRunnerError,
    PayloadError,
    StartTimeoutError,
    WorkerFailedError,
)
from horovodrunner.worker.context import log_to_driver

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "BarrierStageError",
    "ClusterCapacityError",
    "ConfigurationError",
    "HorovodBuildError",
    "HorovodRunner",
    "HorovodRunnerError",
    "PayloadError",
    "StartTimeoutError",
    "WorkerFailedError",
    "log_to_driver",
]
