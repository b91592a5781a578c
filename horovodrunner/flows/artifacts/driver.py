"""Files that Horovod writes, put where the user wants them. Runs in: the driver."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from horovodrunner.errors import ConfigurationError
from horovodrunner.flows.artifacts.timeline import TimelineRepair
from horovodrunner.storage import is_url
from horovodrunner.wire.events import FrameError, UploadFile
from horovodrunner.wire.upload import IncomingPiece, TransferHandler, chunks_of

__all__ = ["BroughtFiles", "copy_file", "file_handler", "put_file"]

TIMELINE = "HOROVOD_TIMELINE"
AUTOTUNE_LOG = "HOROVOD_AUTOTUNE_LOG"
_NO_FILE = ("", "DYNAMIC")
"""Values of HOROVOD_TIMELINE with which main itself starts the timeline."""


class BroughtFiles:
    """The files of one run, by the variable that names a path on the driver for each."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._paths: dict[str, Path] = {}
        self._arrived: set[str] = set()
        self._attempt = 1
        for variable in (TIMELINE, AUTOTUNE_LOG):
            value = environment.get(variable, "")
            if value not in _NO_FILE:
                self._paths[variable] = _writable(variable, value)

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables whose files are to be brought."""
        return tuple(self._paths)

    @property
    def paths(self) -> Mapping[str, Path]:
        """Where the files are put, by variable."""
        return dict(self._paths)

    def begin(self, attempt: int) -> None:
        """Keep the files of the attempt before, if they came, beside the ones that will come."""
        for variable in self._arrived:
            path = self._paths[variable]
            path.replace(path.with_name(f"{path.stem}.attempt-{self._attempt}{path.suffix}"))
        self._arrived.clear()
        self._attempt = attempt

    def take(self, variable: str, chunks: Iterable[bytes | memoryview] | None) -> str:
        """Put a file in its place (None: there is none) and return a sentence for the user."""
        path = self._paths[variable]
        if variable == TIMELINE:
            repair = TimelineRepair()
            put_file(path, repair.repair(chunks or ()))
            text = _timeline_in_words(repair, path, was_opened=chunks is not None)
        elif chunks is None:
            return (
                f"{variable}: Horovod wrote nothing on rank 0: hvd.init() was not called, or "
                "HOROVOD_AUTOTUNE is not 1"
            )
        else:
            put_file(path, chunks)
            text = f"autotune log: {path}"
        self._arrived.add(variable)
        return text

    def missing(self) -> str:
        """Name the files of this attempt that have not come."""
        return ", ".join(
            f"{variable}={path}"
            for variable, path in self._paths.items()
            if variable not in self._arrived
        )


def file_handler(files: BroughtFiles, note: Callable[[str], None]) -> TransferHandler:
    """Make what takes an uploaded file."""

    def receive(request: UploadFile, pieces: Iterator[IncomingPiece]) -> None:
        variable = request.variable
        if variable not in files.variables:
            raise FrameError(f"a file of {variable!r}, which this run does not have")
        piece = next(pieces, None)
        note(files.take(variable, None if piece is None else piece.chunks))

    return TransferHandler("a file's transfer", receive)


def copy_file(files: BroughtFiles, note: Callable[[str], None], variable: str, path: Path) -> None:
    """Take the file that a variable names where the ranks run on the driver itself."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        note(files.take(variable, None))
        return
    with file:
        note(files.take(variable, chunks_of(file, path.stat().st_size)))


def _writable(variable: str, value: str) -> Path:
    """Return the absolute path that a variable names, if a file can be put there."""
    name = f"{variable}={value!r}"
    if is_url(value):
        raise ConfigurationError(
            f"{name}: the file is written on the driver: name a path of this machine, not a URL"
        )
    path = Path(os.path.realpath(value))  # a link stays one, and its target is replaced
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{name}: it is not a file; name one, such as {path}.json")
    if not path.parent.is_dir():
        raise ConfigurationError(
            f"{name}: there is no directory {path.parent} on the driver, where the file is put at "
            "the end of the run: make it, or name another path"
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"{name}: the directory {path.parent} on the driver cannot be written to: name "
            "another path"
        )
    return path


def _timeline_in_words(repair: TimelineRepair, path: Path, *, was_opened: bool) -> str:
    text = f"timeline: {repair.collectives} events in {path}"
    if repair.dropped:
        text += (
            f"; {repair.dropped} that are no JSON are left out (is there a quotation mark in the "
            "name of a tensor?)"
        )
    if repair.collectives:
        return text
    if was_opened:
        return f"{text}: no collective operation of Horovod's began on rank 0 after hvd.init()"
    return f"{text}: hvd.init() was not called on rank 0, and Horovod writes none before"


def put_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file beside its place and move it there."""
    beside = path.with_name(f".{secrets.token_hex(8)}")  # path's own name may be as long as can be
    try:
        with beside.open("xb") as target:
            for chunk in chunks:
                target.write(chunk)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
