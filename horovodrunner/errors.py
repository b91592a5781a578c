"""The public error tree. Runs in: every process.

::

    HorovodRunnerError
    ├── ConfigurationError          something asked for cannot work; nothing was launched
    │   ├── ArgumentTypeError       ... also a TypeError
    │   └── ArgumentValueError      ... also a ValueError
    ├── ClusterCapacityError        the cluster has fewer slots than np
    ├── StartTimeoutError           the slots were not free in time (also a TimeoutError)
    ├── PayloadError                main, an argument or a result cannot be pickled or unpickled
    ├── WorkerFailedError           a rank failed: rank, host, exit code or signal, traceback
    ├── BarrierStageError           Spark lost or cancelled the stage that carried the run
    └── HorovodBuildError           Horovod could not be built for the installed frameworks

Every one of them survives pickling, so it can cross a process border, and its text says what
happened, the value seen and what to do next.
"""

from __future__ import annotations

import signal as signal_module

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "BarrierStageError",
    "ClusterCapacityError",
    "ConfigurationError",
    "HorovodBuildError",
    "HorovodRunnerError",
    "PayloadError",
    "StartTimeoutError",
    "WorkerFailedError",
]


class HorovodRunnerError(Exception):
    """The root of everything this package raises on purpose."""


class ConfigurationError(HorovodRunnerError):
    """An argument, a setting or the environment cannot work; nothing was launched."""


class ArgumentTypeError(ConfigurationError, TypeError):
    """An argument has the wrong type."""


class ArgumentValueError(ConfigurationError, ValueError):
    """An argument has the right type and a value that cannot work."""


class ClusterCapacityError(HorovodRunnerError):
    """The cluster has fewer task slots than the run asks for."""


class StartTimeoutError(HorovodRunnerError, TimeoutError):
    """The run's tasks did not all start within ``start_timeout`` seconds."""


class PayloadError(HorovodRunnerError):
    """``main``, one of its arguments or its result cannot be pickled or unpickled."""


class BarrierStageError(HorovodRunnerError):
    """Spark lost or cancelled the barrier stage that carried the run."""


class HorovodBuildError(HorovodRunnerError):
    """Horovod could not be fetched, built, installed or verified."""
