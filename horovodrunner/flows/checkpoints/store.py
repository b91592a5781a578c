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
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from horovodrunner.errors import ConfigurationError, RunSupersededError
from horovodrunner.flows.call.record import RunRecord
from horovodrunner.flows.checkpoints.fence import (
    CLAIMED,
    RESUMED,
    Fence,
    epoch_name,
    epochs_among,
)
from horovodrunner.flows.checkpoints.manifest import MANIFEST_NAME, Manifest, StoredFile, safe_path
from horovodrunner.storage import as_os_error, open_storage
from horovodrunner.wire.upload import Piece, chunks_of

__all__ = ["CheckpointStore", "pieces_of_tree", "restore"]

_STEP = re.compile(r"step-([0-9]{8,})")

Chunks = Iterable[bytes | memoryview]


class CheckpointStore:
    """The checkpoints in one directory or behind one URL, of which `keep` are kept.

    One process writes at a time; any number may read. `run` is the run that writes. With a `fence`
    the store is one of several beside each other, and refuses to write once there is a newer one.
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        keep: int,
        run: RunRecord | None = None,
        fence: Fence | None = None,
    ) -> None:
        self.keep = keep
        self.run = run
        self.fence = fence
        self._storage = open_storage(location)
        self._held: str | None = None

    @property
    def location(self) -> str:
        """The absolute path or the URL, as it was understood."""
        return self._storage.url("")

    def path_of(self, step: int) -> str:
        """Return the path or URL where a step's checkpoint is, or would be."""
        return self._storage.url(_name(step))

    def directories(self) -> list[str]:
        """List the names of all directories there."""
        return self._storage.directories()

    def below(self, name: str) -> CheckpointStore:
        """Return the store in a directory of this one."""
        return CheckpointStore(self._storage.url(name), self.keep)

    def begin_epoch(self, number: int, *, resume: bool) -> CheckpointStore:
        """Return the store of a new epoch in this directory, with what older ones have to go on.

        From then on older epochs are refused, and with `resume` what they store is not looked at.
        """
        store = self.below(epoch_name(number))
        store._storage.make("")
        store._storage.replace(CLAIMED, json.dumps({"resume": resume}).encode())
        if resume:
            for older in epochs_among(self.directories()):
                if older < number and store._take_over(self.below(epoch_name(older))):
                    break
            store._storage.replace(RESUMED, b"{}")
        return CheckpointStore(store.location, self.keep, fence=Fence(number, resume))

    def newest_epoch(self) -> CheckpointStore:
        """Return the store of the newest epoch that has a checkpoint; this one if none has."""
        for number in epochs_among(self.directories()):
            store = self.below(epoch_name(number))
            if store.has_any():
                return store
        return self

    def _take_over(self, older: CheckpointStore) -> bool:
        """Take an older epoch's checkpoints, and return whether all are here now."""
        older._storage.recover()
        found = older.manifests()
        own = {each.step for each in self.manifests()}
        for manifest in found:
            if manifest.step not in own:
                self._storage.take(older._storage, _name(manifest.step))  # type: ignore[arg-type]
        files = older._storage.files()
        return RESUMED in files or (bool(found) and not older._wanted_to_resume())

    def _wanted_to_resume(self) -> bool:
        try:
            with self._storage.open(CLAIMED) as stream:
                return bool(json.loads(stream.read())["resume"])
        except (OSError, ValueError, TypeError, KeyError):
            return True

    def _refuse_if_superseded(self) -> None:
        """Raise an error if another driver has begun to write this run's checkpoints."""
        if self.fence is None:
            return
        newest = epochs_among(self._beside().directories())[:1]
        if newest and newest[0] > self.fence.number:
            where = self._beside().path_below(epoch_name(newest[0]))
            raise RunSupersededError(
                f"another driver has taken over this run, and writes its checkpoints to {where}"
            )

    def _prune_older_epochs(self) -> None:
        if self.fence is None or not self.fence.prunes_older:
            return
        with suppress(OSError):
            beside = self._beside()
            for number in epochs_among(beside.directories()):
                if number < self.fence.number:
                    with suppress(OSError):
                        beside._storage.remove(epoch_name(number))

    def _beside(self) -> CheckpointStore:
        """Return the directory that this epoch's is in."""
        return CheckpointStore(self.location.rstrip("/").rpartition("/")[0], self.keep)

    def path_below(self, name: str) -> str:
        """Return the path or URL of a directory of this one."""
        return self._storage.url(name)

    def check(self) -> None:
        """Prove that files can be written, or raise a ConfigurationError that has the reason."""
        probe = f".probe-{secrets.token_hex(4)}"
        try:
            self._storage.make("")
            with as_os_error(self._storage.url(probe)):
                self._storage.create(probe).close()
            self._storage.remove_file(probe)
        except OSError as error:
            raise ConfigurationError(
                f"checkpoints cannot be written to {self.location}: {error}. "
                "Choose a directory or URL that this process may create and write files in "
                "(for a URL, check its credentials too)."
            ) from error

    def put(self, step: int, directory: Path) -> None:
        """Store the files below a local directory as the checkpoint of a step."""
        self.put_pieces(step, pieces_of_tree(directory))

    def put_pieces(self, step: int, pieces: Iterable[Piece]) -> Manifest:
        """Store what :func:`pieces_of_tree` yields as the checkpoint of a step, all or nothing.

        A checkpoint of the same step is replaced: on a local path at the end, behind a URL at once.
        Then those that are too old to keep are deleted.
        """
        self._refuse_if_superseded()
        incoming = self._storage.begin(_name(step))
        try:
            manifest = self._write(step, incoming, pieces)
            self._refuse_if_superseded()
            content = manifest.to_json().encode()
            self._write_file(f"{incoming}/{MANIFEST_NAME}", [content])
            self._storage.finish(incoming, _name(step))
        except BaseException:
            with suppress(OSError):
                self._storage.remove(incoming)
            raise
        self.prune()
        self._prune_older_epochs()
        return manifest

    def manifests(self) -> list[Manifest]:
        """List the complete checkpoints, what was saved last first, without reading their files."""
        return self._read_manifests()[0]

    def has_any(self, *, recover: bool = False) -> bool:
        """Return whether there is a checkpoint, even a damaged one.

        `recover` puts back first what a crash left aside; not while another run may write.
        """
        if recover:
            self._storage.recover()
        return any(self._read_manifests())

    def find_latest(self) -> tuple[Manifest | None, list[str]]:
        """Find the newest sound checkpoint, and write a sentence about each damaged newer one.

        :meth:`prune` leaves it alone until the next one is asked for.
        """
        self._held = None
        self._storage.recover()
        manifests, damaged = self._read_manifests()
        for manifest in manifests:
            problem = self.verify(manifest)
            if not problem:
                self._held = _name(manifest.step)
                return manifest, damaged
            damaged.append(self._damage(_name(manifest.step), problem))
        return None, damaged

    def verify(self, manifest: Manifest) -> str:
        """Write what is wrong first when a checkpoint's files are compared with its manifest."""
        for file in manifest.files:
            try:
                problem = self._problem_of(f"{_name(manifest.step)}/{file.path}", file)
            except FileNotFoundError:
                problem = "is missing"
            except OSError as error:
                problem = f"cannot be read: {error}"
            if problem:
                return f"{file.path} {problem}"
        return ""

    def fetch(self, manifest: Manifest, directory: Path) -> None:
        """Copy a checkpoint's files into an empty directory and check their hashes."""
        restore(manifest, directory, self.pieces(manifest))

    def pieces(self, manifest: Manifest) -> Iterator[Piece]:
        """Read a checkpoint's files, in the manifest's order."""
        for file in manifest.files:
            path = f"{_name(manifest.step)}/{file.path}"
            with self._storage.open(path) as stream:
                yield Piece(file.path, file.size, chunks_of(stream))

    def prune(self) -> None:
        """Delete all but the newest checkpoints, and what interrupted writes left long ago.

        What cannot be deleted stays.
        """
        with suppress(OSError):
            old = [_name(manifest.step) for manifest in self.manifests()[self.keep :]]
            for name in [*old, *self._storage.leftovers()]:
                if name != self._held:
                    with suppress(OSError):
                        self._storage.remove(name)

    def _write(self, step: int, root: str, pieces: Iterable[Piece]) -> Manifest:
        sizes: dict[str, int] = {}
        hashes: Any = None
        directories = []
        for piece in pieces:
            if piece.name == MANIFEST_NAME:
                hashes = json.loads(piece.read())
            elif piece.name.endswith("/"):
                directories.append(safe_path(piece.name[:-1]))
                self._storage.make(f"{root}/{directories[-1]}")
            else:
                path = safe_path(piece.name)
                sizes[path] = self._write_file(f"{root}/{path}", piece.chunks)
        if not isinstance(hashes, dict) or hashes.keys() != sizes.keys():
            raise ValueError("the hashes that came are not those of the files that came")
        self._refuse_torn(root, sizes)
        return Manifest(
            step=step,
            sequence=1 + max((each.sequence for each in self.manifests()), default=0),
            saved_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            files=tuple(StoredFile(path, sizes[path], str(hashes[path])) for path in sizes),
            directories=tuple(directories),
            run=self.run,
        )

    def _write_file(self, path: str, chunks: Chunks) -> int:
        size = 0
        with as_os_error(self._storage.url(path)), self._storage.create(path) as stream:
            for chunk in chunks:
                stream.write(chunk)
                size += len(chunk)
        return size

    def _refuse_torn(self, root: str, sizes: dict[str, int]) -> None:
        self._storage.refresh()
        for path, size in sizes.items():
            found = self._storage.size(f"{root}/{path}")
            if found != size:
                where = self._storage.url(f"{root}/{path}")
                raise OSError(errno.EIO, f"{found} of {size} bytes are there", where)

    def _damage(self, name: str, problem: str) -> str:
        where = self._storage.url(name)
        return f"the checkpoint {where} is damaged and skipped: {problem}"

    def _read_manifests(self) -> tuple[list[Manifest], list[str]]:
        found: list[Manifest] = []
        unreadable: list[str] = []
        for name in sorted(self._storage.directories(), reverse=True):
            if not _STEP.fullmatch(name):
                continue
            try:
                found.append(self._read_manifest(name))
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                problem = f"its {MANIFEST_NAME} cannot be used: {error}"
                unreadable.append(self._damage(name, problem))
        return sorted(found, key=lambda each: each.sequence, reverse=True), unreadable

    def _read_manifest(self, name: str) -> Manifest:
        path = f"{name}/{MANIFEST_NAME}"
        with as_os_error(self._storage.url(path)), self._storage.open(path) as stream:
            content = stream.read()
        manifest = Manifest.from_json(content.decode())
        if _name(manifest.step) != name:
            raise ValueError(f"its step is {manifest.step}, which is not the directory's")
        return manifest

    def _problem_of(self, path: str, file: StoredFile) -> str:
        size = self._storage.size(path)
        if size != file.size:
            return f"has {size} bytes instead of {file.size}"
        with as_os_error(self._storage.url(path)), self._storage.open(path) as stream:
            if _copy(chunks_of(stream)) != file.sha256:
                return "does not have the content that was saved (its SHA-256 differs)"
        return ""


def pieces_of_tree(directory: Path) -> Iterator[Piece]:
    """Read what is below a local directory; symbolic links are followed.

    Empty directories, whose names end with ``/``, come first, then the files, and under the
    manifest's name the files' SHA-256: the sender hashes, whoever reads the checkpoint compares.
    """
    files, empty_directories = _files_below(directory)
    for name in files:
        safe_path(name)  # a file of the manifest's name would pass for the hashes

    def read() -> Iterator[Piece]:
        for name in sorted(empty_directories):
            yield Piece(f"{name}/", 0, ())
        hashes = {}
        for name, path in sorted(files.items()):
            digest = hashlib.sha256()
            with path.open("rb") as source:
                yield Piece(name, path.stat().st_size, _hashed(chunks_of(source), digest))
            hashes[name] = digest.hexdigest()
        content = json.dumps(hashes).encode()
        yield Piece(MANIFEST_NAME, len(content), [content])

    return read()


def restore(manifest: Manifest, directory: Path, pieces: Iterable[Piece]) -> None:
    """Write a checkpoint's files, which come in the manifest's order, and check their hashes."""
    for file, piece in zip(manifest.files, pieces, strict=True):
        target = directory / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as sink:
            sha256 = _copy(piece.chunks, sink)
        if sha256 != file.sha256:
            raise OSError(
                f"{file.path} of the checkpoint of step {manifest.step} arrived with another "
                "SHA-256 than its manifest has"
            )
    for name in manifest.directories:
        (directory / name).mkdir(parents=True, exist_ok=True)


def _files_below(directory: Path) -> tuple[dict[str, Path], list[str]]:
    """Find the files below a directory, and its empty directories, by their paths in it."""
    files: dict[str, Path] = {}
    empty_directories = []

    def fail(error: OSError) -> NoReturn:
        raise error

    for here, directories, names in os.walk(directory, onerror=fail, followlinks=True):
        folder = Path(here)
        path = folder.relative_to(directory)
        if folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve()):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), here)
        for name in names:
            if not stat.S_ISREG((folder / name).stat().st_mode):
                # reading a pipe would wait forever
                raise OSError(errno.EINVAL, "Neither a file nor a directory", str(folder / name))
            files[(path / name).as_posix()] = folder / name
        if not (names or directories or folder == directory):
            empty_directories.append(path.as_posix())
    return files, empty_directories


def _hashed(chunks: Chunks, digest: Any) -> Iterator[bytes | memoryview]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _copy(chunks: Chunks, sink: BinaryIO | None = None) -> str:
    """Read chunks, write them if there is where to, and return their SHA-256."""
    digest = hashlib.sha256()
    for chunk in _hashed(chunks, digest):
        if sink is not None:
            sink.write(chunk)
    return digest.hexdigest()


def _name(step: int) -> str:
    return f"step-{step:08d}"
