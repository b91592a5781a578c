"""Check the arguments, choose cluster or local, return or raise. Runs in: the driver."""

from __future__ import annotations

import inspect
import operator
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from horovodrunner.core import payload
from horovodrunner.core.env import forwarded_environment
from horovodrunner.core.job import Failure, JobSpec, Outcome
from horovodrunner.driver.console import Console
from horovodrunner.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ConfigurationError,
    HorovodRunnerError,
    PayloadError,
    WorkerFailedError,
)

__all__ = ["HorovodRunner"]

VERBOSITIES = ("all", "log_callback_only")
TOKEN_BYTES = 32


class HorovodRunner:
    """Runs a training function on every rank of a Horovod job, on Spark or on this machine.

    The interface and its behaviour are those documented for Databricks' HorovodRunner.

    Parameters
    ----------
    np
        Number of ranks. Positive: tasks of a Spark barrier stage, one slot each, on the active
        SparkSession (one is created when there is none). Negative: ``-np`` processes on this
        machine, without Spark, for debugging. 0: all slots of the cluster; deprecated.
    driver_log_verbosity
        ``"log_callback_only"``: only what :func:`horovodrunner.log_to_driver` is given is shown
        here. ``"all"``: everything the ranks print is, while it happens. A negative np always
        shows all.
    start_timeout
        Seconds that the Spark tasks may take to start.

    Raises
    ------
    ArgumentTypeError
        If np is not an int (a bool is not), or the timeout not a number.
    ArgumentValueError
        If the verbosity is none of the two, or the timeout not more than 0.

    Examples
    --------
    >>> from horovodrunner import HorovodRunner
    >>> def main(greeting):
    ...     import horovod.torch as hvd
    ...     hvd.init()
    ...     return f"{greeting} from rank {hvd.rank()} of {hvd.size()}"
    >>> HorovodRunner(np=-2).run(main, greeting="Hello")  # doctest: +SKIP
    'Hello from rank 0 of 2'
    """

    def __init__(
        self,
        *,
        np: int,
        driver_log_verbosity: str = "log_callback_only",
        start_timeout: float = 600.0,
    ) -> None:
        self._np = _checked_np(np)
        if driver_log_verbosity not in VERBOSITIES:
            raise ArgumentValueError(
                f"driver_log_verbosity={driver_log_verbosity!r}: it must be "
                f"{VERBOSITIES[0]!r} or {VERBOSITIES[1]!r}"
            )
        if isinstance(start_timeout, bool) or not isinstance(start_timeout, (int, float)):
            raise ArgumentTypeError(
                f"start_timeout={start_timeout!r}: it must be a number of seconds"
            )
        if not start_timeout > 0:
            raise ArgumentValueError(
                f"start_timeout={start_timeout!r}: it must be more than 0 seconds"
            )
        self._verbosity = driver_log_verbosity
        self._start_timeout = float(start_timeout)

    def run(self, main: Callable[..., Any], **kwargs: Any) -> Any:
        """Run ``main(**kwargs)`` once on every rank and give back what rank 0 returned.

        Parameters
        ----------
        main
            The training function; it and its arguments travel by cloudpickle.
        **kwargs
            Its keyword arguments.

        Returns
        -------
        object
            Rank 0's return value; the other ranks' are dropped.

        Raises
        ------
        ArgumentTypeError
            If main is not callable or does not accept the arguments.
        PayloadError
            If main, an argument or the result cannot be pickled.
        ConfigurationError
            If the executors or this machine lack Horovod, or Spark's settings rule the run out.
        ClusterCapacityError
            If the cluster has fewer slots than np.
        StartTimeoutError
            If the tasks do not start within ``start_timeout``.
        WorkerFailedError
            If a rank fails; its own exception is the ``__cause__``.
        BarrierStageError
            If Spark lost or cancelled the run's stage.
        """
        _check_main(main, kwargs)
        call = payload.dump_call(main, kwargs)
        console = Console()
        self._announce(console, main, kwargs, call)
        job = JobSpec(
            run_id=secrets.token_hex(4),
            size=abs(self._np),
            payload=call,
            token=secrets.token_bytes(TOKEN_BYTES),
            early_imports=payload.early_imports(main, call),
            environment=forwarded_environment(os.environ),
            sys_path=tuple(os.path.abspath(entry) for entry in sys.path),  # noqa: PTH100
            stream_output=self._verbosity == "all" or self._np < 0,
        )
        outcome = (
            self._run_locally(job, console) if self._np < 0 else self._run_on_spark(job, console)
        )
        return _open_outcome(outcome)

    def _run_locally(self, job: JobSpec, console: Console) -> Outcome:
        from horovodrunner.driver.local import run_locally

        return run_locally(job, console)

    def _run_on_spark(self, job: JobSpec, console: Console) -> Outcome:
        from horovodrunner.driver import session
        from horovodrunner.driver.cluster import BarrierRun

        console.show(0)
        if self._np == 0:
            warnings.warn(
                "np=0 (all slots) is deprecated: give the number of ranks",
                DeprecationWarning,
                stacklevel=3,
            )
        spark = session.find_session()
        size = session.require_slots(spark, self._np)
        job = replace(
            job,
            size=size,
            max_result_bytes=session.max_result_bytes(spark),
            shares_terminal=session.shares_terminal(spark),
        )
        return BarrierRun(spark, job, console, self._start_timeout).run()

    def _announce(
        self,
        console: Console,
        main: Callable[..., Any],
        kwargs: Mapping[str, Any],
        call: bytes,
    ) -> None:
        if self._np < 0:
            mode = "on this machine, for debugging; all output of the ranks is shown here"
        elif self._verbosity == "all":
            mode = (
                "on Spark; all output of the ranks is shown here "
                '(driver_log_verbosity="log_callback_only" shows only log_to_driver messages)'
            )
        else:
            mode = (
                "on Spark; only log_to_driver messages are shown here "
                '(driver_log_verbosity="all" shows all output of the ranks)'
            )
        ranks = "all slots" if self._np == 0 else f"{abs(self._np)} rank{'s' * (abs(self._np) > 1)}"
        console.note(f"{ranks} {mode}")
        console.note(f"the pickled main and its arguments have {payload.format_bytes(len(call))}")
        if len(call) > payload.WARN_BYTES:
            parts = payload.largest_parts(main, kwargs, at_least_bytes=payload.WARN_BYTES // 10)
            named = "; ".join(f"{where} ({payload.format_bytes(size)})" for where, size in parts)
            warnings.warn(
                f"the pickled main and its arguments have {payload.format_bytes(len(call))}, "
                "which every executor has to fetch"
                + (f". Largest: {named}" if named else "")
                + ". Load large data inside main instead",
                stacklevel=3,
            )


def _checked_np(np: Any) -> int:
    if isinstance(np, bool):
        raise ArgumentTypeError(f"np={np!r}: it must be an int, not a bool")
    try:
        return operator.index(np)
    except TypeError:
        raise ArgumentTypeError(f"np={np!r}: it must be an int, got {type(np).__name__}") from None


def _check_main(main: Any, kwargs: Mapping[str, Any]) -> None:
    if not callable(main):
        hint = "pass the function itself, not what it returns: run(train), not run(train())"
        raise ArgumentTypeError(
            f"main must be a function, got {type(main).__name__} ({main!r:.80}): {hint}"
        )
    try:
        signature = inspect.signature(main)
    except (TypeError, ValueError):
        return  # a builtin or an extension function does not tell
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        name = getattr(main, "__qualname__", type(main).__qualname__)
        given = "the arguments " + ", ".join(map(repr, kwargs)) if kwargs else "no arguments"
        takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        unknown = [] if takes_any else [k for k in kwargs if k not in signature.parameters]
        also = f"; it has no argument {', '.join(map(repr, unknown))}" if unknown else ""
        raise ArgumentTypeError(
            f"{name}{signature} cannot be called with {given}: {error}{also}"
        ) from None


def _open_outcome(outcome: Outcome) -> Any:
    if outcome.success is not None:
        try:
            return payload.load(outcome.success.result)
        except Exception as error:
            raise PayloadError(
                f"what rank 0 returned cannot be unpickled here: {type(error).__name__}: {error}. "
                "Its class must be importable on the driver as well, or return plain data"
            ) from error
    if outcome.failure is None:
        raise HorovodRunnerError("the run was stopped before it had an outcome")
    cause = _unpickled_exception(outcome.failure)
    if isinstance(cause, PayloadError):
        raise cause
    failure = outcome.failure
    if failure.rank is None and not failure.traceback:
        raise ConfigurationError(failure.summary)  # found before any rank was there
    raise WorkerFailedError(
        failure.summary,
        rank=failure.rank,
        host=failure.host,
        exit_code=failure.exit_code,
        signal=failure.signal,
        traceback=failure.traceback,
        consequences=tuple(
            f"rank {other.rank} on {other.host}: {other.summary}" for other in outcome.consequences
        ),
    ) from cause


def _unpickled_exception(failure: Failure) -> BaseException | None:
    if not failure.exception:
        return None
    try:
        error = payload.load(failure.exception)
    except Exception:  # noqa: BLE001 - its text and traceback are in the failure
        return None
    return error if isinstance(error, BaseException) else None
