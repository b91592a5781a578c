"""Files that Horovod and main write, uploaded when the ranks have ended. Runs in: the task."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from horovodrunner.flows.artifacts.places import MAX_RANK_BYTES
from horovodrunner.formatting import format_bytes, in_one_line
from horovodrunner.wire.events import Note, Sink, Storing, UploadArtifacts, UploadFile
from horovodrunner.wire.upload import Piece, TransferClient, chunks_of, in_thread

__all__ = ["bring_artifacts", "files_to_bring", "upload_artifacts", "upload_file"]

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
    client.upload(UploadArtifacts(client.run_id), _pieces(files))


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
        emit(Note(f"artifacts of {ranks} are lost: {in_one_line(error)}"))


def files_to_bring(directory: Path) -> tuple[dict[str, Path], str]:
    """Find the files that ranks have left, by name, and say which are too large to be brought.

    Of each rank the smallest come first, up to the limit. Links are followed to files only, and
    pipes and sockets stay where they are.
    """
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
    if not left_out:
        return files, ""
    more = f" and {len(left_out) - _MAX_NAMED} more" if len(left_out) > _MAX_NAMED else ""
    return files, (
        f"artifacts are left out, because {format_bytes(MAX_RANK_BYTES)} of each rank are brought: "
        f"{', '.join(left_out[:_MAX_NAMED])}{more}. Write large files to storage that all share"
    )


def _pieces(files: dict[str, Path]) -> Iterator[Piece]:
    for name, path in files.items():
        with path.open("rb") as file:
            size = path.stat().st_size
            yield Piece(name, size, chunks_of(file, size))
