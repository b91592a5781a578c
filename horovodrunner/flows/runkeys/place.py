"""What is kept of a key, in a directory or behind a URL. Runs in: the driver.

::

    <run_dir>/keys/nightly-2026-11-27-9f…/epoch-000003.json   a driver has begun: the third one
                                         /beat-000003         changes as long as it lives
                                         /ended-000003.json   it ended without a value, and why
                                         /value-000003.bin    what rank 0 returned, pickled
                                         /value-000003-rank-1.bin …   and others, if all are kept
                                         /value-000003.json   sizes and hashes; makes it count

Of several drivers that want to begin the same epoch one succeeds. A value counts as long as there
is no newer epoch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from horovodrunner.flows.call.record import RunRecord
from horovodrunner.pickling.buffers import BufferedPickle
from horovodrunner.storage import (
    LocalStorage,
    Storage,
    as_os_error,
    open_storage,
    path_of_file_url,
)

__all__ = ["Epoch", "KeyPlace", "StoredValue", "directory_of_key", "this_process"]

FORMAT = 1

_KEYS = "keys"
_EPOCH = re.compile(r"epoch-([0-9]{6,})\.json")
_LEFTOVER = re.compile(r"(?:beat-|new-value-|\.unfinished-[a-z]+-)([0-9]{6,})(?:\.[a-z]+)?(?:-.*)?")
_SLUG_CHARACTERS = 40
_START_TIME = 18
"""Where a process's start is in ``/proc/PID/stat``, after its state: proc(5)."""


@dataclass(frozen=True)
class Epoch:
    """One driver that has begun the run of a key, from its start to its end."""

    number: int
    key: str = ""
    token: str = ""
    """Tells it from another driver that wanted to be the same epoch."""
    generation: str = ""
    """The same for all that go on from each other; ``on_change="rerun"`` begins a new one."""
    host: str = ""
    pid: int = 0
    process: str = ""
    """Tells the process from another one that has its number later, or in another container."""
    began: str = ""
    """ISO 8601, in UTC."""
    call: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_known(self) -> bool:
        """Whether its file could be read; it may be torn, or just being written."""
        return bool(self.token)

    @property
    def record(self) -> RunRecord | None:
        """What the run was called with."""
        return RunRecord.from_fields(self.call)

    def describe(self) -> str:
        """Write who it is."""
        if not self.is_known:
            return f"a driver that cannot be named (epoch {self.number})"
        return f"pid {self.pid} on {self.host}"


@dataclass(frozen=True)
class StoredValue:
    """The value of a run that has ended well."""

    epoch: int
    file: str
    size: int
    sha256: str
    ended: str
    """ISO 8601, in UTC."""
    ranks: int
    record: str
    """The name of the run's record in ``run_dir``."""
    others: list[list[Any]] = field(default_factory=list)
    """File, size and SHA-256 of what the other ranks returned, by rank from 1; or none of them."""

    def file_of(self, rank: int) -> tuple[str, int, str]:
        """Return file, size and SHA-256 of what a rank returned."""
        if rank == 0:
            return self.file, self.size, self.sha256
        file, size, sha256 = self.others[rank - 1]
        return file, size, sha256


def directory_of_key(key: str) -> str:
    """Return a name that is safe for files, and another one for each key.

    >>> directory_of_key("nightly/2026")
    'nightly-2026-8e2404eba3948358'
    """
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", key)[:_SLUG_CHARACTERS].strip("-")
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return f"{slug}-{digest}" if slug else digest


@functools.lru_cache(maxsize=1)
def _machine() -> str:
    """Return what names this boot of this machine, and whose numbers of processes these are."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _identity(pid: int) -> str:
    """Return what tells a process here from any other; "" if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()  # a name may have spaces
    if state in {"Z", "X"}:
        return ""
    # in ticks since boot: the time of day may be set meanwhile
    return f"{_machine()} {fields[_START_TIME]}"


def this_process() -> str:
    """Return what tells this process from any other."""
    return _identity(os.getpid())


def has_ended(epoch: Epoch) -> bool:
    """Return whether the process of an epoch was one of this machine's, and is gone."""
    if not (epoch.is_known and epoch.process.startswith(f"{_machine()} ")):
        return False
    return _identity(epoch.pid) != epoch.process


class KeyPlace:
    """The files of one key. Methods raise an OSError where the place cannot be reached."""

    def __init__(self, run_dir: str, key: str) -> None:
        self.name = directory_of_key(key)
        below = f"{_KEYS}/{self.name}"
        root: Storage = open_storage(run_dir)
        if (path := path_of_file_url(run_dir)) is not None:  # a path can do more than fsspec
            root = LocalStorage(Path(path))
        self._files = open_storage(root.url(below))
        self.location = self._files.url("")

    def newest(self) -> list[Epoch]:
        """Return the newest epoch and, if that cannot be read, older ones to one that can."""
        found: list[Epoch] = []
        matches = (_EPOCH.fullmatch(name) for name in self._files.files())
        for number in sorted((int(match[1]) for match in matches if match), reverse=True):
            found.append(self._epoch(number))
            if found[-1].is_known:
                break
        return found

    def newest_number(self) -> int:
        """Return the number of the newest epoch; 0 if there is none."""
        matches = (_EPOCH.fullmatch(name) for name in self._files.files())
        return max((int(match[1]) for match in matches if match), default=0)

    def begin(self, number: int, key: str, generation: str, record: RunRecord) -> Epoch | None:
        """Begin an epoch; None if another driver has begun it."""
        epoch = Epoch(
            number,
            key=key,
            token=secrets.token_hex(8),
            generation=generation,
            host=socket.gethostname(),
            pid=os.getpid(),
            process=this_process(),
            began=_now(),
            call=asdict(record),
        )
        content = json.dumps({"format": FORMAT, **asdict(epoch)}, indent=1).encode()
        try:
            self._files.create_once(_epoch_file(number), content)
        except FileExistsError:
            # a client may have tried twice, because the first answer was lost
            return epoch if self._epoch(number).token == epoch.token else None
        return epoch

    def beat(self, number: int, text: str) -> None:
        """Write a sign of life: a text that differs from the last one."""
        self._files.replace(f"beat-{number:06d}", text.encode())

    def last_beat(self, number: int) -> bytes:
        """Read the last sign of life."""
        return self._read(f"beat-{number:06d}")

    def end(self, number: int, how: str) -> None:
        """Note that an epoch has ended without a value."""
        content = json.dumps({"format": FORMAT, "ended": _now(), "how": how}, indent=1)
        self._files.replace(f"ended-{number:06d}.json", content.encode())

    def has_ended(self, number: int) -> bool:
        """Return whether an epoch has ended without a value."""
        return bool(self._json(f"ended-{number:06d}.json"))

    def value(self, number: int) -> StoredValue | None:
        """Return what is known of an epoch's value."""
        fields = _fields(StoredValue, self._json(_value_file(number, "json")))
        if fields is None:
            return None
        files = [[fields["file"], fields["size"], fields["sha256"]], *fields["others"]]
        is_sound = all(
            [type(each) for each in file] == [str, int, str] and "/" not in file[0]
            for file in files
            if isinstance(file, list)
        )
        return StoredValue(**fields) if is_sound else None

    def store(
        self,
        number: int,
        pickled: BufferedPickle,
        others: Iterable[BufferedPickle] = (),
        *,
        ranks: int,
        record: str,
        check: Callable[[], None],
    ) -> StoredValue:
        """Store an epoch's value; it counts from the moment when all of it is there.

        `check` is called just before, and may raise an error.
        """
        kept: list[tuple[str, int, str]] = []
        try:
            for rank, each in enumerate(itertools.chain([pickled], others)):
                kept.append(self._keep(_value_file(number, "bin", rank), each))
        except BaseException:
            for name, _, _ in kept:
                self._give_up(name)
            raise
        (file, size, sha256), *rest = kept
        value = StoredValue(number, file, size, sha256, _now(), ranks, record, [*map(list, rest)])
        check()
        self.confirm(number, value)
        return value

    def _keep(self, name: str, pickled: BufferedPickle) -> tuple[str, int, str]:
        """Write a file in one go, and return its name, size and SHA-256."""
        beside = f"new-{name}-{secrets.token_hex(4)}"
        written = beside if isinstance(self._files, LocalStorage) else name
        try:
            with as_os_error(self._files.url(name)), self._files.create(written) as stream:
                sink = _Hashing(stream)
                pickled.keep(sink)  # type: ignore[arg-type]
        except BaseException:
            self._give_up(written)
            raise
        if isinstance(self._files, LocalStorage):
            (self._files.root / beside).replace(self._files.root / name)
        self._files.refresh()
        if self._files.size(name) != sink.size:
            raise OSError(
                f"{self._files.url(name)} has {self._files.size(name)} of {sink.size} bytes"
            )
        return name, sink.size, sink.sha256

    def _give_up(self, name: str) -> None:
        """Delete what is of no use without the rest: a full disk needs the space."""
        with contextlib.suppress(OSError):
            self._files.remove_file(name)

    def confirm(self, number: int, value: StoredValue) -> None:
        """Let a value count as an epoch's."""
        content = json.dumps({"format": FORMAT, **asdict(value)}, indent=1)
        self._files.replace(_value_file(number, "json"), content.encode())

    def load(self, value: StoredValue, rank: int = 0) -> BufferedPickle:
        """Read what a rank returned; a ValueError if that is not what was stored."""
        file, size, sha256 = value.file_of(rank)
        try:
            found = self._files.size(file)
            if found != size:
                raise ValueError(f"has {found} bytes instead of {size}")
            pickled, digest = BufferedPickle((size,)), hashlib.sha256()
            with self._files.open(file) as stream:

                def read_into(view: memoryview) -> None:
                    while view:
                        count = stream.readinto(view[: 1 << 24])  # type: ignore[attr-defined]
                        if not count:
                            raise ValueError("is cut off")
                        digest.update(view[:count])
                        view = view[count:]

                pickled.fill(read_into)
        except FileNotFoundError:
            raise ValueError("is missing") from None
        if digest.hexdigest() != sha256:
            raise ValueError("does not have the content that was stored (its SHA-256 differs)")
        return pickled

    def tidy(self, number: int) -> None:
        """Delete what older epochs need no more, and what they left half done."""
        for name in self._files.files():
            match = _LEFTOVER.fullmatch(name)
            if match is not None and int(match[1]) < number:
                self._files.remove_file(name)

    def path_of(self, value: StoredValue, rank: int = 0) -> str:
        """Return where what a rank returned is."""
        return self._files.url(value.file_of(rank)[0])

    def _epoch(self, number: int) -> Epoch:
        fields = _fields(Epoch, self._json(_epoch_file(number)))
        return Epoch(number) if fields is None else Epoch(**{**fields, "number": number})

    def _json(self, name: str) -> dict[str, Any]:
        """Read a file of JSON; nothing if it is not there, or torn."""
        try:
            found = json.loads(self._read(name))
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _read(self, name: str) -> bytes:
        self._files.refresh()
        try:
            with as_os_error(self._files.url(name)), self._files.open(name) as stream:
                return stream.read()
        except FileNotFoundError:
            return b""


class _Hashing:
    """A file that knows the hash of what was written to it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._stream.write(view)
        self._digest.update(view)
        self.size += len(view)
        return len(view)


def _fields(kind: type, found: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fields of a class that were read, if all are there and of their types."""
    wanted = {name: text.partition("[")[0] for name, text in kind.__annotations__.items()}
    if any(type(found.get(name)).__name__ != each for name, each in wanted.items()):
        return None
    return {name: found[name] for name in wanted}


def _epoch_file(number: int) -> str:
    return f"epoch-{number:06d}.json"


def _value_file(number: int, ending: str, rank: int = 0) -> str:
    return f"value-{number:06d}{f'-rank-{rank}' if rank else ''}.{ending}"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
