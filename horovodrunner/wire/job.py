"""The data that travels in one run: one frozen dataclass per hop. Runs in: every process.

::

    driver ──JobSpec──▶ task ──WorkerSpec──▶ worker
    driver ◀──Outcome── task ◀──Outcome───── worker
"""

from __future__ import annotations

import enum
import signal
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from json import dumps, loads  # main may put others in their place in json
from typing import TYPE_CHECKING, Any

from horovodrunner.flows.call.import_path import ImportPath
from horovodrunner.pickling.buffers import BufferedPickle, Layout, reader_of_pieces

if TYPE_CHECKING:
    from horovodrunner.flows.call.record import RunRecord

__all__ = [
    "EXIT_WITHOUT_PIPES",
    "STACK_SIGNAL",
    "Failure",
    "FailureKind",
    "JobSpec",
    "Outcome",
    "Success",
    "WorkerSpec",
    "join_chunks",
    "speaks_of_peer_loss",
    "split_chunks",
    "with_result",
]

EXIT_WITHOUT_PIPES = 113
"""A worker leaves with it when main has closed the descriptors by which it talks to its task."""

STACK_SIGNAL = int(getattr(signal, "SIGRTMIN", signal.SIGUSR1)) + 1
"""Makes a worker write its Python stacks; a number that training code has no habit of using."""

_HEADER_LENGTH = struct.Struct(">Q")

_PEER_LOSS_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Horovod has been shut down",
)


@dataclass(frozen=True)
class JobSpec:
    """What the driver tells every task of one run.

    Parameters
    ----------
    run_id
        Names the run in logs and in the driver channel.
    size
        Number of ranks.
    payload
        The cloudpickled ``(main, kwargs)``.
    early_imports
        Modules the worker may import before it knows its rank.
    environment
        The driver's environment variables that the workers get.
    import_path
        The driver's; what exists on the executor has the same place in the worker's.
    token
        32 random bytes that prove, on every connection of this run, that the peer belongs to it.
    driver_address
        Host and port of the driver channel.
    stream_output
        Whether the workers' output goes to the driver, not only ``log_to_driver`` messages.
    shares_terminal
        Whether the tasks' own log is the driver's terminal.
    max_result_bytes
        The largest pickled result that Spark takes back, or None for no limit.
    attempt
        1 for the first launch, one more for each restart.
    stall_timeout
        Seconds that a rank may wait in one collective before the run fails; None for ever.
    checkpoint_location
        Path on the driver, or URL, where checkpoints are kept; None when there is none.
    keep_checkpoints
        How many of them are kept.
    record
        What the run is called with, for those that go on from its checkpoints; None when it keeps
        none.
    fail_on_checkpoint_error
        Whether a checkpoint that cannot be stored ends the run.
    brought_files
        Variables of Horovod's that name a file which it writes on rank 0's host and which the
        driver gets.
    ports
        First and last port that tasks may listen on, or None for any that is free.
    tf_config
        Whether every rank gets ``TF_CONFIG``.
    keep_warm
        Whether workers are forked from a process that keeps the frameworks imported.
    versions
        What is installed on the driver, by name.
    """

    run_id: str
    size: int
    payload: bytes = field(repr=False)
    token: bytes = field(repr=False)
    early_imports: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    import_path: ImportPath = field(default_factory=ImportPath)
    driver_address: tuple[str, int] | None = None
    stream_output: bool = False
    shares_terminal: bool = False
    max_result_bytes: int | None = None
    attempt: int = 1
    stall_timeout: float | None = None
    checkpoint_location: str | None = None
    keep_checkpoints: int = 3
    record: RunRecord | None = field(default=None, repr=False)
    fail_on_checkpoint_error: bool = False
    brought_files: tuple[str, ...] = ()
    ports: tuple[int, int] | None = None
    tf_config: bool = False
    keep_warm: bool = False
    versions: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class WorkerSpec:
    """What a task tells its worker once the slot is known.

    Parameters
    ----------
    rank, host
        Whom failures are reported for.
    environment
        The slot's variables (``HOROVOD_RANK``, ``RANK``, ...).
    return_result
        Whether this worker's return value is wanted; only rank 0's is.
    attempt
        1 for the first launch, one more for each restart.
    scratch
        A directory of the task's, deleted after the run.
    keeps_checkpoints
        Whether checkpoints that main saves are kept.
    beat_seconds
        How often the worker tells where main is.
    """

    rank: int
    host: str
    environment: dict[str, str] = field(repr=False)
    return_result: bool = False
    attempt: int = 1
    scratch: str = ""
    keeps_checkpoints: bool = False
    beat_seconds: float = 5.0

    def to_header(self) -> dict[str, Any]:
        """Give the fields as JSON-compatible data.

        Returns
        -------
        dict
            What :meth:`from_header` takes.
        """
        return asdict(self)

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> WorkerSpec:
        """Read what :meth:`to_header` gave.

        Parameters
        ----------
        header
            The fields by name.

        Returns
        -------
        WorkerSpec
            An equal object.
        """
        return cls(**header)


class FailureKind(str, enum.Enum):
    """What failed, as far as it matters for what to do next."""

    EXCEPTION = "exception"
    """main raised, or could not be called."""
    PROCESS = "process"
    """The worker process ended without an outcome."""
    LOST = "lost"
    """The worker's task, or its executor, is gone."""
    STALL = "stall"
    """The ranks waited for each other for too long."""
    STORAGE = "storage"
    """A checkpoint could not be stored, and the user asked that this ends the run."""
    DATA = "data"
    """The rows that were to travel with the run cannot feed the ranks."""
    RESULT = "result"
    """What rank 0's main returned does not reach the driver."""
    SETUP = "setup"
    """The run's own machinery failed, or refused to start."""


@dataclass(frozen=True)
class Failure:
    """How one rank failed, in plain data that can be shown without unpickling anything.

    Parameters
    ----------
    rank
        The rank, or None when it failed before ranks were assigned.
    host
        The host the rank ran on.
    summary
        One line: what happened.
    kind
        What failed.
    traceback
        The worker's own traceback text, or "".
    exit_code
        The exit code when the worker left by itself, else None.
    signal
        The signal's name when one ended the worker, else None.
    exception_types
        Qualified names of the exception's class and its bases, in the order of its MRO.
    exception
        The pickled exception, or b"" when it does not pickle.
    after_peer_loss
        True when the text says that a peer went away: probably a consequence of another failure.
    collective
        The collective that raised the exception, such as ``"allreduce"``, or "".
    stacks
        Every rank's Python stack, by rank, when the run stalled.
    last_lines
        What a worker that left without a word wrote last to standard error.
    """

    rank: int | None
    host: str
    summary: str
    kind: FailureKind = FailureKind.SETUP
    traceback: str = ""
    exit_code: int | None = None
    signal: str | None = None
    exception_types: tuple[str, ...] = ()
    exception: bytes = field(default=b"", repr=False)
    after_peer_loss: bool = False
    collective: str = ""
    stacks: dict[str, str] = field(default_factory=dict, repr=False)
    last_lines: str = ""


def speaks_of_peer_loss(text: str) -> bool:
    """Tell whether an error's text says that a peer went away, which has a cause elsewhere.

    Parameters
    ----------
    text
        What an exception says, or what a process wrote last to standard error.

    Returns
    -------
    bool
        True if Horovod, Gloo, NCCL or the system is known to say so in these words.

    Examples
    --------
    >>> speaks_of_peer_loss("[pair.cc:617] Connection closed by peer [10.0.0.4]:57596")
    True
    >>> speaks_of_peer_loss("connect to [10.0.0.4]:57596: No route to host")
    False
    """
    return any(words in text for words in _PEER_LOSS_TEXTS)


@dataclass(frozen=True)
class Success:
    """A rank's ``main`` returned.

    Parameters
    ----------
    rank
        The rank.
    layout
        What stands in the task's file of the pickled return value; empty on every rank but 0.
    result
        The pickled return value, on the driver.
    """

    rank: int
    layout: Layout = field(default=(), repr=False)
    result: BufferedPickle | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Outcome:
    """What one task hands back: its rank's success, or why the run failed.

    Parameters
    ----------
    success
        Set when ``main`` returned.
    failure
        The first cause, set when the run failed.
    consequences
        What other ranks reported after the first cause.
    """

    success: Success | None = None
    failure: Failure | None = None
    consequences: tuple[Failure, ...] = ()

    def to_frame(self) -> tuple[dict[str, Any], bytes]:
        """Split the outcome into a JSON-compatible header and one body of bytes.

        Texts are in the body: those of many ranks are more than a header may have. A pickled
        return value is no part of it.

        Returns
        -------
        tuple of dict and bytes
            What :meth:`from_frame` takes.
        """
        if self.success is not None:
            return {"rank": self.success.rank, "layout": self.success.layout}, b""
        failures = [f for f in (self.failure, *self.consequences) if f is not None]
        fields = [{k: v for k, v in asdict(f).items() if k != "exception"} for f in failures]
        parts = [dumps(fields).encode(), *(f.exception for f in failures)]
        return {"sizes": [len(part) for part in parts]}, b"".join(parts)

    @classmethod
    def from_frame(cls, header: dict[str, Any], body: bytes | bytearray | memoryview) -> Outcome:
        """Read what :meth:`to_frame` gave.

        Parameters
        ----------
        header
            JSON-compatible fields.
        body
            The failures as JSON, and their pickled exceptions, one after another.

        Returns
        -------
        Outcome
            An equal object.
        """
        if "rank" in header:
            return cls(success=Success(header["rank"], tuple(header["layout"])))
        parts, start = [], 0
        for size in header["sizes"]:
            parts.append(bytes(body[start : start + size]))
            start += size
        failures = []
        for fields, exception in zip(loads(parts[0]), parts[1:], strict=True):
            kind = FailureKind(fields.pop("kind"))
            types = tuple(fields.pop("exception_types"))
            failures.append(
                Failure(**fields, kind=kind, exception_types=types, exception=exception)
            )
        if not failures:
            return cls()
        return cls(failure=failures[0], consequences=tuple(failures[1:]))


def with_result(outcome: Outcome, result: BufferedPickle | None) -> Outcome:
    """Put rank 0's pickled return value, which came by itself, into its outcome.

    Parameters
    ----------
    outcome
        How the run ended.
    result
        What came, if anything did.

    Returns
    -------
    Outcome
        The outcome; one that is no success, or has its result, is left as it is.
    """
    if outcome.success is None or outcome.success.result is not None:
        return outcome
    return Outcome(replace(outcome.success, result=result))


def split_chunks(
    outcome: Outcome, chunk_bytes: int, result: Iterable[bytes] = ()
) -> Iterator[bytes | memoryview]:
    """Cut an outcome into pieces that fit a row.

    Parameters
    ----------
    outcome
        What to send.
    chunk_bytes
        Most bytes per piece.
    result
        The pickled return value in such pieces, if it is to go this way.

    Yields
    ------
    bytes
        First the header, then the body in pieces of at most `chunk_bytes`, or the result.
    """
    header, body = outcome.to_frame()
    encoded = dumps(header).encode()
    yield _HEADER_LENGTH.pack(len(encoded)) + encoded
    view = memoryview(body)
    for start in range(0, len(view), chunk_bytes):
        yield view[start : start + chunk_bytes]
    if outcome.success is not None:
        yield from result


def join_chunks(chunks: Iterable[bytes]) -> Outcome:
    """Put the pieces of :func:`split_chunks` together.

    Parameters
    ----------
    chunks
        The pieces in order.

    Returns
    -------
    Outcome
        The outcome that was split, with its result if that came this way.
    """
    head, *pieces = chunks
    (length,) = _HEADER_LENGTH.unpack_from(head)
    header = loads(head[_HEADER_LENGTH.size : _HEADER_LENGTH.size + length])
    if "layout" not in header:
        return Outcome.from_frame(header, b"".join(pieces))
    outcome = Outcome.from_frame(header, b"")
    if not pieces:
        return outcome
    result = BufferedPickle(tuple(header["layout"]))
    result.fill(reader_of_pieces(pieces))
    return with_result(outcome, result)
