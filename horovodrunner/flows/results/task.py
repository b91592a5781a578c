"""What rank 0's main returned, on its way to the driver. Runs in: the task (np < 0: the driver).

Rank 0's worker writes it to a file without a name. Its task uploads it as soon as it is written,
while the other ranks go on. Where the driver cannot be reached it goes back as rows of the stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator

from horovodrunner.errors import PayloadError
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.formatting import format_bytes
from horovodrunner.pickling.buffers import Layout
from horovodrunner.wire.events import UploadResult
from horovodrunner.wire.upload import PeerFailedError, Piece, TransferClient, in_thread

__all__ = ["ResultUpload", "ResultUploader", "TakeResult", "file_without_a_name"]

TakeResult = Callable[[int, Layout], None]
"""Takes the file of a descriptor; blocks, and raises an exception when it fails."""

_WINDOW_BYTES = 16 * 1024 * 1024
"""So much of the file is mapped at a time."""

_CHUNK_BYTES = 4 * 1024 * 1024
"""After so much it is seen that the driver does not want the rest."""


class ResultUploader:
    """Lets rank 0's result be taken while the run goes on."""

    def __init__(self, take: TakeResult, descriptor: int, on_error: Callable[[str], None]) -> None:
        self._take = take
        self._descriptor = descriptor
        self._on_error = on_error
        self._taking: asyncio.Task[None] | None = None

    def written(self, layout: Layout) -> None:
        """Let the file, which is complete, be taken."""
        self._taking = asyncio.create_task(self._take_file(layout))

    async def finish(self, stop: asyncio.Event) -> bool:
        """Wait for the file to be taken, or for `stop`; return whether it is not under way."""
        if self._taking is None:
            return False
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([self._taking, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        return self._taking.done()

    async def close(self) -> None:
        """Give the file up, wherever it is."""
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait([self._taking])

    async def _take_file(self, layout: Layout) -> None:
        own = os.dup(self._descriptor)  # the thread may outlive this object by a moment

        def take() -> None:
            try:
                self._take(own, layout)
            finally:
                os.close(own)

        try:
            await in_thread(take)
        except PayloadError as error:
            self._on_error(str(error))
        except Exception as error:  # noqa: BLE001 - the run has to end, and to say why
            self._on_error(f"what main returned does not reach the driver: {error}")


class ResultUpload:
    """Uploads the result to the driver, or keeps it for the stage's rows."""

    def __init__(self, job: JobSpec, client: TransferClient) -> None:
        self._job = job
        self._client = client
        self._kept: tuple[int, int] | None = None

    def take(self, descriptor: int, layout: Layout, *, reaches_driver: bool) -> None:
        """Send the file; if no connection carries it, keep it for the stage's rows."""
        size, why = sum(layout), ""
        if reaches_driver:
            piece = Piece("result", size, _mapped_chunks(descriptor, size))
            try:
                self._client.upload(UploadResult(self._client.run_id, layout), [piece])
            except PeerFailedError:
                raise  # it would not have room for the rows either
            except OSError as error:
                if self._client.is_aborted:
                    raise
                why = f" ({error})"
            else:
                return
        self._refuse_beyond_limit(size, why)
        self._kept = os.dup(descriptor), size

    def rows(self, row_bytes: int) -> Iterator[bytes]:
        """Yield what was not uploaded, in pieces of at most `row_bytes`."""
        if self._kept is not None:
            descriptor, size = self._kept
            for offset in range(0, size, row_bytes):
                yield os.pread(descriptor, min(row_bytes, size - offset), offset)

    def close(self) -> None:
        """Give up what was kept."""
        if self._kept is not None:
            os.close(self._kept[0])
            self._kept = None

    def _refuse_beyond_limit(self, size: int, why: str) -> None:
        limit = self._job.max_result_bytes
        if limit is None or size <= limit:
            return
        host, port = self._job.driver_address or ("", 0)
        raise PayloadError(
            f"the value that main returned has {format_bytes(size)} pickled, and Spark "
            f"takes at most {format_bytes(limit)} back to the driver. Without Spark it cannot "
            f"travel, because rank 0's task does not reach the driver at {host}:{port}{why}: make "
            "that possible (spark.horovodrunner.driver.host and spark.horovodrunner.driver.port), "
            "return less, or start the session with a larger spark.driver.maxResultSize (0 means "
            "no limit)"
        )


def file_without_a_name() -> int:
    """Open a file that is gone with its last descriptor: in memory, or else in a directory."""
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):  # a kernel that does not know it
            return os.memfd_create("horovodrunner-result")
    with tempfile.TemporaryFile(prefix="horovodrunner-result-") as file:
        return os.dup(file.fileno())


def _mapped_chunks(descriptor: int, size: int) -> Iterator[memoryview]:
    """Map the file window by window: faster than to read it, and than sendfile(2) from memory."""
    for start in range(0, size, _WINDOW_BYTES):
        length = min(_WINDOW_BYTES, size - start)
        with (
            mmap.mmap(descriptor, length, prot=mmap.PROT_READ, offset=start) as window,
            memoryview(window) as view,
        ):
            for offset in range(0, length, _CHUNK_BYTES):
                with view[offset : offset + _CHUNK_BYTES] as chunk:
                    yield chunk
