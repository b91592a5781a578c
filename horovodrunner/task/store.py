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
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path, PurePath, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO, cast

from horovodrunner.core.manifest import MANIFEST_NAME, Manifest, StoredFile, safe_path
from horovodrunner.errors import ArgumentValueError, ConfigurationError

__all__ = [
    "CheckpointStore",
    "IncomingCheckpoint",
    "IncomingFile",
    "is_url",
    "list_tree",
]

_CHUNK_BYTES = 4 * 2**20
_LEFTOVER_SECONDS = 24 * 3600
_INCOMING = ".incoming-"
_REPLACED = ".replaced-"
_STEP = re.compile(r"step-([0-9]{8,})")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
# what FUSE and network file systems answer when they have no fsync for this kind of file
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}


def is_url(location: str | os.PathLike[str]) -> bool:
    """Tell URLs, which need fsspec, from paths.

    Parameters
    ----------
    location
        A path or a URL.

    Returns
    -------
    bool
        True when it starts with a scheme of two or more characters.

    Examples
    --------
    >>> is_url("s3://bucket/run-1"), is_url("dbfs:/run-1"), is_url("/dbfs/run-1")
    (True, True, False)
    """
    return _SCHEME.match(os.fspath(location)) is not None


class CheckpointStore:
    """The checkpoints in one place.

    One process writes at a time; any number may read.

    Parameters
    ----------
    location
        A directory, or a URL that fsspec knows. It need not exist yet.
    keep
        How many checkpoints to keep, at least 1.

    Raises
    ------
    ConfigurationError
        When `location` is a URL and fsspec, or what it needs for the scheme, is missing, or
        when `keep` is less than 1.
    """

    def __init__(self, location: str | os.PathLike[str], keep: int) -> None:
        if keep < 1:
            raise ArgumentValueError(f"keep is {keep}; at least 1 checkpoint must be kept.")
        self.keep = keep
        self._place = _place(location)
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
            with _as_os_error(self._place.url(probe)):
                self._place.close(self._place.create(probe))
            self._place.remove_file(probe)
        except OSError as error:
            raise ConfigurationError(
                f"Checkpoints cannot be written to {self.location}: {error}. "
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
        return f"The checkpoint {where} is damaged: {problem}. The one before it is tried."

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
        with _as_os_error(self._place.url(path)), self._place.open(path) as stream:
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
        with _as_os_error(self._place.url(path)), self._place.open(path) as stream:
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

    def open(self, path: str) -> IncomingFile:
        """Add a file that is written piece by piece.

        Parameters
        ----------
        path
            Where it is below the checkpoint's root.

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
            file = IncomingFile(self, path, stream)
        self._files[path] = None
        self._open.add(file)
        return file

    def write(self, path: str, chunks: Iterable[bytes | bytearray | memoryview]) -> StoredFile:
        """Add a whole file.

        Parameters
        ----------
        path
            Where it is below the checkpoint's root.
        chunks
            Its content in pieces; no more than one is held in memory.

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
        file = self.open(path)
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

    def commit(self) -> Manifest:
        """Make it count, then delete the checkpoints that are too old to keep.

        Returns
        -------
        Manifest
            What was stored.

        Raises
        ------
        ValueError
            When a file is still open, or the checkpoint is over already.
        OSError
            When it cannot be put in its place; it is discarded then.
        """
        self._refuse_when_over()
        if self._open:
            paths = ", ".join(sorted(file.path for file in self._open))
            raise ValueError(f"not closed yet: {paths}")
        with self._discarded_on_error():
            manifest = self._manifest()
            path = f"{self._root}/{MANIFEST_NAME}"
            with _as_os_error(self._place.url(path)):
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
            with suppress(OSError), _as_os_error(file.path):
                file._stream.close()
        self._open.clear()
        with suppress(OSError):
            self._place.remove(self._root)

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
    """

    def __init__(self, checkpoint: IncomingCheckpoint, path: str, stream: BinaryIO) -> None:
        self.path = path
        self._checkpoint = checkpoint
        self._stream = stream
        self._digest = hashlib.sha256()
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
        with self._checkpoint._discarded_on_error(), _as_os_error(self.path):
            self._stream.write(view)
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
        with self._checkpoint._discarded_on_error(), _as_os_error(self.path):
            self._checkpoint._place.close(self._stream)
        stored = StoredFile(self.path, self._size, self._digest.hexdigest())
        self._checkpoint._closed(self, stored)
        return stored

    def _refuse_when_closed(self) -> None:
        if self not in self._checkpoint._open:
            raise ValueError(f"the file {self.path!r} was closed, or its checkpoint is over")


class _LocalPlace:
    """A directory of a mounted file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def url(self, path: str) -> str:
        return str(self.root / path)

    def make(self, path: str) -> None:
        (self.root / path).mkdir(parents=True, exist_ok=True)

    def directories(self) -> list[str]:
        try:
            return [each.name for each in self.root.iterdir() if each.is_dir()]
        except FileNotFoundError:
            return []

    def refresh(self) -> None:
        """Do nothing: a disk is always asked."""

    def size(self, path: str) -> int:
        return (self.root / path).stat().st_size

    def open(self, path: str) -> BinaryIO:
        return (self.root / path).open("rb")

    def create(self, path: str) -> BinaryIO:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.open("xb")

    def close(self, stream: BinaryIO) -> None:
        with stream:
            stream.flush()
            _sync(stream.fileno())

    def begin(self, name: str) -> str:
        """Give the place where the files of `name` are written."""
        incoming = _beside(_INCOMING, name)
        self.make(incoming)
        return incoming

    def finish(self, incoming: str, name: str) -> None:
        """Put what was written to `incoming` in its place, instead of what is there."""
        for directory, _, _ in os.walk(self.root / incoming):
            _sync_directory(directory)
        final, aside = self.root / name, self.root / _beside(_REPLACED, name)
        replaces = os.path.lexists(final)
        if replaces:
            final.replace(aside)
        try:
            (self.root / incoming).replace(final)
        except OSError:
            if replaces:
                aside.replace(final)
            raise
        # it is there now, whatever fails from here on
        with suppress(OSError):
            _sync_directory(self.root)
        with suppress(OSError):
            if replaces:
                self.remove(aside.name)

    def remove(self, name: str) -> None:
        path = self.root / name
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        if not name.startswith(_INCOMING):
            # a crash in the middle leaves the leftover of a write, not a damaged checkpoint
            path = path.replace(self.root / _beside(_INCOMING, name.lstrip(".")))
        shutil.rmtree(path)

    def remove_file(self, path: str) -> None:
        (self.root / path).unlink()

    def recover(self) -> None:
        """Put back what a crash in the middle of :meth:`finish` left aside."""
        for name in self.directories():
            final = _replaced_name(name)
            if final and not os.path.lexists(self.root / final):
                with suppress(OSError):
                    (self.root / name).replace(self.root / final)

    def leftovers(self) -> list[str]:
        """List what writes that were interrupted long ago left."""
        found = []
        for name in self.directories():
            final = _replaced_name(name)
            if not name.startswith(_INCOMING) and not final:
                continue
            if final and not os.path.lexists(self.root / final):
                continue
            with suppress(FileNotFoundError):
                if time.time() - (self.root / name).stat().st_mtime > _LEFTOVER_SECONDS:
                    found.append(name)
        return found


class _RemotePlace:
    """A place behind a URL. Whatever fsspec's implementations raise becomes an OSError."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, root = _open_file_system(url)
        if any(character in root for character in "*?["):
            raise ConfigurationError(
                f"The URL {url} has a character that fsspec takes for a pattern (*, ? or [). "
                "Choose one without."
            )
        self._root = root.rstrip("/")

    def url(self, path: str) -> str:
        separator = "" if self._url.endswith("/") else "/"
        return f"{self._url}{separator}{path}" if path else self._url

    def make(self, path: str) -> None:
        with _as_os_error(self.url(path)):
            self._fs.makedirs(self._path(path), exist_ok=True)

    def directories(self) -> list[str]:
        self.refresh()
        try:
            with _as_os_error(self._url):
                entries = self._fs.ls(self._path(""), detail=True)
        except FileNotFoundError:
            return []
        directories = [each["name"] for each in entries if each["type"] == "directory"]
        return [each.rstrip("/").rpartition("/")[2] for each in directories]

    def refresh(self) -> None:
        """Forget the listings that fsspec caches."""
        with _as_os_error(self._url):
            self._fs.invalidate_cache()

    def size(self, path: str) -> int:
        with _as_os_error(self.url(path)):
            return int(self._fs.info(self._path(path))["size"])

    def open(self, path: str) -> BinaryIO:
        with _as_os_error(self.url(path)):
            return cast(BinaryIO, self._fs.open(self._path(path), "rb"))

    def create(self, path: str) -> BinaryIO:
        parent = path.rpartition("/")[0]
        self.make(parent)
        with _as_os_error(self.url(path)):
            return cast(BinaryIO, self._fs.open(self._path(path), "wb"))

    def close(self, stream: BinaryIO) -> None:
        stream.close()

    def begin(self, name: str) -> str:
        """Empty the place where the files of `name` are written: its own."""
        self.remove(name)
        self.make(name)
        return name

    def finish(self, incoming: str, name: str) -> None:
        """Do nothing: the manifest, which is there by now, makes it count."""

    def remove(self, name: str) -> None:
        # the manifest first: a crash in the middle leaves an incomplete one, not a damaged one
        with suppress(FileNotFoundError):
            self.remove_file(f"{name}/{MANIFEST_NAME}")
        with suppress(FileNotFoundError), _as_os_error(self.url(name)):
            self._fs.rm(self._path(name), recursive=True)

    def remove_file(self, path: str) -> None:
        with _as_os_error(self.url(path)):
            self._fs.rm(self._path(path))

    def recover(self) -> None:
        """Do nothing: behind a URL nothing is put aside."""

    def leftovers(self) -> list[str]:
        """Give none: what lacks a manifest could be just being written, and ages are not known."""
        return []

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root or "/"


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


def _place(location: str | os.PathLike[str]) -> _LocalPlace | _RemotePlace:
    text = os.fspath(location)
    if not is_url(text):
        try:
            return _LocalPlace(Path(text).expanduser().absolute())
        except RuntimeError as error:
            raise ConfigurationError(f"The directory {text} is unknown: {error}") from error
    if isinstance(location, PurePath):
        raise ConfigurationError(
            f"{location!r} is a URL in a path object, which drops slashes. Give it as a str."
        )
    return _RemotePlace(text)


def _open_file_system(url: str) -> tuple[Any, str]:
    scheme, _, rest = url.partition(":")
    try:
        import fsspec
    except ImportError as error:
        raise ConfigurationError(
            f"{url} has the scheme {scheme!r}, which needs fsspec: pip install fsspec"
        ) from error
    # fsspec takes "dbfs:/run" for the name of a local file
    full = url if "://" in url else f"{scheme}://{rest}"
    try:
        fs, root = fsspec.core.url_to_fs(full)
    except ImportError as error:
        raise ConfigurationError(
            f"{url} has the scheme {scheme!r}, for which fsspec needs another package: {error}"
        ) from error
    except Exception as error:  # what connects at once fails in its own ways
        raise ConfigurationError(
            f"fsspec cannot open {url} (scheme {scheme!r}): {type(error).__name__}: {error}. "
            "Check the URL and what its file system needs."
        ) from error
    return fs, str(root)


@contextmanager
def _as_os_error(where: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # every fsspec implementation has errors of its own
        raise OSError(f"{where}: {type(error).__name__}: {error}") from error


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _beside(prefix: str, name: str) -> str:
    return f"{prefix}{name}-{secrets.token_hex(4)}"


def _replaced_name(name: str) -> str:
    return name[len(_REPLACED) :].rpartition("-")[0] if name.startswith(_REPLACED) else ""


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in PurePosixPath(path).parents][:-1]


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _sync_directory(directory: str | Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)
