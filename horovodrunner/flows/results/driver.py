"""What the ranks' mains returned, as it arrives. Runs in: the driver.

Rank 0's goes into the memory in which it is unpickled. The others' go into one file that has no
name, so that they take no memory until they are asked for, and nothing of them is ever left behind.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator

from horovodrunner.flows.outcome.outcome import Outcome, with_result
from horovodrunner.formatting import format_bytes
from horovodrunner.pickling.buffers import BufferedPickle, Layout, reader_of_pieces
from horovodrunner.wire.events import FrameError, UploadResult
from horovodrunner.wire.upload import IncomingPiece, TransferHandler

__all__ = ["ResultStore", "read_result"]

AT_ONCE = 8
"""So many ranks send their results at the same time; each takes a megabyte of the driver."""

_READ_BYTES = 16 * 1024 * 1024
_COPY_BYTES = 1024 * 1024


class ResultStore:
    """Takes the results of a run's ranks: only rank 0's, or all of them.

    Each attempt has a place of its own for them: what is still on its way when the next one begins
    gets there, and not among the next one's.
    """

    def __init__(self, *, of_all_ranks: bool = False) -> None:
        self._of_all_ranks = of_all_ranks
        self._turns = threading.Semaphore(AT_ONCE)
        self.size = 0
        self._came = _Came()

    def begin(self, size: int) -> None:
        """Wait for the results of so many ranks; what an earlier attempt's returned is dropped."""
        self.size = size
        self.drop()

    def drop(self) -> None:
        """Give up what has come."""
        self._came = _Came()

    @property
    def first(self) -> BufferedPickle | None:
        """What rank 0's main returned; the run may fail all the same."""
        return self._came.first

    @property
    def handler(self) -> TransferHandler:
        """What takes in uploads."""
        return TransferHandler("the result's transfer", self._receive, self._turns)

    def take(self, descriptor: int, layout: Layout, rank: int) -> None:
        """Copy a result that was written on this machine."""
        came = self._came
        if rank == 0:
            came.first = read_result(descriptor, layout)
            return
        with self._turns:
            came.store(rank, layout, _chunks(descriptor, sum(layout)))

    def take_rows(self, rows: Iterable[bytes]) -> Outcome:
        """Read a task's rows of the stage: its outcome, and results that came this way."""
        came, coming = self._came, iter(rows)
        outcome = Outcome.from_bytes(next(coming))
        if outcome.success is None:
            return outcome
        for header in coming:
            fields = json.loads(header)
            rank, layout = int(fields["rank"]), tuple(map(int, fields["layout"]))
            if rank == 0:
                came.first = BufferedPickle(layout)
                came.first.fill(reader_of_pieces(coming))
            else:
                came.store(rank, layout, _first_bytes(coming, sum(layout)))
        return with_result(outcome, came.first) if outcome.success.rank == 0 else outcome

    def missing(self) -> list[int]:
        """List the ranks whose results have not come, though all are wanted."""
        if not self._of_all_ranks:
            return []
        return [rank for rank in range(1, self.size) if rank not in self._came.places]

    def others(self) -> Iterator[BufferedPickle]:
        """Read what the ranks but 0 returned, one after the other, if all have come."""
        if self._of_all_ranks and not self.missing():
            yield from map(self.read, range(1, self.size))

    def read(self, rank: int) -> BufferedPickle:
        """Read what another rank than 0 returned into memory."""
        return self._came.read(rank)

    def _receive(self, request: UploadResult, pieces: Iterator[IncomingPiece]) -> None:
        layout, rank, came = request.layout, request.rank, self._came
        if rank and not (self._of_all_ranks and 0 < rank < self.size):
            raise FrameError(f"a result of rank {rank}, which is not wanted")
        # either makes room before the task sends anything
        pickled = _room(layout) if rank == 0 else None
        offset = came.make_room(sum(layout)) if rank else 0
        piece = next(pieces, None)
        size = 0 if piece is None else piece.size
        if piece is None or size != sum(layout):
            raise FrameError(f"a result of {size} bytes where {sum(layout)} were announced")
        if pickled is not None:
            pickled.fill(piece.read_into)
            came.first = pickled
        else:
            came.write(rank, layout, offset, piece.chunks)


class _Came:
    """What came of one attempt; its file is gone once nobody has this object any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file = -1
        self._end = 0
        self.first: BufferedPickle | None = None
        self.places: dict[int, tuple[int, Layout]] = {}

    def store(self, rank: int, layout: Layout, chunks: Iterable[bytes | memoryview]) -> None:
        self.write(rank, layout, self.make_room(sum(layout)), chunks)

    def make_room(self, size: int) -> int:
        """Return where in the file a result is to stand; nothing else is written there."""
        try:
            with self._lock:
                if self._file < 0:
                    self._open()
                offset = self._end
                if size:
                    os.posix_fallocate(self._file, offset, size)
                self._end += size
        except OSError as error:
            raise OSError(
                f"there is no room for its {format_bytes(size)} in {tempfile.gettempdir()} on the "
                f"driver ({os.strerror(error.errno or errno.EIO)}): return less, or set TMPDIR to "
                "a directory with more room before the driver starts"
            ) from error
        return offset

    def write(
        self, rank: int, layout: Layout, offset: int, chunks: Iterable[bytes | memoryview]
    ) -> None:
        at = offset
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                count = os.pwrite(self._file, view, at)
                at += count
                view = view[count:]
        with self._lock:
            self.places[rank] = offset, layout

    def read(self, rank: int) -> BufferedPickle:
        offset, layout = self.places[rank]
        return read_result(self._file, layout, offset)

    def _open(self) -> None:
        with tempfile.TemporaryFile(prefix="horovodrunner-results-") as file:
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)


def read_result(descriptor: int, layout: Layout, offset: int = 0) -> BufferedPickle:
    """Read a result that stands in a file of this machine into memory."""
    pickled = _room(layout)
    end = offset + sum(layout)

    def read_into(view: memoryview) -> None:
        nonlocal offset
        while view:
            count = os.preadv(descriptor, [view[:_READ_BYTES]], offset)
            if not count:
                raise EOFError(f"the file has {offset} bytes, not {end}")
            offset += count
            view = view[count:]

    pickled.fill(read_into)
    return pickled


def _chunks(descriptor: int, size: int) -> Iterator[bytes]:
    for offset in range(0, size, _COPY_BYTES):
        yield os.pread(descriptor, min(_COPY_BYTES, size - offset), offset)


def _first_bytes(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Yield as many pieces as have so many bytes; EOFError if there are too few."""
    while size > 0:
        piece = next(pieces, None)
        if piece is None:
            raise EOFError(f"the result's last {size} bytes are missing")
        size -= len(piece)
        yield piece


def _room(layout: Layout) -> BufferedPickle:
    try:
        return BufferedPickle(layout)
    except (OSError, MemoryError) as error:
        raise OSError(
            f"there is no memory for its {format_bytes(sum(layout))} on the driver ({error}): "
            "return less, or give the driver more memory"
        ) from error
