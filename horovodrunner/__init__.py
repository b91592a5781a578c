"""HorovodRunner for every Apache Spark. Runs in: every process."""

from horovodrunner import checkpoint
from horovodrunner.driver.runner import HorovodRunner, SavedCheckpoint
from horovodrunner.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    BarrierStageError,
    CheckpointError,
    ClusterCapacityError,
    ConfigurationError,
    DataError,
    HorovodBuildError,
    HorovodRunnerError,
    PayloadError,
    PredictionError,
    StallTimeoutError,
    StartTimeoutError,
    WorkerFailedError,
)
from horovodrunner.worker.context import log_to_driver

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "BarrierStageError",
    "CheckpointError",
    "ClusterCapacityError",
    "ConfigurationError",
    "DataError",
    "HorovodBuildError",
    "HorovodRunner",
    "HorovodRunnerError",
    "PayloadError",
    "PredictionError",
    "SavedCheckpoint",
    "StallTimeoutError",
    "StartTimeoutError",
    "WorkerFailedError",
    "checkpoint",
    "log_to_driver",
]
