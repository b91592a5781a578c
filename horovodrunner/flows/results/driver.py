"""What rank 0's main returned, as it arrives. Runs in: the driver."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from horovodrunner.formatting import format_bytes
from horovodrunner.pickling.buffers import BufferedPickle, Layout
from horovodrunner.wire.events import FrameError, UploadResult
from horovodrunner.wire.upload import IncomingPiece, TransferHandler

__all__ = ["read_result", "result_handler"]

_READ_BYTES = 16 * 1024 * 1024


def result_handler(keep: Callable[[BufferedPickle], None]) -> TransferHandler:
    """Make what takes an uploaded result; `keep` gets it before the task hears that it is here."""

    def receive(request: UploadResult, pieces: Iterator[IncomingPiece]) -> None:
        layout = request.layout
        pickled = _room(layout)
        piece = next(pieces, None)
        size = 0 if piece is None else piece.size
        if piece is None or size != sum(layout):
            raise FrameError(f"a result of {size} bytes where {sum(layout)} were announced")
        pickled.fill(piece.read_into)
        keep(pickled)

    return TransferHandler("the result's transfer", receive)


def read_result(descriptor: int, layout: Layout) -> BufferedPickle:
    """Read a result that was written on this machine into memory."""
    pickled = _room(layout)
    offset = 0

    def read_into(view: memoryview) -> None:
        nonlocal offset
        while view:
            count = os.preadv(descriptor, [view[:_READ_BYTES]], offset)
            if not count:
                raise EOFError(f"the file has {offset} bytes, not {sum(layout)}")
            offset += count
            view = view[count:]

    pickled.fill(read_into)
    return pickled


def _room(layout: Layout) -> BufferedPickle:
    try:
        return BufferedPickle(layout)
    except (OSError, MemoryError) as error:
        raise OSError(
            f"there is no memory for its {format_bytes(sum(layout))} on the driver ({error}): "
            "return less, or give the driver more memory"
        ) from error
