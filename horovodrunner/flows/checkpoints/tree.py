"""The files of a checkpoint in a local directory: read to be stored, written to be used.

Runs in: the driver and the task.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from horovodrunner.flows.checkpoints.manifest import MANIFEST_NAME, Manifest, safe_path
from horovodrunner.wire.upload import Piece, chunks_of

__all__ = ["Chunks", "files_below", "pieces_of_tree", "restore", "sha256_of", "write_pieces"]

Chunks = Iterable[bytes | memoryview]


def pieces_of_tree(
    directory: Path, is_wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[Piece]:
    """Read what is below a local directory; symbolic links are followed.

    Empty directories, whose names end with ``/``, come first, then the files that are wanted, and
    under the manifest's name their SHA-256: the sender hashes, who reads the checkpoint compares.
    """
    files, empty_directories = files_below(directory)
    for name in files:
        safe_path(name)  # a file of the manifest's name would pass for the hashes
    files = {name: path for name, path in files.items() if is_wanted(name)}

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


def restore(
    manifest: Manifest, directory: Path, pieces: Iterable[Piece], rank: int | None = None
) -> None:
    """Write the files of a rank, which come in the manifest's order, and check their hashes."""
    files = manifest.files_of(rank)
    for (path, file), piece in zip(files.items(), pieces, strict=True):
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as sink:
            sha256 = sha256_of(piece.chunks, sink)
        if sha256 != file.sha256:
            raise OSError(
                f"{file.path} of the checkpoint of step {manifest.step} arrived with another "
                "SHA-256 than its manifest has: delete that checkpoint to go on from the one before"
            )
    for name in manifest.directories_of(rank):
        (directory / name).mkdir(parents=True, exist_ok=True)


def files_below(directory: Path) -> tuple[dict[str, Path], list[str]]:
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


def sha256_of(chunks: Chunks, sink: BinaryIO | None = None) -> str:
    """Read chunks, write them if there is where to, and return their SHA-256."""
    digest = hashlib.sha256()
    for chunk in _hashed(chunks, digest):
        if sink is not None:
            sink.write(chunk)
    return digest.hexdigest()


def write_pieces(pieces: Iterable[Piece], path: Path) -> None:
    """Write pieces one after the other to a new file."""
    with path.open("xb") as file:
        for piece in pieces:
            for chunk in piece.chunks:
                file.write(chunk)
