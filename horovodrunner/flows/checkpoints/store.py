"""Checkpoints as directories of files, each there in full or not at all.

Runs in: the driver and the task.

::

    <location>/step-00000012/manifest.json     written last: without it the step does not count
                            /model.pt ...
    <location>/.incoming-step-00000013-1f0c…   being written (on a local path)

On a local path a checkpoint is written beside its place and renamed into it. Object stores cannot
rename, so behind a URL the files are written in place and the manifest makes them count.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO

from horovodrunner.errors import ArgumentValueError, ConfigurationError
from horovodrunner.flows.call.record import RunRecord
from horovodrunner.flows.checkpoints.manifest import MANIFEST_NAME, Manifest, StoredFile, safe_path
from horovodrunner.storage import as_os_error, open_place

__all__ = [
    "CheckpointStore",
    "IncomingCheckpoint",
    "IncomingFile",
    "list_tree",
]

_CHUNK_BYTES = 4 * 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STEP = re.compile(r"step-([0-9]{8,})")


class CheckpointStore:
    """The checkpoints in one place.

    One process writes at a time; any number may read.

    Parameters
    ----------
    location
        A directory, or a URL that fsspec knows. It need not exist yet.
    keep
        How many checkpoints to keep, at least 1.
    run
        What the run is called with whose checkpoints are written.

    Raises
    ------
    ConfigurationError
        When `location` is a URL and fsspec, or what it needs for the scheme, is missing, or
        when `keep` is less than 1.
    """

    def __init__(
        self, location: str | os.PathLike[str], keep: int, run: RunRecord | None = None
    ) -> None:
        if keep < 1:
            raise ArgumentValueError(f"keep is {keep}; at least 1 checkpoint must be kept.")
        self.keep = keep
        self.run = run
        self._place = open_place(location)
        self._held: str | None = None

    @property
    def location(self) -> str:
        """The absolute path or the URL, as it was understood."""
        return self._place.url("")

    def check(self) -> None:
        """Create the location if it is not there and prove that files can be written to it.

        Raises
        ------
        ConfigurationError
            When that fails; the text has the location and the reason.
        """
        probe = f".probe-{secrets.token_hex(4)}"
        try:
            self._place.make("")
            with as_os_error(self._place.url(probe)):
                self._place.close(self._place.create(probe))
            self._place.remove_file(probe)
        except OSError as error:
            raise ConfigurationError(
                f"checkpoints cannot be written to {self.location}: {error}. "
                "Choose a directory or URL that this process may create and write files in "
                "(for a URL, check its credentials too)."
            ) from error

    def begin(self, step: int) -> IncomingCheckpoint:
        """Start to write a checkpoint.

        Parameters
        ----------
        step
            Its training step, 0 or more. A checkpoint of the same step is replaced: on a local
            path at commit, behind a URL now.

        Returns
        -------
        IncomingCheckpoint
            Takes the files. Nothing counts before its ``commit()``.

        Raises
        ------
        OSError
            When the place cannot be written to.
        """
        if step < 0:
            raise ValueError(f"step is {step}; it must be 0 or more")
        return IncomingCheckpoint(self, step)

    def manifests(self) -> list[Manifest]:
        """List the complete checkpoints, without reading their files.

        Returns
        -------
        list of Manifest
            The newest, which is what was saved last, first.

        Raises
        ------
        OSError
            When the location exists and cannot be listed.
        """
        return self._read_manifests()[0]

    def has_any(self, *, recover: bool = False) -> bool:
        """Return whether there is a checkpoint, even a damaged one.

        Parameters
        ----------
        recover
            Whether to put back first what a crash left aside; not while another run may write.

        Returns
        -------
        bool
            True if there is.

        Raises
        ------
        OSError
            When the location exists and cannot be listed.
        """
        if recover:
            self._place.recover()
        return any(self._read_manifests())

    def path_of(self, step: int) -> str:
        """Say where a step's checkpoint is, or would be.

        Parameters
        ----------
        step
            The training step.

        Returns
        -------
        str
            An absolute path, or a URL with its scheme.
        """
        return self._place.url(_name(step))

    def verify(self, manifest: Manifest) -> str:
        """Read a checkpoint's files and compare them with its manifest.

        Parameters
        ----------
        manifest
            What should be there.

        Returns
        -------
        str
            "" when all is there, else one sentence about the first thing that is wrong.
        """
        for file in manifest.files:
            path = f"{_name(manifest.step)}/{file.path}"
            try:
                problem = self._verify_file(path, file)
            except FileNotFoundError:
                problem = "is missing"
            except OSError as error:
                problem = f"cannot be read: {error}"
            if problem:
                return f"{file.path} {problem}"
        return ""

    def find_latest(self, on_damaged: Callable[[str], None]) -> Manifest | None:
        """Find the newest checkpoint whose files are all sound, and hold it.

        :meth:`prune` leaves it alone until :meth:`release`.

        Parameters
        ----------
        on_damaged
            Called with a sentence for each damaged checkpoint on the way.

        Returns
        -------
        Manifest or None
            The checkpoint, or None when there is no sound one.

        Raises
        ------
        OSError
            When the location exists and cannot be listed.
        """
        self.release()
        self._place.recover()
        manifests, unreadable = self._read_manifests()
        for name, problem in unreadable:
            on_damaged(self._damage(name, f"its {MANIFEST_NAME} cannot be used: {problem}"))
        for manifest in manifests:
            problem = self.verify(manifest)
            if not problem:
                self._held = _name(manifest.step)
                return manifest
            on_damaged(self._damage(_name(manifest.step), problem))
        return None

    def release(self) -> None:
        """Let :meth:`prune` delete the checkpoint that :meth:`find_latest` gave."""
        self._held = None

    def open_file(self, manifest: Manifest, path: str) -> BinaryIO:
        """Open one file of a checkpoint for reading.

        Parameters
        ----------
        manifest
            The checkpoint.
        path
            The file's path in it.

        Returns
        -------
        BinaryIO
            The open file; the caller closes it.

        Raises
        ------
        OSError
            When it is not there or cannot be opened.
        """
        return self._place.open(f"{_name(manifest.step)}/{safe_path(path)}")

    def prune(self) -> list[str]:
        """Delete all but the newest checkpoints, and what interrupted writes left long ago.

        Returns
        -------
        list of str
            A sentence for each thing that could not be deleted.
        """
        problems = []
        try:
            old = [_name(manifest.step) for manifest in self.manifests()[self.keep :]]
            leftovers = self._place.leftovers()
        except OSError as error:
            return [f"{self.location} cannot be listed: {error}"]
        for name in [*old, *leftovers]:
            if name == self._held:
                continue
            try:
                self._place.remove(name)
            except OSError as error:
                problems.append(f"{self._place.url(name)} cannot be deleted: {error}")
        return problems

    def _damage(self, name: str, problem: str) -> str:
        where = self._place.url(name)
        return f"the checkpoint {where} is damaged and skipped: {problem}"

    def _read_manifests(self) -> tuple[list[Manifest], list[tuple[str, str]]]:
        found: list[Manifest] = []
        unreadable: list[tuple[str, str]] = []
        for name in sorted(self._place.directories(), reverse=True):
            if not _STEP.fullmatch(name):
                continue
            try:
                manifest = self._read_manifest(name)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                unreadable.append((name, str(error)))
            else:
                found.append(manifest)
        return sorted(found, key=lambda each: each.sequence, reverse=True), unreadable

    def _read_manifest(self, name: str) -> Manifest:
        path = f"{name}/{MANIFEST_NAME}"
        with as_os_error(self._place.url(path)), self._place.open(path) as stream:
            content = stream.read()
        manifest = Manifest.from_json(content.decode())
        if _name(manifest.step) != name:
            raise ValueError(f"its step is {manifest.step}, which is not the directory's")
        return manifest

    def _verify_file(self, path: str, file: StoredFile) -> str:
        size = self._place.size(path)
        if size != file.size:
            return f"has {size} bytes instead of {file.size}"
        digest = hashlib.sha256()
        with as_os_error(self._place.url(path)), self._place.open(path) as stream:
            for chunk in _chunks(stream):
                digest.update(chunk)
        if digest.hexdigest() != file.sha256:
            return "does not have the content that was saved (its SHA-256 differs)"
        return ""


class IncomingCheckpoint:
    """A checkpoint that is being written; it counts once :meth:`commit` has returned.

    As a context manager it is discarded when the block is left without a commit. When anything
    fails, it discards itself and the error goes on to the caller.

    Parameters
    ----------
    store
        Where it goes.
    step
        Its training step.
    """

    def __init__(self, store: CheckpointStore, step: int) -> None:
        self.step = step
        self._store = store
        self._place = store._place
        self._over = False
        self._open: set[IncomingFile] = set()
        self._files: dict[str, StoredFile | None] = {}
        self._directories: set[str] = set()
        self._inhabited: set[str] = set()
        self._root = self._place.begin(_name(step))

    def __enter__(self) -> IncomingCheckpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.discard()

    def add_directory(self, path: str) -> None:
        """Add a directory, so that it is there even when it stays empty.

        Parameters
        ----------
        path
            Where it is below the checkpoint's root.

        Raises
        ------
        ValueError
            When `path` is not safe or is taken by a file.
        OSError
            When it cannot be created; the checkpoint is discarded then.
        """
        self._claim(path, for_directory=True)
        with self._discarded_on_error():
            self._place.make(f"{self._root}/{path}")
        self._directories.add(path)

    def open(self, path: str, *, hashed: bool = True) -> IncomingFile:
        """Add a file that is written piece by piece.

        Parameters
        ----------
        path
            Where it is below the checkpoint's root.
        hashed
            False when its hash is given to :meth:`commit`.

        Returns
        -------
        IncomingFile
            Takes the content; it must be closed before the commit.

        Raises
        ------
        ValueError
            When `path` is not safe or is taken.
        OSError
            When it cannot be created; the checkpoint is discarded then.
        """
        self._claim(path, for_directory=False)
        with self._discarded_on_error():
            stream = self._place.create(f"{self._root}/{path}")
            file = IncomingFile(self, path, stream, hashed=hashed)
        self._files[path] = None
        self._open.add(file)
        return file

    def write(
        self,
        path: str,
        chunks: Iterable[bytes | bytearray | memoryview],
        *,
        hashed: bool = True,
    ) -> StoredFile:
        """Add a whole file.

        Parameters
        ----------
        path
            Where it is below the checkpoint's root.
        chunks
            Its content in pieces; no more than one is held in memory.
        hashed
            False when its hash is given to :meth:`commit`.

        Returns
        -------
        StoredFile
            The file's size and hash.

        Raises
        ------
        ValueError
            When `path` is not safe or is taken.
        OSError
            When it cannot be written; the checkpoint is discarded then.
        """
        file = self.open(path, hashed=hashed)
        with self._discarded_on_error():
            for chunk in chunks:
                file.write(chunk)
        return file.close()

    def add_tree(self, directory: str | os.PathLike[str]) -> None:
        """Add every file below a local directory, and the empty directories.

        Parameters
        ----------
        directory
            The directory, which becomes the checkpoint's root. Symbolic links are followed.

        Raises
        ------
        ValueError
            When a file has a name that is not safe.
        OSError
            When something cannot be read or written; the checkpoint is discarded then.
        """
        with self._discarded_on_error():
            files, directories = list_tree(Path(directory))
            for path, source in files:
                with source.open("rb") as stream:
                    self.write(path, _chunks(stream))
            for path in directories:
                self.add_directory(path)

    def commit(self, digests: Mapping[str, str] | None = None) -> Manifest:
        """Make it count, then delete the checkpoints that are too old to keep.

        Parameters
        ----------
        digests
            SHA-256 of the files that were not hashed here, by path.

        Returns
        -------
        Manifest
            What was stored.

        Raises
        ------
        ValueError
            When a file is still open, or the checkpoint is over already, or `digests` does not
            name just the files that were not hashed.
        OSError
            When it cannot be put in its place; it is discarded then.
        """
        self._refuse_when_over()
        if self._open:
            paths = ", ".join(sorted(file.path for file in self._open))
            raise ValueError(f"not closed yet: {paths}")
        with self._discarded_on_error():
            self._take_digests(digests or {})
            manifest = self._manifest()
            path = f"{self._root}/{MANIFEST_NAME}"
            with as_os_error(self._place.url(path)):
                stream = self._place.create(path)
                try:
                    stream.write(manifest.to_json().encode())
                finally:
                    self._place.close(stream)
            self._place.finish(self._root, _name(self.step))
        self._over = True
        self._store.prune()
        return manifest

    def discard(self) -> None:
        """Delete what was written, as far as that can be done; nothing happens after a commit."""
        if self._over:
            return
        self._over = True
        for file in self._open:
            with suppress(OSError), as_os_error(file.path):
                file._stream.close()
        self._open.clear()
        with suppress(OSError):
            self._place.remove(self._root)

    def _take_digests(self, digests: Mapping[str, str]) -> None:
        unhashed = {
            path: file for path, file in self._files.items() if file is not None and not file.sha256
        }
        well_formed = all(_SHA256.fullmatch(str(digest)) for digest in digests.values())
        if set(digests) != set(unhashed) or not well_formed:
            raise ValueError("the hashes that came are not those of the files that came")
        for path, file in unhashed.items():
            self._files[path] = replace(file, sha256=digests[path])

    def _manifest(self) -> Manifest:
        files = tuple(file for file in self._files.values() if file is not None)
        self._place.refresh()
        for file in files:
            path = f"{self._root}/{file.path}"
            size = self._place.size(path)
            if size != file.size:
                raise OSError(
                    errno.EIO, f"{size} of {file.size} bytes are there", self._place.url(path)
                )
        return Manifest(
            step=self.step,
            sequence=1 + max((each.sequence for each in self._store.manifests()), default=0),
            saved_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            files=files,
            directories=tuple(sorted(self._directories - self._inhabited)),
            run=self._store.run,
        )

    def _claim(self, path: str, *, for_directory: bool) -> None:
        # an object store would take a file and a directory of one name; no disk could hold them
        self._refuse_when_over()
        parents = _parents(safe_path(path))
        blocking = [each for each in (path, *parents) if each in self._files]
        if not for_directory and path in self._inhabited | self._directories:
            blocking.append(path)
        if blocking:
            raise ValueError(f"the path {path!r} is taken: {blocking[0]!r} was added already")
        self._inhabited.update(parents)

    def _refuse_when_over(self) -> None:
        if self._over:
            raise ValueError(f"the checkpoint of step {self.step} was committed or discarded")

    def _closed(self, file: IncomingFile, stored: StoredFile) -> None:
        self._open.discard(file)
        self._files[stored.path] = stored

    @contextmanager
    def _discarded_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.discard()
            raise


class IncomingFile:
    """One file of an :class:`IncomingCheckpoint` while it is written.

    Parameters
    ----------
    checkpoint
        What it belongs to.
    path
        Where it is below the checkpoint's root.
    stream
        The file itself, open for writing.
    hashed
        Whether to compute its hash.
    """

    def __init__(
        self, checkpoint: IncomingCheckpoint, path: str, stream: BinaryIO, *, hashed: bool = True
    ) -> None:
        self.path = path
        self._checkpoint = checkpoint
        self._stream = stream
        self._digest = hashlib.sha256() if hashed else None
        self._size = 0

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append to the file.

        Parameters
        ----------
        chunk
            The next bytes.

        Raises
        ------
        ValueError
            When the file was closed, or its checkpoint is over.
        OSError
            When it cannot be written; the checkpoint is discarded then.
        """
        self._refuse_when_closed()
        view = memoryview(chunk).cast("B")
        with self._checkpoint._discarded_on_error(), as_os_error(self.path):
            self._stream.write(view)
        if self._digest is not None:
            self._digest.update(view)
        self._size += len(view)

    def close(self) -> StoredFile:
        """Finish the file.

        Returns
        -------
        StoredFile
            Its size and hash.

        Raises
        ------
        ValueError
            When the file was closed, or its checkpoint is over.
        OSError
            When it cannot be written in full; the checkpoint is discarded then.
        """
        self._refuse_when_closed()
        with self._checkpoint._discarded_on_error(), as_os_error(self.path):
            self._checkpoint._place.close(self._stream)
        digest = self._digest.hexdigest() if self._digest is not None else ""
        stored = StoredFile(self.path, self._size, digest)
        self._checkpoint._closed(self, stored)
        return stored

    def _refuse_when_closed(self) -> None:
        if self not in self._checkpoint._open:
            raise ValueError(f"the file {self.path!r} was closed, or its checkpoint is over")


def list_tree(directory: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """List what is below a local directory, following symbolic links.

    Parameters
    ----------
    directory
        The directory.

    Returns
    -------
    tuple of list and list
        The files as (path relative to `directory`, local path), and the relative paths of the
        empty directories; both sorted, with ``/`` between the parts of relative paths.

    Raises
    ------
    OSError
        When something cannot be listed, is neither a file nor a directory, or links in a circle.
    """
    files: list[tuple[str, Path]] = []
    directories: list[str] = []
    _walk(directory, "", frozenset(), files, directories)
    return sorted(files), sorted(directories)


def _walk(
    directory: Path,
    prefix: str,
    above: frozenset[tuple[int, int]],
    files: list[tuple[str, Path]],
    directories: list[str],
) -> None:
    status = directory.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(directory))
    entries = list(directory.iterdir())
    if prefix and not entries:
        directories.append(prefix)
    for entry in entries:
        path = f"{prefix}/{entry.name}" if prefix else entry.name
        mode = entry.stat().st_mode
        if stat.S_ISDIR(mode):
            _walk(entry, path, above | {identity}, files, directories)
        elif stat.S_ISREG(mode):
            files.append((path, entry))
        else:
            # reading a pipe would wait forever
            raise OSError(errno.EINVAL, "Neither a file nor a directory", str(entry))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in PurePosixPath(path).parents][:-1]


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk
