"""Files that Horovod writes, uploaded when the ranks have ended. Runs in: the task."""

from __future__ import annotations

from pathlib import Path

from horovodrunner.wire.events import UploadFile
from horovodrunner.wire.upload import Piece, TransferClient, chunks_of

__all__ = ["upload_file"]


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
