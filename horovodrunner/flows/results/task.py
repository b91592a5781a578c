"""What the ranks' mains returned, on its way to the driver. Runs in: the task (np < 0: the driver).

A worker whose value is wanted writes it to a file without a name. Its task uploads it as soon as it
is written, while other ranks go on. Where the driver cannot be reached it goes back as rows of the
stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator

from horovodrunner.errors import PayloadError
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.formatting import format_bytes
from horovodrunner.pickling.buffers import Layout
from horovodrunner.wire.events import Sink, Storing, UploadResult
from horovodrunner.wire.upload import PeerFailedError, Piece, TransferClient, in_thread

__all__ = ["ResultUpload", "ResultUploader", "TakeResult", "file_without_a_name"]

TakeResult = Callable[[int, Layout, int], None]
"""Takes the file of a descriptor, and of a rank; blocks, and raises when it fails."""

STORING_SECONDS = 2.0
"""How often it is reported that results are still on their way."""

_WINDOW_BYTES = 16 * 1024 * 1024
"""So much of the file is mapped at a time."""

_CHUNK_BYTES = 4 * 1024 * 1024
"""After so much it is seen that the driver does not want the rest."""


class ResultUploader:
    """Lets the results of a task's ranks be taken while the run goes on."""

    def __init__(self, take: TakeResult, on_error: Callable[[int, str], None]) -> None:
        self._take = take
        self._on_error = on_error
        self._taking: dict[int, asyncio.Task[None]] = {}

    def written(self, rank: int, descriptor: int, layout: Layout) -> None:
        """Let a rank's file, which is complete, be taken."""
        self._taking[rank] = asyncio.create_task(self._take_file(rank, descriptor, layout))

    async def finish(self, stop: asyncio.Event, emit: Sink) -> bool:
        """Wait until the files are taken, or for `stop`; return whether there were any, and are.

        `emit` hears of it while they are on their way.
        """
        stopping = asyncio.create_task(stop.wait())
        try:
            while (under_way := self._under_way()) and not stop.is_set():
                emit(Storing())
                await asyncio.wait(
                    [*under_way, stopping],
                    timeout=STORING_SECONDS,
                    return_when=asyncio.FIRST_COMPLETED,
                )
        finally:
            stopping.cancel()
        return bool(self._taking) and not self._under_way()

    async def close(self) -> None:
        """Give the files up, wherever they are."""
        for taking in self._taking.values():
            taking.cancel()
        await asyncio.gather(*self._taking.values(), return_exceptions=True)

    def _under_way(self) -> list[asyncio.Task[None]]:
        return [taking for taking in self._taking.values() if not taking.done()]

    async def _take_file(self, rank: int, descriptor: int, layout: Layout) -> None:
        own = os.dup(descriptor)  # the thread may outlive this object by a moment

        def take() -> None:
            try:
                self._take(own, layout, rank)
            finally:
                os.close(own)

        try:
            await in_thread(take)
        except PayloadError as error:
            self._on_error(rank, str(error))
        except Exception as error:  # noqa: BLE001 - the run has to end, and to say why
            self._on_error(rank, f"what main returned does not reach the driver: {error}")


class ResultUpload:
    """Uploads results to the driver, or keeps them for the stage's rows."""

    def __init__(self, job: JobSpec, client: TransferClient) -> None:
        self._job = job
        self._client = client
        self._kept: dict[int, tuple[int, Layout]] = {}

    def take(self, descriptor: int, layout: Layout, rank: int, *, reaches_driver: bool) -> None:
        """Send the file; if no connection carries it, keep it for the stage's rows."""
        size, why = sum(layout), ""
        if reaches_driver:
            piece = Piece("result", size, _mapped_chunks(descriptor, size))
            try:
                self._client.upload(UploadResult(self._client.run_id, layout, rank), [piece])
            except PeerFailedError:
                raise  # it would not have room for the rows either
            except OSError as error:
                if self._client.is_aborted:
                    raise
                why = f" ({error})"
            else:
                return
        self._refuse_beyond_limit(size, why, rank)
        self._kept[rank] = os.dup(descriptor), layout

    def rows(self, row_bytes: int) -> Iterator[bytes]:
        """Yield what was not uploaded: of each rank what it is, and pieces of `row_bytes`."""
        for rank, (descriptor, layout) in self._kept.items():
            yield json.dumps({"rank": rank, "layout": layout}).encode()
            size = sum(layout)
            for offset in range(0, size, row_bytes):
                yield os.pread(descriptor, min(row_bytes, size - offset), offset)

    def close(self) -> None:
        """Give up what was kept."""
        for descriptor, _ in self._kept.values():
            os.close(descriptor)
        self._kept.clear()

    def _refuse_beyond_limit(self, size: int, why: str, rank: int) -> None:
        limit = self._job.max_result_bytes
        kept = sum(sum(layout) for _, layout in self._kept.values())
        if limit is None or kept + size <= limit:
            return
        host, port = self._job.driver_address or ("", 0)
        what = "the value that main returned has"
        if kept:
            size, what = kept + size, "what the ranks of one task returned has"
        raise PayloadError(
            f"{what} {format_bytes(size)} pickled, and Spark "
            f"takes at most {format_bytes(limit)} back to the driver. Without Spark it cannot "
            f"travel, because rank {rank}'s task does not reach the driver at {host}:{port}{why}: "
            "make that possible (spark.horovodrunner.driver.host and "
            "spark.horovodrunner.driver.port), return less, or start the session with a larger "
            "spark.driver.maxResultSize (0 means no limit)"
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
