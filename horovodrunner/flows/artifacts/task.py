"""Files that Horovod writes on rank 0's host, brought to the driver. Runs in: task and driver.

When the ranks have ended, rank 0's task sends each file over a connection of its own to the driver
channel's port; when the ranks run on the driver, it is read there::

    task ── file ────────────▶ driver
    task ◀─ go ─────────────── driver
    task ── content | missing ▶ driver, which answers "stored" or "failed"
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from horovodrunner.errors import ConfigurationError
from horovodrunner.flows.artifacts.timeline import TimelineRepair
from horovodrunner.flows.checkpoints.backend import HANG_UP_SECONDS, DriverLine
from horovodrunner.storage import is_url
from horovodrunner.wire.bulk import BulkConnection
from horovodrunner.wire.frames import FrameError

__all__ = ["BroughtFiles", "DriverFiles", "FileTaker", "LocalFiles", "serve_files"]

TIMELINE = "HOROVOD_TIMELINE"
AUTOTUNE_LOG = "HOROVOD_AUTOTUNE_LOG"
_NO_FILE = ("", "DYNAMIC")
"""Values of HOROVOD_TIMELINE with which main itself starts the timeline."""

_PIECE_BYTES = 1024 * 1024


class BroughtFiles:
    """The files of one run, by the variable that names them, and where the user wants them.

    Parameters
    ----------
    environment
        The variables for the workers; those that name such a file hold a path on the driver.

    Raises
    ------
    ConfigurationError
        If a file cannot be written there.
    """

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

    def begin(self, attempt: int) -> None:
        """Keep the files of the attempt before, if they came, beside the ones that will come.

        Parameters
        ----------
        attempt
            The attempt that begins: 1 for the first launch.
        """
        for variable in self._arrived:
            path = self._paths[variable]
            path.replace(path.with_name(f"{path.stem}.attempt-{self._attempt}{path.suffix}"))
        self._arrived.clear()
        self._attempt = attempt

    def take(self, variable: str, pieces: Iterable[bytes | memoryview] | None) -> str:
        """Put a file in its place.

        Parameters
        ----------
        variable
            The variable that names it.
        pieces
            What Horovod wrote; None when there is no file.

        Returns
        -------
        str
            A sentence about it for the user.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        path = self._paths[variable]
        if variable == TIMELINE:
            repair = TimelineRepair()
            _put(path, repair.repair(pieces or ()))
            text = _timeline_in_words(repair, path, was_opened=pieces is not None)
        elif pieces is None:
            return (
                f"{variable}: Horovod wrote nothing on rank 0: hvd.init() was not called, or "
                "HOROVOD_AUTOTUNE is not 1"
            )
        else:
            _put(path, pieces)
            text = f"autotune log: {path}"
        self._arrived.add(variable)
        return text

    def missing(self) -> str:
        """Say which files of this attempt have not come, or nothing."""
        return ", ".join(
            f"{variable}={path}"
            for variable, path in self._paths.items()
            if variable not in self._arrived
        )


class FileTaker(Protocol):
    """Takes files of rank 0's; every method blocks and raises OSError when it fails."""

    def put(self, variable: str, path: Path) -> None:
        """Take the file that a variable names, or note that there is none."""

    def abort(self) -> None:
        """Make a method that another thread waits for raise soon."""


class LocalFiles:
    """Takes files on the driver itself.

    Parameters
    ----------
    files
        Where they go.
    note
        Takes a sentence for the user about each.
    """

    def __init__(self, files: BroughtFiles, note: Callable[[str], None]) -> None:
        self._files = files
        self._note = note

    def put(self, variable: str, path: Path) -> None:
        """Copy the file."""
        with _opened(path) as source:
            pieces = None if source is None else _pieces_of(source, path.stat().st_size)
            self._note(self._files.take(variable, pieces))

    def abort(self) -> None:
        """Do nothing: what a file system does cannot be interrupted."""


class DriverFiles(DriverLine):
    """Sends files to the driver channel's port."""

    def put(self, variable: str, path: Path) -> None:
        """Send the file."""
        with self._connection("file", variable=variable) as connection, _opened(path) as source:
            try:
                if source is None:
                    connection.send("missing")
                else:
                    size = path.stat().st_size
                    connection.send_body("content", size, _pieces_of(source, size))
            except ConnectionError:
                connection.expect("stored")  # the driver may have said why it hung up
                raise
            connection.expect("stored")


def serve_files(
    connection: BulkConnection,
    request: Mapping[str, Any],
    files: BroughtFiles,
    note: Callable[[str], None],
) -> None:
    """Take, on the driver, what a :class:`DriverFiles` sends.

    Parameters
    ----------
    connection
        To the task.
    request
        The header of the task's ``file`` frame.
    files
        Where they go.
    note
        Takes a sentence for the user.
    """
    variable = str(request["variable"])
    try:
        if variable not in files.variables:
            raise FrameError(f"a file of {variable!r}, which this run does not have")
        connection.send("go")
        header, size = connection.receive()
        if header["kind"] not in ("content", "missing"):
            raise FrameError(f"a {header['kind']!r} frame where a file was to come")
        pieces = connection.body(size) if header["kind"] == "content" else None
        note(files.take(variable, pieces))
        connection.send("stored")
    except ConnectionError as error:
        note(f"{variable}: the file's transfer broke off: {error}")
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):  # it is gone, or the channel is closed
            connection.send("failed", why=f"{type(error).__name__}: {error}")
            connection.discard_rest(HANG_UP_SECONDS)


def _writable(variable: str, value: str) -> Path:
    """Give the absolute path that a variable names, if a file can be put there."""
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


def _put(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file beside its place and move it there."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as target:
            for piece in pieces:
                target.write(piece)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | None]:
    """Open a file that need not be there."""
    try:
        source = path.open("rb")
    except FileNotFoundError:
        yield None
        return
    with source:
        yield source


def _pieces_of(source: BinaryIO, size: int) -> Iterator[bytes]:
    """Read so many bytes and no more: a worker that hangs may still write."""
    while size and (piece := source.read(min(size, _PIECE_BYTES))):
        size -= len(piece)
        yield piece
