"""Where a run's checkpoints are kept, as a task sees it. Runs in: the task; serve() in the driver.

A URL, and any path when the ranks run on the driver, is reached directly. Otherwise files travel
over a connection of their own to the driver channel's port::

    task ── checkpoint (put, latest or fetch) ──▶ driver
    task ◀─ go ────────────────────────────────── driver
    put:    task ── directory*, file*, end ─────▶ driver, which answers "stored" or "failed"
    latest: task ◀─ latest ────────────────────── driver
    fetch:  task ◀─ file*, end ────────────────── driver
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from horovodrunner.flows.checkpoints.manifest import Manifest
from horovodrunner.flows.checkpoints.store import CheckpointStore, list_tree
from horovodrunner.wire.bulk import BulkConnection
from horovodrunner.wire.frames import FrameError
from horovodrunner.wire.job import JobSpec

__all__ = ["Depot", "DriverDepot", "DriverLine", "StoreDepot", "serve_depot"]

SILENCE_SECONDS = 30.0
"""A transfer that makes no progress for so long is given up."""

HANG_UP_SECONDS = 5.0
"""How long a task may take to notice that the driver does not want the rest."""

_PIECE_BYTES = 1024 * 1024


class Depot(Protocol):
    """Keeps checkpoints; every method blocks and raises OSError when it fails."""

    def put(self, step: int, directory: Path) -> None:
        """Store the files below a directory as the checkpoint of a step, all or nothing."""

    def find_latest(self) -> tuple[Manifest | None, Sequence[str]]:
        """Give the newest checkpoint that is whole, and a sentence about each damaged one."""

    def fetch(self, manifest: Manifest, directory: Path) -> None:
        """Copy a checkpoint's files into an empty directory and check their hashes."""

    def abort(self) -> None:
        """Make a method that another thread waits for raise soon."""


class StoreDepot:
    """A depot that this process reaches by itself.

    Parameters
    ----------
    store
        The checkpoints.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store

    def put(self, step: int, directory: Path) -> None:
        """Write the files into the store."""
        with self._store.begin(step) as incoming:
            incoming.add_tree(directory)
            incoming.commit()

    def find_latest(self) -> tuple[Manifest | None, Sequence[str]]:
        """Verify the newest ones until one is whole."""
        damaged: list[str] = []
        return self._store.find_latest(damaged.append), damaged

    def fetch(self, manifest: Manifest, directory: Path) -> None:
        """Read the files from the store."""
        for file in manifest.files:
            with self._store.open_file(manifest, file.path) as source:
                _write_checked(manifest, file.path, _pieces_of(source), directory)
        _make_directories(manifest, directory)

    def abort(self) -> None:
        """Do nothing: what a file system does cannot be interrupted."""


class DriverLine:
    """Connections to the driver channel's port, each for one transfer.

    Parameters
    ----------
    job
        The run.
    """

    def __init__(self, job: JobSpec) -> None:
        self._job = job
        self._open: set[BulkConnection] = set()
        self._aborted = False

    def abort(self) -> None:
        """Close the connections that are in use."""
        self._aborted = True
        for connection in list(self._open):
            connection.close()

    @contextlib.contextmanager
    def _connection(self, kind: str, **fields: Any) -> Iterator[BulkConnection]:
        """Open a connection whose first frame is `kind`; the driver is ready for what follows."""
        if self._aborted or self._job.driver_address is None:
            raise ConnectionAbortedError("the run has ended")
        host, port = self._job.driver_address
        try:
            connection = BulkConnection.open(host, port, self._job.token, SILENCE_SECONDS)
        except OSError as error:
            raise type(error)(f"the driver at {host}:{port} cannot be reached: {error}") from error
        self._open.add(connection)
        try:
            if self._aborted:
                raise ConnectionAbortedError("the run has ended")
            connection.send(kind, run_id=self._job.run_id, **fields)
            connection.expect("go")
            yield connection
        except FrameError as error:
            raise OSError(f"the driver at {host}:{port} answered {error}") from error
        finally:
            self._open.discard(connection)
            connection.close()


class DriverDepot(DriverLine):
    """A directory on the driver, reached through the driver channel's port."""

    def put(self, step: int, directory: Path) -> None:
        """Send the files to the driver."""
        files, empty_directories = list_tree(directory)
        with self._connection("checkpoint", operation="put", step=step) as connection:
            try:
                digests = _send_files(connection, files, empty_directories)
                connection.send_bytes("end", json.dumps(digests).encode())
            except ConnectionError:
                connection.expect("stored")  # the driver may have said why it hung up
                raise
            connection.expect("stored")

    def find_latest(self) -> tuple[Manifest | None, Sequence[str]]:
        """Ask the driver, which verifies its newest ones until one is whole."""
        with self._connection("checkpoint", operation="latest") as connection:
            header, size = connection.expect("latest")
            text = connection.whole_body(size).decode()
        return (Manifest.from_json(text) if text else None), header["damaged"]

    def fetch(self, manifest: Manifest, directory: Path) -> None:
        """Receive the files from the driver."""
        step = manifest.step
        with self._connection("checkpoint", operation="fetch", step=step) as connection:
            for file in manifest.files:
                _, size = connection.expect("file")
                _write_checked(manifest, file.path, connection.body(size), directory)
            connection.expect("end")
        _make_directories(manifest, directory)


def serve_depot(
    connection: BulkConnection,
    request: dict[str, Any],
    store: CheckpointStore,
    warn: Callable[[str], None],
) -> None:
    """Do, on the driver, what a :class:`DriverDepot` asks for.

    Parameters
    ----------
    connection
        To the task.
    request
        The header of the task's ``checkpoint`` frame.
    store
        Where checkpoints are kept here.
    warn
        Takes a sentence when something could not be stored.
    """
    operation = request["operation"]
    try:
        connection.send("go")
        if operation == "put":
            _receive_checkpoint(connection, int(request["step"]), store)
        elif operation == "latest":
            damaged: list[str] = []
            manifest = store.find_latest(damaged.append)
            text = manifest.to_json() if manifest is not None else ""
            connection.send_bytes("latest", text.encode(), damaged=damaged)
        elif operation == "fetch":
            _send_checkpoint(connection, int(request["step"]), store)
    except ConnectionError as error:
        warn(f"a checkpoint's transfer ({operation}) broke off: {error}")
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):  # it is gone, or the channel is closed
            connection.send("failed", why=f"{type(error).__name__}: {error}")
            connection.discard_rest(HANG_UP_SECONDS)


def _receive_checkpoint(connection: BulkConnection, step: int, store: CheckpointStore) -> None:
    with store.begin(step) as incoming:
        while True:
            header, size = connection.receive()
            if header["kind"] == "directory":
                incoming.add_directory(header["path"])
            elif header["kind"] == "file":
                # The sender hashes what it reads; to hash once more here would take as long as
                # all the rest. Whoever reads the checkpoint compares.
                incoming.write(header["path"], connection.body(size), hashed=False)
            else:
                break
        if header["kind"] != "end":
            raise FrameError(f"a {header['kind']!r} frame among the files of a checkpoint")
        incoming.commit(json.loads(connection.whole_body(size)))
    connection.send("stored")


def _send_checkpoint(connection: BulkConnection, step: int, store: CheckpointStore) -> None:
    manifest = next((m for m in store.manifests() if m.step == step), None)
    if manifest is None:
        raise FileNotFoundError(f"there is no checkpoint of step {step} any more")
    try:
        for file in manifest.files:
            with store.open_file(manifest, file.path) as source:
                connection.send_body("file", file.size, _pieces_of(source), path=file.path)
    except OSError as error:
        # In the middle of a file nothing can be said any more; hanging up says it.
        raise ConnectionAbortedError(f"step {step}: {error}") from error
    connection.send("end")


def _send_files(
    connection: BulkConnection,
    files: Sequence[tuple[str, Path]],
    empty_directories: Sequence[str],
) -> dict[str, str]:
    for name in empty_directories:
        connection.send("directory", path=name)
    digests = {}
    for name, path in files:
        digest = hashlib.sha256()
        with path.open("rb") as source:
            pieces = _hashed(_pieces_of(source), digest)
            connection.send_body("file", path.stat().st_size, pieces, path=name)
        digests[name] = digest.hexdigest()
    return digests


def _pieces_of(source: BinaryIO) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_PIECE_BYTES))
    while count := source.readinto(buffer):  # type: ignore[attr-defined]
        yield buffer[:count]


def _hashed(pieces: Iterator[memoryview], digest: Any) -> Iterator[memoryview]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def _write_checked(
    manifest: Manifest, name: str, pieces: Iterator[memoryview], directory: Path
) -> None:
    expected = next(file for file in manifest.files if file.path == name)
    target = directory / name
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("wb") as sink:
        for piece in _hashed(pieces, digest):
            sink.write(piece)
    if digest.hexdigest() != expected.sha256:
        raise OSError(
            f"{name} of the checkpoint of step {manifest.step} arrived with another SHA-256 than "
            "its manifest has"
        )


def _make_directories(manifest: Manifest, directory: Path) -> None:
    for name in manifest.directories:
        (directory / name).mkdir(parents=True, exist_ok=True)
