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
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from horovodrunner.errors import ConfigurationError, RunSupersededError
from horovodrunner.flows.call.record import RunRecord
from horovodrunner.flows.checkpoints.fence import (
    CLAIMED,
    RESUMED,
    Fence,
    epoch_name,
    epochs_among,
)
from horovodrunner.flows.checkpoints.manifest import (
    MANIFEST_NAME,
    Manifest,
    Part,
    StoredFile,
    directory_of,
    safe_path,
)
from horovodrunner.flows.checkpoints.retention import Retention
from horovodrunner.flows.checkpoints.tree import (
    Chunks,
    pieces_of_tree,
    restore,
    sha256_of,
    write_pieces,
)
from horovodrunner.storage import as_os_error, is_url, open_storage
from horovodrunner.wire.upload import Piece, chunks_of

__all__ = ["CheckpointStore", "Range", "draft"]

_STEP = re.compile(r"step-([0-9]{8,})")

_READ_BYTES = 16 * 1024 * 1024
"""So much of a range is asked of an object store at once."""

Range = tuple[str, int, int]
"""A part of a file of a checkpoint: its path, where it begins, and how many bytes it has."""


class CheckpointStore:
    """The checkpoints in one directory or behind one URL, of which `keep` says which are kept.

    A number keeps so many, the newest ones.

    One process writes at a time; any number may read. `run` is the run that writes. With a `fence`
    the store is one of several beside each other, and refuses to write once there is a newer one.
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        keep: int | Retention,
        run: RunRecord | None = None,
        fence: Fence | None = None,
    ) -> None:
        self.keep = Retention(keep) if isinstance(keep, int) else keep
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

    def put(self, step: int, directory: Path, metrics: Mapping[str, float] | None = None) -> None:
        """Store the files below a local directory as the checkpoint of a step."""
        self.put_pieces(step, pieces_of_tree(directory), metrics)

    def put_pieces(
        self, step: int, pieces: Iterable[Piece], metrics: Mapping[str, float] | None = None
    ) -> Manifest:
        """Store what :func:`pieces_of_tree` yields as the checkpoint of a step, all or nothing.

        A checkpoint of the same step is replaced: on a local path at the end, behind a URL at once.
        Then those that are too old to keep are deleted.
        """
        place = self.begin(step)
        try:
            part = self.put_part(place, None, pieces)
            return self.commit(place, draft(step, [part], metrics))
        except BaseException:
            self.discard(place)
            raise

    def begin(self, step: int) -> str:
        """Make room for the parts of a checkpoint, and return the name of the place."""
        self._refuse_if_superseded()
        return self._storage.begin(_name(step))

    def put_part(self, place: str, rank: int | None, pieces: Iterable[Piece]) -> Part:
        """Write what a rank has saved, or (None) rank 0 for all; nothing is left if it fails."""
        root = "" if rank is None else f"{directory_of(rank)}/"
        sizes: dict[str, int] = {}
        try:
            return self._write_part(place, root, pieces, sizes)
        except BaseException:
            for path in sizes:  # another try writes them again
                with suppress(OSError):
                    self._storage.remove_file(f"{place}/{path}")
            raise

    def commit(self, place: str, manifest: Manifest) -> Manifest:
        """Let a checkpoint whose parts are all there count; return its final manifest.

        Then those that are too old to keep are deleted.
        """
        stored = self.manifests()
        manifest = replace(
            manifest,
            sequence=1 + max((each.sequence for each in stored), default=0),
            saved_at=_now(),
            run=self.run,
        )
        self._refuse_if_superseded()
        self._write_file(f"{place}/{MANIFEST_NAME}", [manifest.to_json().encode()])
        self._storage.finish(place, _name(manifest.step))
        self._prune([manifest, *(each for each in stored if each.step != manifest.step)])
        self._prune_older_epochs()
        return manifest

    def discard(self, place: str) -> None:
        """Delete what there is of a checkpoint that is not to count."""
        with suppress(OSError):
            self._storage.remove(place)

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

        What all ranks have saved behind a URL may be more than one host should read: there only
        sizes are compared, and whoever fetches a file compares its hash. :meth:`prune` leaves the
        checkpoint alone until the next one is asked for.
        """
        self._held = None
        self._storage.recover()
        manifests, damaged = self._read_manifests()
        for manifest in manifests:
            reads = manifest.world_size is None or not is_url(self.location)
            problem = self.verify(manifest, reads_files=reads)
            if not problem:
                self._held = _name(manifest.step)
                return manifest, damaged
            damaged.append(self._damage(_name(manifest.step), problem))
        return None, damaged

    def verify(self, manifest: Manifest, *, reads_files: bool = True) -> str:
        """Write what is wrong first when a checkpoint's files are compared with its manifest."""
        for file in manifest.files:
            path = f"{_name(manifest.step)}/{file.path}"
            try:
                problem = self._problem_of(path, file, reads=reads_files)
            except FileNotFoundError:
                problem = "is missing"
            except OSError as error:
                problem = f"cannot be read: {error}"
            if problem:
                return f"{file.path} {problem}"
        return ""

    def fetch(self, manifest: Manifest, directory: Path, rank: int | None = None) -> None:
        """Copy a rank's files into an empty directory and check their hashes."""
        restore(manifest, directory, self.pieces(manifest, rank), rank)

    def pieces(self, manifest: Manifest, rank: int | None = None) -> Iterator[Piece]:
        """Read a rank's files, in the manifest's order."""
        for path, file in manifest.files_of(rank).items():
            with self._storage.open(f"{_name(manifest.step)}/{file.path}") as stream:
                yield Piece(path, file.size, chunks_of(stream))

    def read(self, manifest: Manifest, ranges: Sequence[Range]) -> Iterator[Piece]:
        """Read parts of files; nothing else is asked for."""
        files = {file.path: file for file in manifest.files}
        for path, start, length in ranges:
            stored = manifest.copies.get(path, path)
            if stored not in files or start < 0 or not 0 <= length <= files[stored].size - start:
                raise ValueError(f"the checkpoint has no {length} bytes at {start} of {path!r}")
            where = f"{_name(manifest.step)}/{stored}"
            yield Piece(path, length, self._read_range(where, start, start + length))

    def read_into(self, path: Path, manifest: Manifest, ranges: Sequence[Range]) -> None:
        """Write parts of files, one after the other, to a new file."""
        write_pieces(self.read(manifest, ranges), path)

    def _read_range(self, path: str, start: int, end: int) -> Iterator[bytes]:
        for at in range(start, end, _READ_BYTES):
            yield self._storage.read(path, at, min(at + _READ_BYTES, end))

    def prune(self) -> None:
        """Delete checkpoints that are not kept, and what interrupted writes left long ago.

        What cannot be deleted stays.
        """
        with suppress(OSError):
            self._prune(self.manifests())

    def _prune(self, newest_first: Sequence[Manifest]) -> None:
        with suppress(OSError):
            old = [_name(manifest.step) for manifest in self.keep.too_old(newest_first)]
            for name in [*old, *self._storage.leftovers()]:
                if name != self._held:
                    with suppress(OSError):
                        self._storage.remove(name)

    def _write_part(
        self, place: str, root: str, pieces: Iterable[Piece], sizes: dict[str, int]
    ) -> Part:
        hashes: Any = None
        directories = []
        for piece in pieces:
            if piece.name == MANIFEST_NAME:
                hashes = json.loads(piece.read())
            elif piece.name.endswith("/"):
                directories.append(root + safe_path(piece.name[:-1]))
                self._storage.make(f"{place}/{directories[-1]}")
            else:
                path = root + safe_path(piece.name)
                sizes[path] = 0
                sizes[path] = self._write_again(f"{place}/{path}", piece.chunks)
        names = {path.removeprefix(root) for path in sizes}
        if not isinstance(hashes, dict) or hashes.keys() != names:
            raise ValueError("the hashes that came are not those of the files that came")
        self._refuse_torn(place, sizes)
        files = [
            StoredFile(path, sizes[path], str(hashes[path.removeprefix(root)])) for path in sizes
        ]
        return Part(tuple(files), tuple(directories))

    def _write_again(self, path: str, chunks: Chunks) -> int:
        """Write a file that may be there, of an earlier try whose answer did not arrive."""
        try:
            return self._write_file(path, chunks)
        except FileExistsError:
            self._storage.remove_file(path)
            return self._write_file(path, chunks)

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

    def _problem_of(self, path: str, file: StoredFile, *, reads: bool) -> str:
        size = self._storage.size(path)
        if size != file.size:
            return f"has {size} bytes instead of {file.size}"
        if not reads:
            return ""
        with as_os_error(self._storage.url(path)), self._storage.open(path) as stream:
            if sha256_of(chunks_of(stream)) != file.sha256:
                return "does not have the content that was saved (its SHA-256 differs)"
        return ""


def _name(step: int) -> str:
    return f"step-{step:08d}"


def draft(
    step: int,
    parts: Sequence[Part],
    metrics: Mapping[str, float] | None = None,
    *,
    world_size: int | None = None,
    copies: Mapping[str, str] | None = None,
) -> Manifest:
    """Return the manifest of a checkpoint with these parts, but for what its store adds."""
    return Manifest(
        step=step,
        sequence=0,
        saved_at=_now(),
        files=tuple(file for part in parts for file in part.files),
        directories=tuple(each for part in parts for each in part.directories),
        world_size=world_size,
        copies=copies or {},
        metrics=metrics or {},
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
