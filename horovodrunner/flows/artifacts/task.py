"""Files that Horovod and main write, uploaded when the ranks have ended. Runs in: the task."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from horovodrunner.flows.artifacts.places import MAX_RANK_BYTES
from horovodrunner.formatting import format_bytes, in_one_line, printable
from horovodrunner.wire.events import Note, Sink, Storing, UploadArtifacts, UploadFile
from horovodrunner.wire.upload import PeerFailedError, Piece, TransferClient, chunks_of, in_thread

__all__ = ["bring_artifacts", "files_to_bring", "pieces_of", "upload_artifacts", "upload_file"]

STORING_SECONDS = 2.0
"""How often it is reported that files are still on their way."""

_MAX_NAMED = 5


def upload_file(client: TransferClient, variable: str, path: Path) -> None:
    """Send the driver the file that a variable names; no piece stands for no file."""
    request = UploadFile(client.run_id, variable)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        client.upload(request, [])
        return
    with file:
        size = path.stat().st_size
        # no more than that: a worker that hangs may still write
        client.upload(request, [Piece(variable, size, chunks_of(file, size))])


def upload_artifacts(client: TransferClient, files: dict[str, Path]) -> None:
    """Send the driver files of a task's ranks, by their names there."""
    client.upload(UploadArtifacts(client.run_id), pieces_of(files))


async def bring_artifacts(
    take: Callable[[dict[str, Path]], None], directory: Path, emit: Sink
) -> None:
    """Hand over what the ranks of a task have left; `emit` hears of it while it goes on."""
    if not directory.is_dir():
        return
    files, left_out = await in_thread(files_to_bring, directory)
    if left_out:
        emit(Note(left_out))
    if not files:
        return
    bringing = asyncio.create_task(in_thread(take, files))
    while not bringing.done():
        emit(Storing())
        await asyncio.wait([bringing], timeout=STORING_SECONDS)
    if (error := bringing.exception()) is not None:
        ranks = ", ".join(sorted({name.partition("/")[0] for name in files}))
        why = str(error) if type(error) in (OSError, PeerFailedError) else in_one_line(error)
        emit(Note(f"not all artifacts of {ranks} have come: {why}"))


def files_to_bring(directory: Path) -> tuple[dict[str, Path], str]:
    """Find the files that ranks have left, by name, and say which are not brought.

    Of each rank the smallest come first, up to the limit. Links are followed to files only, and
    pipes and sockets stay where they are.
    """
    unreadable: list[str] = []
    found: dict[str, list[tuple[int, str]]] = {}
    for here, _, names in os.walk(directory):
        for name in names:
            file = Path(here, name)
            try:
                status = file.stat()
            except OSError:  # a link to nowhere
                continue
            if stat.S_ISREG(status.st_mode):
                path = file.relative_to(directory).as_posix()
                if not os.access(file, os.R_OK):
                    unreadable.append(path)
                    continue
                found.setdefault(path.partition("/")[0], []).append((status.st_size, path))
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for sizes in found.values():
        total = 0
        for size, path in sorted(sizes):
            total += size
            if total <= MAX_RANK_BYTES:
                files[path] = directory / path
            else:
                left_out.append(f"{path} ({format_bytes(size)})")
    reasons = []
    if left_out:
        reasons.append(
            f"{format_bytes(MAX_RANK_BYTES)} of each rank are brought: {_first_of(left_out)}. "
            "Write large files to storage that all share"
        )
    if unreadable:
        reasons.append(f"they cannot be read: {_first_of(unreadable)}")
    why = "; and because ".join(reasons)
    return files, f"artifacts are left out, because {why}" if why else ""


def _first_of(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{', '.join(map(printable, names[:_MAX_NAMED]))}{more}"


def pieces_of(files: dict[str, Path]) -> Iterator[Piece]:
    """Open one file after the other; one that went meanwhile is named in an error at the end."""
    problems = []
    for name, path in files.items():
        try:
            file = path.open("rb")
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        with file:
            size = os.fstat(file.fileno()).st_size
            yield Piece(name, size, chunks_of(file, size))
    if problems:
        raise OSError(f"{', '.join(problems[:_MAX_NAMED])}; the others are kept")
