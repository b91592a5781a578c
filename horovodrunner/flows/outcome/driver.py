"""From a run's outcome to its value or its error. Runs in: the driver."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from horovodrunner.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    HorovodRunnerError,
    PayloadError,
    StallTimeoutError,
    WorkerFailedError,
)
from horovodrunner.flows.outcome.outcome import Failure, FailureKind, Outcome
from horovodrunner.formatting import format_bytes, in_one_line
from horovodrunner.pickling.buffers import BufferedPickle, loads

__all__ = ["open_outcome", "open_result"]

_KINDS: dict[FailureKind, type[HorovodRunnerError]] = {
    FailureKind.STORAGE: CheckpointError,
    FailureKind.RESULT: PayloadError,
    FailureKind.DATA: DataError,
}


def open_outcome(outcome: Outcome) -> Any:
    """Return rank 0's value, unpickled, or raise what ended the run."""
    if outcome.success is not None:
        if outcome.success.result is None:
            raise PayloadError("the run ended well, but what rank 0 returned did not come")
        return open_result(outcome.success.result)
    failure = outcome.failure
    if failure is None:
        raise HorovodRunnerError("the run was stopped before it had an outcome")
    cause = _unpickled_exception(failure)
    if isinstance(cause, PayloadError):
        raise PayloadError(_of_rank(failure, str(cause))) if failure.rank else cause
    if (kind := _KINDS.get(failure.kind)) is not None:
        raise kind(_of_rank(failure, failure.summary))
    if failure.rank is None and not failure.traceback:
        raise ConfigurationError(failure.summary)  # found before any rank was there
    raise _worker_failure(failure, outcome.consequences) from cause


def _of_rank(failure: Failure, text: str) -> str:
    return f"rank {failure.rank}: {text}" if failure.rank else text  # else it is about rank 0


def _worker_failure(failure: Failure, consequences: tuple[Failure, ...]) -> WorkerFailedError:
    facts: dict[str, Any] = {
        "rank": failure.rank,
        "host": failure.host,
        "exit_code": failure.exit_code,
        "signal": failure.signal,
        "traceback": failure.traceback,
        "consequences": tuple(
            f"rank {other.rank} on {other.host}: {other.summary}" for other in consequences
        ),
        "worker_was_lost": failure.kind in {FailureKind.PROCESS, FailureKind.LOST},
        "last_lines": failure.last_lines,
        "exception_types": failure.exception_types,
    }
    if failure.kind is FailureKind.STALL:
        stacks = {int(rank): text for rank, text in failure.stacks.items()}
        return StallTimeoutError(failure.summary, **facts, stacks=stacks)
    return WorkerFailedError(failure.summary, **facts)


def open_result(result: BufferedPickle, rank: int = 0) -> Any:
    """Unpickle what a rank returned; a PayloadError says where its bytes are kept if it fails."""
    try:
        return result.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # unpickling runs the classes' own code
        name, is_missing = result.obstacle()
        text = f"what rank {rank} returned cannot be unpickled here: {in_one_line(error)}. "
        if is_missing:
            text += f"It needs {name}, which cannot be imported here. "
            remedy = "make the class importable on the driver and"
        else:
            text += f"It fails where {name} is restored. " if name else ""
            remedy = "once that can be restored,"
        raise PayloadError(f"{text}{_keep(result, remedy)}, or return plain data") from error


def _keep(result: BufferedPickle, remedy: str) -> str:
    """Write bytes that may have taken days to compute to a file, and name it in a sentence."""
    size = format_bytes(result.size)
    try:
        descriptor, path = tempfile.mkstemp(prefix="horovodrunner-result-", suffix=".pkl")
        with os.fdopen(descriptor, "wb") as file:
            result.keep(file)
    except OSError as error:
        return f"Its {size} could not be kept in {tempfile.gettempdir()} ({error.strerror})"
    return (
        f"Its {size} are kept in {path}: {remedy} read them with pickle.load(open({path!r}, 'rb'))"
    )


def _unpickled_exception(failure: Failure) -> BaseException | None:
    if not failure.exception:
        return None
    try:
        error = loads(failure.exception)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - its text and traceback are in the failure
        return None
    return error if issubclass(type(error), BaseException) else None
