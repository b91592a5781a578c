"""From a run's outcome to its value or its error. Runs in: the driver."""

from __future__ import annotations

import os
import pickletools
import tempfile
from typing import Any

from horovodrunner.core import payload
from horovodrunner.core.job import Failure, FailureKind, Outcome
from horovodrunner.errors import (
    CheckpointError,
    ConfigurationError,
    HorovodRunnerError,
    PayloadError,
    StallTimeoutError,
    WorkerFailedError,
)

__all__ = ["open_outcome"]


def open_outcome(outcome: Outcome) -> Any:
    """Give rank 0's value, or raise what ended the run.

    Parameters
    ----------
    outcome
        What the run handed back.

    Returns
    -------
    object
        The value, unpickled.

    Raises
    ------
    PayloadError
        If the value cannot be unpickled here; its bytes are kept in a file then.
    WorkerFailedError
        If a rank failed.
    StallTimeoutError
        If the ranks waited for each other too long.
    CheckpointError
        If a checkpoint could not be stored and that was to end the run.
    ConfigurationError
        If the tasks found that the run could not start.
    """
    if outcome.success is not None:
        return _open_result(outcome.success.result)
    failure = outcome.failure
    if failure is None:
        raise HorovodRunnerError("the run was stopped before it had an outcome")
    cause = _unpickled_exception(failure)
    if isinstance(cause, PayloadError):
        raise cause
    if failure.kind is FailureKind.STORAGE:
        raise CheckpointError(failure.summary)
    if failure.kind is FailureKind.SETUP and not failure.traceback:
        raise ConfigurationError(failure.summary)  # found before any rank was there
    raise _worker_failure(failure, outcome.consequences) from cause


def _worker_failure(failure: Failure, consequences: tuple[Failure, ...]) -> WorkerFailedError:
    kind = StallTimeoutError if failure.kind is FailureKind.STALL else WorkerFailedError
    error = kind(
        failure.summary,
        rank=failure.rank,
        host=failure.host,
        exit_code=failure.exit_code,
        signal=failure.signal,
        traceback=failure.traceback,
        consequences=tuple(
            f"rank {other.rank} on {other.host}: {other.summary}" for other in consequences
        ),
    )
    error.worker_was_lost = failure.kind in {FailureKind.PROCESS, FailureKind.LOST}
    if isinstance(error, StallTimeoutError):
        error.stacks = {int(rank): text for rank, text in failure.stacks.items()}
    return error


def _open_result(data: bytes | bytearray | memoryview) -> Any:
    try:
        return payload.load(data)
    except Exception as error:
        path = _keep(data)
        named = _classes_that_are_missing(data)
        raise PayloadError(
            f"what rank 0 returned cannot be unpickled here: {type(error).__name__}: {error}. "
            + (f"It needs {named}, which cannot be imported here. " if named else "")
            + f"Its {payload.format_bytes(len(data))} are kept in {path}: make the class "
            f"importable on the driver and read them with pickle.load(open({path!r}, 'rb')), or "
            "return plain data"
        ) from error


def _keep(data: bytes | bytearray | memoryview) -> str:
    """Put bytes that may have taken days to compute where the user finds them."""
    descriptor, path = tempfile.mkstemp(prefix="horovodrunner-result-", suffix=".pkl")
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return path


def _classes_that_are_missing(data: bytes | bytearray | memoryview) -> str:
    """List what a pickle refers to by name and cannot be found here."""
    strings: list[str] = []
    missing: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(bytes(data)):
            if opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                module, name = strings[-2:]
                if not _can_import(module, name) and f"{module}.{name}" not in missing:
                    missing.append(f"{module}.{name}")
            elif isinstance(argument, str):
                strings.append(argument)
    except ValueError:
        return ""  # not a pickle at all
    return ", ".join(missing[:3])


def _can_import(module: str, name: str) -> bool:
    try:
        found: Any = __import__(module, fromlist=["_"])
        for part in name.split("."):
            found = getattr(found, part)
    except Exception:  # noqa: BLE001 - importing runs arbitrary code
        return False
    return True


def _unpickled_exception(failure: Failure) -> BaseException | None:
    if not failure.exception:
        return None
    try:
        error = payload.load(failure.exception)
    except Exception:  # noqa: BLE001 - its text and traceback are in the failure
        return None
    return error if isinstance(error, BaseException) else None
