"""The server end of the driver channel: one port, one accepted run. Runs in: the driver."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from horovodrunner.errors import ConfigurationError
from horovodrunner.flows.artifacts.task import BroughtFiles, serve_files
from horovodrunner.flows.checkpoints.backend import SILENCE_SECONDS, serve_depot
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.members.driver import GatherPoint
from horovodrunner.flows.results.task import receive_result
from horovodrunner.flows.telemetry.phases import Phase
from horovodrunner.pickling.buffers import BufferedPickle
from horovodrunner.wire.bulk import BulkConnection
from horovodrunner.wire.connection import Connection, FrameServer
from horovodrunner.wire.job import Outcome

__all__ = ["RETRY_REFUSED", "DriverChannel"]

RETRY_REFUSED = (
    "Spark tried to run the barrier stage a second time, most likely because it lost an executor. "
    "main is not run twice unasked"
)
CLOSE_SECONDS = 10.0
STORING_SECONDS = 10.0
"""How long the word that a file is still on its way holds good."""


class DriverChannel:
    """Listens for partition 0 of one run, in a thread of its own.

    Parameters
    ----------
    run_id
        The run that may register, once.
    token
        The run's secret.
    console
        Takes what the run wants to show.
    on_event
        Called, in the channel's thread, when the run registered or reported its failure.
    store
        Where checkpoints that come through the channel are kept, if they do.
    files
        Where the files go that Horovod writes, if any are wanted.
    size
        Number of the run's tasks.
    """

    def __init__(
        self,
        run_id: str,
        token: bytes,
        console: Console,
        on_event: Callable[[], None],
        store: CheckpointStore | None = None,
        *,
        files: BroughtFiles | None = None,
        size: int = 1,
    ) -> None:
        self._run_id = run_id
        self._console = console
        self._on_event = on_event
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="horovodrunner-channel", daemon=True
        )
        self._server = FrameServer(token, self._serve, console.note, peers=size)
        self._store = store
        self._files = files
        self._transfers: dict[BulkConnection, threading.Thread] = {}
        self._gather_point = GatherPoint(size)
        self._leader: Connection | None = None
        self._left = threading.Event()
        self._left.set()
        self.has_heard = False
        """Whether any of the run's tasks has connected."""
        self.registered = False
        """Whether partition 0 has connected: the stage's tasks have started."""
        self.retried = False
        """Whether Spark tried the stage again."""
        self.failure: Outcome | None = None
        """The run's failure, when it was reported ahead of the stage's end."""
        self.result: BufferedPickle | None = None
        """What rank 0's main returned; the run may fail all the same."""
        self.placement: list[tuple[int, int, str]] = []
        """Partition, rank and host of every rank, once they are placed."""
        self.storing_until = 0.0
        """Until then (monotonic clock) a file may be on its way after the ranks' end."""
        self.has_taken_leave = False
        """Whether partition 0 came to its end, and so has told about everything."""

    def open(self, host: str, port: int) -> int:
        """Start to listen.

        Parameters
        ----------
        host
            Address to bind.
        port
            Port to bind, 0 for any free one.

        Returns
        -------
        int
            The port.

        Raises
        ------
        ConfigurationError
            If the port cannot be bound.
        """
        self._thread.start()
        opening = asyncio.run_coroutine_threadsafe(self._server.start(host, port), self._loop)
        try:
            return opening.result()
        except OSError as error:
            self.close()
            raise ConfigurationError(
                f"the driver channel cannot listen on {host or 'all addresses'} port {port}: "
                f"{error}; choose another one with spark.horovodrunner.driver.port (0 picks a "
                "free one)"
            ) from error

    def stop_run(self) -> None:
        """Ask partition 0 to end the run."""

        def send() -> None:
            if self._leader is not None:
                self._leader.send("stop")

        self._loop.call_soon_threadsafe(send)

    def wait_for_leaving(self, timeout: float) -> None:
        """Wait until partition 0 has ended its part of the run and closed the connection.

        Parameters
        ----------
        timeout
            Most seconds to wait.
        """
        self._left.wait(timeout)

    def close(self) -> None:
        """Close the port and every connection."""
        if not self._thread.is_alive():  # never opened, or closed already
            self._loop.close()
            return
        closing = asyncio.run_coroutine_threadsafe(self._server.close(), self._loop)
        closing.result(CLOSE_SECONDS)
        for transfer, thread in list(self._transfers.items()):
            transfer.close()
            thread.join(CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> DriverChannel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def _serve(self, connection: Connection) -> None:
        frame = await connection.receive()
        if frame is None or frame.header.get("run_id") != self._run_id:
            return
        self.has_heard = True
        note, header = self._console.note, frame.header
        if frame.kind == "checkpoint" and (store := self._store) is not None:
            await self._serve_transfer(connection, lambda t: serve_depot(t, header, store, note))
        if frame.kind == "file" and (files := self._files) is not None:
            await self._serve_transfer(connection, lambda t: serve_files(t, header, files, note))
        if frame.kind == "gather" and not await self._gather_point.serve(connection, frame):
            self._refuse_retry(connection)
        if frame.kind == "result":
            await self._serve_transfer(connection, lambda t: self._receive_result(t, header))
        if frame.kind != "register":
            return
        if self.registered:
            self._refuse_retry(connection)
            return
        self.registered = True
        self._leader = connection
        self._left.clear()
        connection.send("accepted")
        self._on_event()
        try:
            self.has_taken_leave = await self._show(connection)
        finally:
            self._leader = None
            self._left.set()
        if not self.has_taken_leave and self.failure is None:
            self._console.note(
                f"the connection to rank 0's task at {connection.peer} is lost; if the run goes "
                "on, its output stays in the executor's log"
            )

    def _refuse_retry(self, connection: Connection) -> None:
        self.retried = True
        connection.send("refused", why=RETRY_REFUSED)

    def _receive_result(self, transfer: BulkConnection, header: dict[str, Any]) -> None:
        def keep(result: BufferedPickle) -> None:
            self.result = result

        receive_result(transfer, header, self._console.note, keep)

    async def _serve_transfer(
        self, connection: Connection, serve_peer: Callable[[BulkConnection], None]
    ) -> None:
        transfer = BulkConnection(connection.detach(), SILENCE_SECONDS)
        ended = asyncio.Event()

        def serve() -> None:
            try:
                serve_peer(transfer)
            finally:
                transfer.close()
                with contextlib.suppress(RuntimeError):  # the channel is closed
                    self._loop.call_soon_threadsafe(ended.set)

        thread = threading.Thread(target=serve, name="horovodrunner-transfer", daemon=True)
        self._transfers[transfer] = thread
        thread.start()
        await ended.wait()
        thread.join()
        del self._transfers[transfer]

    async def _show(self, connection: Connection) -> bool:
        """Show what the run tells; True when it took its leave at the end."""
        while (frame := await connection.receive()) is not None:
            if frame.kind == "lines":
                self._console.lines(bytes(frame.body))
            elif frame.kind == "message":
                self._console.message(int(frame.header["rank"]), bytes(frame.body))
            elif frame.kind == "note":
                text = bytes(frame.body).decode(errors="replace")
                self._console.note(text, routine=bool(frame.header.get("routine")))
            elif frame.kind == "failed":
                self.failure = Outcome.from_frame(frame.header["outcome"], frame.body)
                self._on_event()
            elif frame.kind == "placed":
                self.placement = [(int(p), int(r), str(h)) for p, r, h in frame.header["ranks"]]
            elif frame.kind == "phases":
                self._console.phases([Phase(*fields) for fields in frame.header["phases"]])
            elif frame.kind == "storing":
                self.storing_until = time.monotonic() + STORING_SECONDS
            elif frame.kind == "leave":
                return True
        return False
