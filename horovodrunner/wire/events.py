"""Every message of a run, and how it is encoded. Runs in: every process.

A frame is the lengths of a header and a body, the header (a JSON object: the kind of event and its
fields), and the body (its one field of bytes, if it has any). Nothing here unpickles.
"""

from __future__ import annotations

import functools
import struct
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from json import dumps, loads  # main may put others in their place in json
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: object) -> Callable[[type], type]:
        """Do at run time nothing of what it tells type checkers."""
        return lambda decorated: decorated


__all__ = [
    "MAX_BODY_BYTES",
    "MAX_HEADER_BYTES",
    "PREFIX_BYTES",
    "Event",
    "FrameError",
    "Handlers",
    "Sink",
    "decode",
    "dispatcher",
    "encode",
    "ignore",
    "parse_prefix",
    "refuse",
]

MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024

_PREFIX = struct.Struct(">IQ")
PREFIX_BYTES = _PREFIX.size
_BYTES = (bytes, bytearray, memoryview)
_Event = TypeVar("_Event", bound="Event")


class FrameError(ValueError):
    """The bytes are not an event, or one that is larger than allowed."""


@dataclass_transform(frozen_default=True)
class Event:
    """A message; a field may be an int, float, bool or str, a tuple or dict of them, or bytes.

    Subclasses are frozen dataclasses to the reader and the type checker. They are made by hand,
    because each would take every worker half a millisecond to make.
    """

    kinds: ClassVar[dict[str, type[Event]]] = {}

    def __init_subclass__(cls) -> None:
        Event.kinds[cls.__name__] = cls

    def __init__(self, *values: Any, **fields: Any) -> None:
        kind = type(self)
        names = list(kind.__annotations__)
        given = dict(zip(names, values, strict=False))
        if len(values) > len(names) or given.keys() & fields or fields.keys() - names:
            raise TypeError(f"{kind.__name__} has the fields {names}, got {values} and {fields}")
        given.update(fields)
        for name in names:
            if name not in given and not hasattr(kind, name):
                raise TypeError(f"{kind.__name__} lacks the field {name!r}")
            vars(self)[name] = given.get(name, getattr(kind, name, None))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Leave out what is large, or may be a secret."""
        shown = [f"{k}={v!r}" for k, v in vars(self).items() if not isinstance(v, (*_BYTES, dict))]
        return f"{type(self).__name__}({', '.join(shown)})"

    def replace(self: _Event, **changes: Any) -> _Event:
        """Return an event that differs in some fields."""
        return type(self)(**{**vars(self), **changes})


Sink = Callable[[Event], None]
Handlers = Mapping[type[Event], Callable[[Any], object]]


# ---- from a worker to its task, and through pipes and connections to where they end


class Ready(Event):
    """The worker has installed its handlers and begins to import, `at` seconds since the epoch."""

    at: float


class Started(Event):
    """The rank calls main now.

    `left_early` is the outcome if its process leaves with 0 before main has ended; empty: that is
    a failure.
    """

    rank: int
    left_early: bytes = b""


class MainEnded(Event):
    """The rank's main has returned or raised; how comes with `Ended`."""

    rank: int


class Ended(Event):
    """The rank has an outcome (flows/outcome)."""

    rank: int
    outcome: bytes


class Beat(Event):
    """Where the rank's main is, and for how many seconds it has waited in a collective."""

    rank: int
    where: str = ""
    waits_in: str = ""
    surely: bool = True
    seconds: float = 0.0


class Profile(Event):
    """Where main's time went: by stack (flows/profile), and in calls that wait, or may wait."""

    rank: int
    seconds: float
    waited: dict[str, float]
    may_have_waited: dict[str, float]
    stacks: bytes


class Message(Event):
    """A call of ``log_to_driver``."""

    rank: int
    text: str


class Notice(Event):
    """A line to be shown once, whichever ranks send it."""

    rank: int
    key: str
    text: str


class WorkerTimes(Event):
    """When the worker, and the warm parent it was forked from, had imported, and later phases."""

    rank: int
    imported_at: float
    warmed: tuple[float, float]
    spans: dict[str, tuple[float, float]]


class Measured(Event):
    """How the rank's backend does: seconds of a small and a large allreduce; GPUs by name."""

    rank: int
    backend: str = ""
    seconds: tuple[float, ...] = ()
    gpus: tuple[str, ...] = ()
    problem: str = ""


class CheckpointSaved(Event):
    """Rank 0 has written a checkpoint to a directory of its task's; or why not."""

    step: int
    directory: str
    metrics: dict[str, float] = {}  # noqa: RUF012 - events are frozen
    problem: str = ""
    guess: int = 0
    """Which call of the rank's it was whose objects looked as if rank 0 saves; 0: main said so."""


class PartSaved(Event):
    """The rank has written its part of a checkpoint to a directory of its task's; or why not."""

    rank: int
    step: int
    directory: str = ""
    problem: str = ""
    metrics: dict[str, float] = {}  # noqa: RUF012 - events are frozen
    guess: int = 0
    """Which call of the rank's it was whose objects looked as if all save; 0: main said so."""


class LatestWanted(Event):
    """The rank asks which checkpoint main starts from, and for the files of a rank: -1, its own."""

    rank: int
    part: int = -1


class RangesWanted(Event):
    """Somebody asks for ranges of files of the latest checkpoint."""

    ranges: bytes


class SaveWanted(Event):
    """The ranks are to save a checkpoint, and why; `urgent` if a machine may be about to go.

    It comes from a rank, or from the driver.
    """

    why: str
    urgent: bool = False


class CallsCounted(Event):
    """How many calls of should_save_now() the rank's main has begun."""

    rank: int
    question: int
    calls: int


# ---- from a task to its worker


class Job(Event):
    """What a worker is to do; `environment` has the slot's variables.

    `preflight` has those that differ where it tries its backend before main; empty: it does not.
    """

    rank: int
    host: str
    environment: dict[str, str]
    return_result: bool = False
    attempt: int = 1
    scratch: str = ""
    keeps_checkpoints: bool = False
    beat_seconds: float = 5.0
    profiles: bool = False
    preflight: dict[str, str] = {}  # noqa: RUF012 - events are frozen
    call: bytes = b""


class Measure(Event):
    """The worker is to try its backend now, before main."""


class Proceed(Event):
    """All is well: the worker is to call main."""


class Latest(Event):
    """Where the task has what was asked for of the latest checkpoint; "" if there is none.

    The manifest comes with a checkpoint of all ranks.
    """

    directory: str = ""
    step: int = -1
    differs: bool = False
    error: str = ""
    manifest: bytes = b""


class RangesRead(Event):
    """The ranges that were asked for, one after the other in a file."""

    path: str = ""
    error: str = ""


class CountCalls(Event):
    """How many calls has main begun? The next one waits for the answer to this question."""

    question: int


class SaveAt(Event):
    """That call is told to save; 0: none is."""

    question: int
    call: int = 0


class Ending(Event):
    """The SIGTERM that comes is the task's own."""


# ---- between partition 0 and the other tasks


class Join(Event):
    """The first event of a task's connection to partition 0."""

    partition: int


class LinksProbed(Event):
    """What a host found of its links.

    Each is the partitions at its two ends, the sender first, seconds there and back, bytes per
    second, and what is wrong with it.
    """

    partition: int
    links: tuple[tuple[int, int, float, float, str], ...]


class Probe(Event):
    """Is answered by one with as many bytes as are wanted."""

    data: bytes = b""
    wanted: int = 0


class Lines(Event):
    """Whole lines that the rank printed."""

    rank: int
    stream: str
    lines: bytes


class Points(Event):
    """What the rank reported of its training (flows/metrics)."""

    rank: int
    records: bytes


class Usage(Event):
    """What a rank's processes, and its host, use at a time (seconds since the epoch).

    ``cpu_percent`` is of one core, ``host_cpu_percent`` of all; memory is in bytes. A GPU has its
    index, utilisation in percent (NaN: not known), and bytes in use and in all; the first rank of
    each host reports them.
    """

    rank: int
    host: str
    time: float
    cpu_percent: float
    memory: int
    host_cpu_percent: float
    host_memory_used: int
    host_memory_total: int
    gpus: tuple[tuple[int, float, int, int], ...] = ()


class RankPhases(Event):
    """When phases of the rank's launch began and ended, in seconds since the epoch."""

    rank: int
    spans: dict[str, tuple[float, float]]


class Stack(Event):
    """The rank's Python stacks."""

    rank: int
    text: bytes


class ShowStacks(Event):
    """The ranks' stacks are wanted."""


class Stop(Event):
    """The workers, or the run, are to end."""


class PartWaits(Event):
    """A rank's part of a checkpoint, its n-th one of this step, waits in its task; or why not."""

    rank: int
    step: int
    turn: int
    problem: str = ""
    metrics: dict[str, float] = {}  # noqa: RUF012 - events are frozen
    guess: int = 0


class ListParts(Event):
    """The tasks are to list the files of all parts of a checkpoint."""

    number: int
    step: int
    turn: int


class StoreParts(Event):
    """The tasks are to store the parts of a checkpoint; `choice` says which files, or is empty."""

    number: int
    step: int
    turn: int
    place: str
    choice: bytes = b""


class PartAnswer(Event):
    """What became of a rank's part, when the tasks were to do something with it."""

    rank: int
    number: int
    error: str = ""
    content: bytes = b""


class DropParts(Event):
    """The parts of a checkpoint are not needed any more."""

    step: int
    turn: int


class LatestDecided(Event):
    """Which checkpoint all ranks start from, for one that asked (`rank`, `asked`).

    It is to have the files of rank `part` (-1: rank 0 has saved for all; -2: none), which the
    directory on its host has already.
    """

    rank: int
    asked: int
    part: int = -1
    copy_from: str = ""
    differs: bool = False
    error: str = ""
    manifest: bytes = b""


class LatestFetched(Event):
    """Where the task has its copy of a part of that checkpoint; "" if it has none."""

    part: int
    directory: str


# ---- between tasks and the driver


class Register(Event):
    """Partition 0 asks whether the run may start."""

    run_id: str


class Gather(Event):
    """A task's part of what all tasks have to know of each other."""

    run_id: str
    partition: int
    text: bytes


class Gathered(Event):
    """All tasks' parts."""

    texts: bytes


class GatherWithSpark(Event):
    """Not all tasks reach the driver: everybody is to gather through Spark."""


class Accepted(Event):
    """The run may start."""


class Refused(Event):
    """The stage must not go on."""

    why: str


class Placed(Event):
    """Partition, rank and host of every rank."""

    ranks: tuple[tuple[int, int, str], ...]


class RankStates(Event):
    """What every rank does, by rank, when it has changed."""

    states: tuple[str, ...]


class CheckpointStored(Event):
    """The checkpoint of a step is where it is kept."""

    step: int
    metrics: dict[str, float] = {}  # noqa: RUF012 - events are frozen


class Note(Event):
    """A line of the run's own; `routine` if it says that all goes on as it should."""

    text: str
    routine: bool = False


class Phases(Event):
    """Name, begin, end and last rank of every phase of the run."""

    phases: tuple[tuple[str, float, float, int | None], ...]


class Storing(Event):
    """The ranks have ended, and a file is still on its way."""


class Failed(Event):
    """The run has failed; its outcome comes ahead of the stage's end."""

    outcome: bytes


class Leave(Event):
    """Partition 0 has sent everything."""


# ---- bulk, each transfer on a connection of its own (wire/upload.py); the first event says what


class UploadResult(Event):
    """What a rank's main returned is to be uploaded, in buffers of these sizes."""

    run_id: str
    layout: tuple[int, ...]
    rank: int = 0


class UploadFile(Event):
    """The file that a variable of Horovod's names is to be uploaded."""

    run_id: str
    variable: str


class UploadArtifacts(Event):
    """What ranks of a task have left is to be uploaded, as ``rank-N/...``."""

    run_id: str


class UploadCheckpoint(Event):
    """The checkpoint of a step is to be uploaded."""

    run_id: str
    step: int
    metrics: dict[str, float] = {}  # noqa: RUF012 - events are frozen


class UploadPart(Event):
    """What a rank has saved of a checkpoint is to be uploaded; the answer says what has come."""

    run_id: str
    place: str
    step: int
    rank: int


class CommitCheckpoint(Event):
    """The checkpoint whose parts are at a place is to count; its manifest is uploaded."""

    run_id: str
    place: str


class DiscardCheckpoint(Event):
    """What is at a place is not to count."""

    run_id: str
    place: str


class FindCheckpoint(Event):
    """The manifest of the latest checkpoint is to be downloaded."""

    run_id: str


class FetchCheckpoint(Event):
    """The checkpoint of a step is to be downloaded, or a rank's part of it."""

    run_id: str
    step: int
    rank: int = -1


class ReadCheckpoint(Event):
    """Ranges of files of a step's checkpoint, which are uploaded, are to be downloaded."""

    run_id: str
    step: int


class Go(Event):
    """The driver is ready for the pieces."""


class NotYet(Event):
    """The driver takes in what others send first; it says so once a second."""


class PieceFollows(Event):
    """So many bytes of a piece come next, outside any frame."""

    name: str
    size: int


class End(Event):
    """All pieces have come, or were taken in."""


class TransferFailed(Event):
    """The driver could not take the pieces in, or not send them."""

    why: str


# ---- the codec


def encode(event: Event) -> tuple[bytes, bytes]:
    """Return a frame's head and its body, to be written one after the other."""
    fields: dict[str, Any] = {"kind": type(event).__name__, **vars(event)}
    of_bytes = [name for name, value in fields.items() if isinstance(value, _BYTES)]
    body = fields.pop(of_bytes[0]) if of_bytes else b""
    header = dumps(fields).encode()
    return _PREFIX.pack(len(header), len(body)) + header, body


def parse_prefix(prefix: bytes, max_body_bytes: int | None = MAX_BODY_BYTES) -> tuple[int, int]:
    """Return the lengths of a frame's header and body; None is no limit."""
    header_bytes, body_bytes = _PREFIX.unpack(prefix)
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read")
    if max_body_bytes is not None and body_bytes > max_body_bytes:
        raise FrameError(f"a body of {body_bytes} bytes; at most {max_body_bytes} are read")
    return header_bytes, body_bytes


def decode(header: bytes, body: bytes | bytearray = b"") -> Event:
    """Return the event; FrameError if its kind is not known or its fields are not those."""
    try:
        fields = loads(header)
    except ValueError as error:
        raise FrameError(f"a header that is not JSON: {error}") from None
    except RecursionError:
        raise FrameError("a header that is nested too deeply") from None
    if not isinstance(fields, dict) or not isinstance(kind := fields.pop("kind", None), str):
        raise FrameError('a header that is not a JSON object with a "kind"')
    if kind not in Event.kinds:
        raise FrameError(f"an event of an unknown kind, {kind!r:.80}")
    hints = _hints(kind)
    of_bytes = [name for name, hint in hints.items() if hint is bytes]
    if unknown := fields.keys() - hints.keys() | fields.keys() & of_bytes:
        raise FrameError(f"{kind} has no field {min(unknown)!r:.80} in its header")
    if body and not of_bytes:
        raise FrameError(f"{kind} has no body, and {len(body)} bytes came")
    values = {name: _checked(f"{kind}.{name}", hints[name], fields[name]) for name in fields}
    try:
        return Event.kinds[kind](**values, **dict.fromkeys(of_bytes, body))
    except TypeError as error:  # a field is missing
        raise FrameError(str(error)) from None


@functools.cache
def _hints(kind: str) -> dict[str, Any]:
    hints = typing.get_type_hints(Event.kinds[kind])
    del hints["kinds"]
    return hints


def _checked(name: str, hint: Any, value: Any) -> Any:
    """Return a field's value as it was before it became JSON."""
    if type(value) is hint:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _checked(name, arguments[0], value)
    if origin is dict and isinstance(value, dict):
        return {key: _checked(name, arguments[1], item) for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is ...:
            arguments = arguments[:1] * len(value)
        if len(arguments) == len(value):
            return tuple(map(_checked, [name] * len(value), arguments, value))
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    raise FrameError(f"{name} is {value!r:.80}, not {getattr(hint, '__name__', hint)}")


def refuse(event: Event) -> None:
    """Take an event that has no business here."""
    raise FrameError(f"{type(event).__name__} is not expected here")


def ignore(event: Event) -> None:
    """Take an event that nobody here needs."""


def dispatcher(flows: Iterable[Handlers], otherwise: Sink) -> Sink:
    """Return a sink that hands an event to all flows that handle its class, or passes it on."""
    table: dict[type[Event], list[Callable[[Any], object]]] = {}
    for handlers in flows:
        for event_class, handler in handlers.items():
            table.setdefault(event_class, []).append(handler)

    def emit(event: Event) -> None:
        if (found := table.get(type(event))) is None:
            otherwise(event)
            return
        for handler in found:
            handler(event)

    return emit
