"""What rank 0's main returned, on its way to the driver. Runs in: task and driver.

Rank 0's worker writes it to a file without a name. Its task sends it over a connection of its own
to the driver channel's port as soon as it is written, while the other ranks go on::

    task ── result ──▶ driver, which makes room for it
    task ◀─ go ─────── driver
    task ── content ─▶ driver, which answers "stored" or "failed"

Where the driver cannot be reached it goes back as rows of the stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from horovodrunner.flows.checkpoints.backend import HANG_UP_SECONDS, DriverLine
from horovodrunner.flows.checkpoints.task import in_thread
from horovodrunner.formatting import format_bytes
from horovodrunner.pickling.buffers import BufferedPickle, Layout
from horovodrunner.wire.bulk import BulkConnection, PeerFailedError
from horovodrunner.wire.frames import FrameError
from horovodrunner.wire.job import JobSpec

__all__ = ["DriverResult", "LocalResult", "ResultCourier", "ResultTaker", "receive_result"]

_WINDOW_BYTES = 16 * 1024 * 1024
"""So much of the file is mapped at a time."""

_PIECE_BYTES = 4 * 1024 * 1024
"""After so much it is seen that the driver does not want the rest."""


class ResultTaker(Protocol):
    """Takes what rank 0's main returned."""

    def problem(self, layout: Layout) -> str:
        """Say why it cannot be taken, before anything is tried; "" if it can."""

    def take(self, descriptor: int, layout: Layout) -> None:
        """Take the file; blocks, and raises OSError when it fails."""

    def abort(self) -> None:
        """Make :meth:`take`, for which another thread waits, raise soon."""


class ResultCourier:
    """Takes the file from the worker to the taker while the run goes on.

    Parameters
    ----------
    taker
        Takes the file.
    """

    def __init__(self, taker: ResultTaker) -> None:
        self._taker = taker
        self._taking: asyncio.Task[None] | None = None
        self.on_error: Callable[[str], None] = lambda text: None
        """Takes a sentence when the file cannot be taken."""
        self.descriptor = _file_without_a_name()
        """Of the file, for the worker."""

    def written(self, layout: Layout) -> None:
        """Let the file be taken.

        Parameters
        ----------
        layout
            What stands in it.
        """
        if problem := self._taker.problem(layout):
            self.on_error(problem)
            return
        self._taking = asyncio.create_task(self._take(layout))

    async def finish(self, stop: asyncio.Event) -> bool:
        """Wait until it is taken or cannot be, or until the run is to end.

        Parameters
        ----------
        stop
            Ends the waiting.

        Returns
        -------
        bool
            False if it still is on its way, or never was.
        """
        if self._taking is None:
            return False
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([self._taking, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        return self._taking.done()

    async def close(self) -> None:
        """Give the file up, wherever it is."""
        self._taker.abort()
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait([self._taking])
        os.close(self.descriptor)

    async def _take(self, layout: Layout) -> None:
        own = os.dup(self.descriptor)  # the thread may outlive this object by a moment

        def take() -> None:
            try:
                self._taker.take(own, layout)
            finally:
                os.close(own)

        try:
            await in_thread(take)
        except Exception as error:  # noqa: BLE001 - the run has to end, and to say why
            self.on_error(f"what main returned does not reach the driver: {error}")


class LocalResult:
    """Takes the result on the driver itself."""

    def __init__(self) -> None:
        self.result: BufferedPickle | None = None
        """What was taken."""
        self._aborted = False

    def problem(self, layout: Layout) -> str:
        """Say nothing: there is no limit here."""
        return ""

    def take(self, descriptor: int, layout: Layout) -> None:
        """Read the file into memory."""
        pickled = _room(layout)
        offset = 0

        def read_into(view: memoryview) -> None:
            nonlocal offset
            while view:
                if self._aborted:
                    raise ConnectionAbortedError("the run has ended")
                count = os.preadv(descriptor, [view[:_WINDOW_BYTES]], offset)
                if not count:
                    raise EOFError(f"the file has {offset} bytes, not {sum(layout)}")
                offset += count
                view = view[count:]

        pickled.fill(read_into)
        self.result = pickled

    def abort(self) -> None:
        """Stop to read."""
        self._aborted = True


class DriverResult(DriverLine):
    """Sends the result to the driver channel's port, or keeps it for the stage's rows.

    Parameters
    ----------
    job
        The run.
    """

    def __init__(self, job: JobSpec) -> None:
        super().__init__(job)
        self.reaches_driver = False
        """Whether the run could be registered with the driver."""
        self._kept: tuple[int, int] | None = None

    def problem(self, layout: Layout) -> str:
        """Say that it is too large for Spark, where only Spark can carry it."""
        return "" if self.reaches_driver else self._beyond_limit(layout, "")

    def take(self, descriptor: int, layout: Layout) -> None:
        """Send the file; if no connection carries it, keep it for the stage's rows."""
        if self.reaches_driver:
            try:
                self._send(descriptor, layout)
            except PeerFailedError:
                raise  # it would not have room for the rows either
            except OSError as error:
                if self._aborted:
                    raise
                if problem := self._beyond_limit(layout, f" ({error})"):
                    raise OSError(problem) from error
            else:
                return
        self._kept = os.dup(descriptor), sum(layout)

    def rows(self, row_bytes: int) -> Iterator[bytes]:
        """Read what was not sent.

        Parameters
        ----------
        row_bytes
            Most bytes per piece.

        Yields
        ------
        bytes
            The file's next bytes; nothing if it was sent.
        """
        if self._kept is None:
            return
        descriptor, size = self._kept
        for offset in range(0, size, row_bytes):
            yield os.pread(descriptor, min(row_bytes, size - offset), offset)

    def close(self) -> None:
        """Give up what was kept."""
        if self._kept is not None:
            os.close(self._kept[0])
            self._kept = None

    def _send(self, descriptor: int, layout: Layout) -> None:
        with self._connection("result", layout=layout) as connection:
            try:
                pieces = _pieces_of(descriptor, sum(layout))
                connection.send_body("content", sum(layout), pieces)
            except ConnectionError:
                connection.expect("stored")  # the driver may have said why it hung up
                raise
            connection.expect("stored")

    def _beyond_limit(self, layout: Layout, why: str) -> str:
        limit = self._job.max_result_bytes
        if limit is None or sum(layout) <= limit:
            return ""
        host, port = self._job.driver_address or ("", 0)
        return (
            f"the value that main returned has {format_bytes(sum(layout))} pickled, and Spark "
            f"takes at most {format_bytes(limit)} back to the driver. Without Spark it cannot "
            f"travel, because rank 0's task does not reach the driver at {host}:{port}{why}: make "
            "that possible (spark.horovodrunner.driver.host and spark.horovodrunner.driver.port), "
            "return less, or start the session with a larger spark.driver.maxResultSize (0 means "
            "no limit)"
        )


def receive_result(
    connection: BulkConnection,
    request: Mapping[str, Any],
    note: Callable[[str], None],
    keep: Callable[[BufferedPickle], None],
) -> None:
    """Take, on the driver, what a :class:`DriverResult` sends.

    Parameters
    ----------
    connection
        To the task.
    request
        The header of the task's ``result`` frame.
    note
        Takes a sentence for the user.
    keep
        Takes the result, before the task is told that it is here.
    """
    layout = tuple(int(size) for size in request["layout"])
    try:
        pickled = _room(layout)
        connection.send("go")
        _, size = connection.expect("content")
        if size != sum(layout):
            raise FrameError(f"a result of {size} bytes where {sum(layout)} were announced")
        pickled.fill(connection.read_into)
        keep(pickled)
        connection.send("stored")
    except ConnectionError as error:
        note(f"the result's transfer broke off: {error}")
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):  # it is gone, or the channel is closed
            connection.send("failed", why=str(error))
            connection.discard_rest(HANG_UP_SECONDS)


def _room(layout: Layout) -> BufferedPickle:
    try:
        return BufferedPickle(layout)
    except (OSError, MemoryError) as error:
        raise OSError(
            f"there is no memory for its {format_bytes(sum(layout))} on the driver ({error}): "
            "return less, or give the driver more memory"
        ) from error


def _file_without_a_name() -> int:
    """Open a file that is gone with its last descriptor: in memory, or else in a directory."""
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):  # a kernel that does not know it
            return os.memfd_create("horovodrunner-result")
    with tempfile.TemporaryFile(prefix="horovodrunner-result-") as file:
        return os.dup(file.fileno())


def _pieces_of(descriptor: int, size: int) -> Iterator[memoryview]:
    """Map the file window by window: faster than to read it, and than sendfile(2) from memory."""
    for start in range(0, size, _WINDOW_BYTES):
        length = min(_WINDOW_BYTES, size - start)
        with (
            mmap.mmap(descriptor, length, prot=mmap.PROT_READ, offset=start) as window,
            memoryview(window) as view,
        ):
            for piece in range(0, length, _PIECE_BYTES):
                with view[piece : piece + _PIECE_BYTES] as part:
                    yield part
