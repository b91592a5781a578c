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
    │   └── StallTimeoutError       ranks waited for others longer than stall_timeout (TimeoutError)
    ├── RunStoppedError             runner.stop() has ended the run
    ├── RunSupersededError          another driver has taken over the run of this key
    ├── BarrierStageError           Spark lost or cancelled the stage that carried the run
    ├── CheckpointError             a checkpoint could not be fetched, or stored where it had to be
    ├── DataError                   a DataFrame, or what was written of it, cannot feed the ranks
    ├── PredictionError             a model cannot be applied to a row of a DataFrame
    └── HorovodBuildError           Horovod could not be built for the installed frameworks

Every one of them survives pickling, so it can cross a process border, and its text says what
happened, the value seen and what to do next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "BarrierStageError",
    "CheckpointError",
    "ClusterCapacityError",
    "ConfigurationError",
    "DataError",
    "HorovodBuildError",
    "HorovodRunnerError",
    "PayloadError",
    "PredictionError",
    "RunStoppedError",
    "RunSupersededError",
    "StallTimeoutError",
    "StartTimeoutError",
    "WorkerFailedError",
]


class HorovodRunnerError(Exception):
    """The root of everything this package raises on purpose.

    Attributes
    ----------
    attempts : tuple of str
        When a run was restarted: what ended each attempt, the last one included.
    """

    attempts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self._message()

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows: the user's frames, not those of this package."""
        from horovodrunner.flows.outcome.tracebacks import in_cell  # not needed by most processes

        return in_cell(self, self.__str__)

    def _message(self, *, with_traceback: bool = True) -> str:
        text = self._text(with_traceback=with_traceback)
        if self.attempts:
            lines = [f"  attempt {number}: {each}" for number, each in enumerate(self.attempts, 1)]
            text += f"\n\nAll {len(lines)} attempts failed:\n" + "\n".join(lines)
        return text

    def _text(self, *, with_traceback: bool) -> str:
        return super().__str__()


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


class WorkerFailedError(HorovodRunnerError):
    """A rank failed, and the run with it.

    The rank's own exception, when it can be unpickled, is the ``__cause__``.

    Parameters
    ----------
    summary
        One line: what happened.
    rank
        The rank that failed first, or None when it failed before ranks were assigned.
    host
        The host it ran on.
    exit_code
        Its exit code when it left by itself, else None.
    signal
        The signal's name when one ended it, else None.
    traceback
        The worker's own traceback text, or "".
    consequences
        One line for every rank that failed after it.
    worker_was_lost
        Whether the rank's process or its executor was lost, not its code that raised: what
        ``max_restarts`` is for.
    last_lines
        What the rank wrote last to standard error, when its process ended without an exception.
    exception_types
        Qualified names of the class of what main raised and of its bases, in the order of its
        MRO, such as ``"builtins.ConnectionError"``; also where it does not unpickle here.

    Examples
    --------
    >>> error = WorkerFailedError("ValueError: lr < 0", rank=1, host="node-7")
    >>> print(error)
    rank 1 on node-7 failed: ValueError: lr < 0
    >>> error.rank, error.exit_code
    (1, None)
    """

    def __init__(  # noqa: PLR0917 - earlier releases took these by position
        self,
        summary: str,
        rank: int | None = None,
        host: str = "",
        exit_code: int | None = None,
        signal: str | None = None,
        traceback: str = "",
        consequences: tuple[str, ...] = (),
        *,
        worker_was_lost: bool = False,
        last_lines: str = "",
        exception_types: tuple[str, ...] = (),
    ) -> None:
        super().__init__(summary, rank, host, exit_code, signal, traceback, consequences)
        self.summary = summary
        self.rank = rank
        self.host = host
        self.exit_code = exit_code
        self.signal = signal
        self.traceback = traceback
        self.consequences = consequences
        self.worker_was_lost = worker_was_lost
        self.last_lines = last_lines
        self.exception_types = exception_types

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows: the rank's traceback first, and then what else is known."""
        from horovodrunner.flows.outcome.tracebacks import in_cell

        traceback = f"On rank {self.rank}:\n{self.traceback.rstrip()}" if self.traceback else ""
        return in_cell(self, lambda: self._message(with_traceback=False), traceback)

    def _text(self, *, with_traceback: bool) -> str:
        who = "the run" if self.rank is None else f"rank {self.rank}"
        where = f" on {self.host}" if self.host else ""
        parts = [f"{who}{where} failed: {self.summary}"]
        if self.traceback and with_traceback:
            parts.append(f"The worker's traceback:\n{self.traceback.rstrip()}")
        if self.last_lines:
            parts.append(f"What it wrote last to standard error:\n{self.last_lines}")
        if self.consequences:
            parts.append("After that:\n" + "\n".join(f"  {line}" for line in self.consequences))
        return "\n\n".join(parts)


class StallTimeoutError(WorkerFailedError, TimeoutError):
    """Ranks waited in a collective, or did not answer, for longer than ``stall_timeout`` seconds.

    As :class:`WorkerFailedError`; ``rank`` is the first rank that the others waited for.

    Parameters
    ----------
    stacks
        Every rank's Python stack when the time was up, by rank.
    """

    def __init__(
        self, summary: str, *args: Any, stacks: Mapping[int, str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(summary, *args, **kwargs)
        self.stacks = dict(stacks or {})

    def _text(self, *, with_traceback: bool) -> str:
        stacks = [f"Stack of rank {rank}:\n{text.rstrip()}" for rank, text in self.stacks.items()]
        return "\n\n".join([super()._text(with_traceback=with_traceback), *stacks])


class RunStoppedError(HorovodRunnerError):
    """The run was ended from the driver: by ``stop()``, or by SIGTERM with ``sigterm_grace``.

    Parameters
    ----------
    text
        What happened, and what is left.
    reason
        What ``stop`` was given, or ``"SIGTERM"``.

    Examples
    --------
    >>> RunStoppedError("no progress: the run of 2 ranks was stopped", reason="no progress").reason
    'no progress'
    """

    def __init__(self, text: str, *, reason: str = "") -> None:
        super().__init__(text)
        self.reason = reason


class RunSupersededError(HorovodRunnerError):
    """Another driver has taken over the run of this ``run_key``.

    This one was thought dead, because it was not heard of for some time. Its value, and what it
    wanted to store since then, are not kept.

    Parameters
    ----------
    text
        What happened.
    host
        Where the other driver is, or "" where that is not known.
    pid
        Its process there, or 0.

    Examples
    --------
    >>> RunSupersededError("pid 7 on node-2 has taken over", host="node-2", pid=7).pid
    7
    """

    def __init__(self, text: str, *, host: str = "", pid: int = 0) -> None:
        super().__init__(text)
        self.host = host
        self.pid = pid


class CheckpointError(HorovodRunnerError):
    """A checkpoint could not be fetched, or could not be stored where it had to be."""


class BarrierStageError(HorovodRunnerError):
    """Spark lost or cancelled the barrier stage that carried the run.

    Parameters
    ----------
    text
        What happened.
    executor_was_lost
        Whether an executor or a task was lost, rather than the job cancelled.
    was_cancelled
        Whether the job was cancelled, in Spark's UI, say.
    """

    def __init__(
        self, text: str, *, executor_was_lost: bool = False, was_cancelled: bool = False
    ) -> None:
        super().__init__(text)
        self.executor_was_lost = executor_was_lost
        self.was_cancelled = was_cancelled


class DataError(HorovodRunnerError):
    """A DataFrame, or what was written of it, cannot feed the ranks."""


class PredictionError(HorovodRunnerError):
    """A model cannot be applied to a row of a DataFrame, or to what it was given."""


class HorovodBuildError(HorovodRunnerError):
    """Horovod could not be fetched, built, installed or verified."""
