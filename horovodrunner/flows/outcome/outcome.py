"""How a rank, or the run, ended. Runs in: every process."""

from __future__ import annotations

import enum
from base64 import b64decode, b64encode
from dataclasses import asdict, dataclass, field, replace
from json import dumps, loads  # main may put others in their place in json
from typing import Any

from horovodrunner.pickling.buffers import BufferedPickle, Layout
from horovodrunner.wire.events import FrameError

__all__ = [
    "Failure",
    "FailureKind",
    "Outcome",
    "Success",
    "speaks_of_peer_loss",
    "with_result",
]

_PEER_LOSS_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Horovod has been shut down",
)


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
    """What a rank's main returned does not reach the driver."""
    SETUP = "setup"
    """The run's own machinery failed, or refused to start."""


@dataclass(frozen=True)
class Failure:
    """How one rank failed, in plain data; rank None before ranks were assigned."""

    rank: int | None
    host: str
    summary: str
    kind: FailureKind = FailureKind.SETUP
    traceback: str = ""
    exit_code: int | None = None
    signal: str | None = None
    exception_types: tuple[str, ...] = ()
    """The class of the exception and its bases, in the order of the MRO."""
    exception: bytes = field(default=b"", repr=False)
    """BufferedPickle, or b"" when it does not pickle."""
    after_peer_loss: bool = False
    """Whether the text says that a peer went away: probably a symptom of another failure."""
    collective: str = ""
    stacks: dict[str, str] = field(default_factory=dict, repr=False)
    """Every rank's Python stack, by rank, when the run stalled."""
    last_lines: str = ""
    """What a worker that left without a word wrote last to standard error."""


@dataclass(frozen=True)
class Success:
    """A rank's main returned; `layout` is that of its result file, empty where none is wanted."""

    rank: int
    layout: Layout = field(default=(), repr=False)
    result: BufferedPickle | None = field(default=None, repr=False, compare=False)
    """Rank 0's pickled return value, on the driver."""


@dataclass(frozen=True)
class Outcome:
    """A rank's success, or why the run failed; neither of the two when the rank was stopped."""

    success: Success | None = None
    failure: Failure | None = None
    consequences: tuple[Failure, ...] = ()
    """What other ranks reported after the first cause."""

    def to_bytes(self) -> bytes:
        """Encode the outcome without a pickled return value, which travels by itself."""
        if self.success is not None:
            return dumps({"rank": self.success.rank, "layout": self.success.layout}).encode()
        failures = [f for f in (self.failure, *self.consequences) if f is not None]
        fields = [asdict(f) | {"exception": b64encode(f.exception).decode()} for f in failures]
        return dumps({"failures": fields}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Outcome:
        """Read what :meth:`to_bytes` wrote; a FrameError if it is something else."""
        try:
            fields = loads(data)
            if "rank" in fields:
                return cls(success=Success(int(fields["rank"]), tuple(map(int, fields["layout"]))))
            failures = tuple(map(_failure, fields["failures"]))
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise FrameError(f"an outcome that cannot be read: {error!r:.200}") from None
        return cls(failure=failures[0], consequences=failures[1:]) if failures else cls()


def _failure(fields: dict[str, Any]) -> Failure:
    fields["kind"] = FailureKind(fields["kind"])
    fields["exception_types"] = tuple(fields["exception_types"])
    fields["exception"] = b64decode(fields["exception"])
    return Failure(**fields)


def speaks_of_peer_loss(text: str) -> bool:
    """Return whether Horovod, Gloo, NCCL or the system says in a text that a peer went away.

    >>> speaks_of_peer_loss("[pair.cc:617] Connection closed by peer [10.0.0.4]:57596")
    True
    >>> speaks_of_peer_loss("connect to [10.0.0.4]:57596: No route to host")
    False
    """
    return any(words in text for words in _PEER_LOSS_TEXTS)


def with_result(outcome: Outcome, result: BufferedPickle | None) -> Outcome:
    """Put rank 0's result, which came by itself, into its success, unless it has one."""
    if outcome.success is None or outcome.success.result is not None:
        return outcome
    return Outcome(replace(outcome.success, result=result))
