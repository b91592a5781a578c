"""The server end of the driver channel: one port, one accepted run. Runs in: the driver."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import ClassVar

from horovodrunner.errors import ConfigurationError
from horovodrunner.flows.artifacts.driver import BroughtFiles, file_handler
from horovodrunner.flows.artifacts.store import ArtifactStore
from horovodrunner.flows.checkpoints.driver import CheckpointReceiver
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.members.driver import GatherPoint
from horovodrunner.flows.outcome.outcome import Outcome
from horovodrunner.flows.results.driver import ResultStore
from horovodrunner.wire.events import (
    Accepted,
    CheckpointStored,
    Event,
    Failed,
    Gather,
    Handlers,
    Leave,
    Placed,
    Points,
    Profile,
    RankStates,
    Refused,
    Register,
    SaveWanted,
    Stop,
    Storing,
    UploadArtifacts,
    UploadFile,
    UploadResult,
    Usage,
    dispatcher,
    ignore,
    refuse,
)
from horovodrunner.wire.server import EventServer
from horovodrunner.wire.stream import Connection
from horovodrunner.wire.upload import Transfer, TransferHandler

__all__ = ["RETRY_REFUSED", "DriverChannel"]

RETRY_REFUSED = (
    "Spark tried to run the barrier stage a second time, most likely because it lost an executor. "
    "main is not run twice unasked"
)
CLOSE_SECONDS = 10.0
STORING_SECONDS = 10.0
"""How long the word that a file is still on its way holds good."""


_FOR_OBSERVERS: Handlers = dict.fromkeys(
    (CheckpointStored, Points, Profile, RankStates, Usage), ignore
)
"""What tasks tell in any case, also when nobody follows the run."""

_logger = logging.getLogger(__name__)


class DriverChannel:
    """Listens for partition 0 of one run, in a thread of its own."""

    _open: ClassVar[weakref.WeakSet[DriverChannel]] = weakref.WeakSet()

    def __init__(
        self,
        run_id: str,
        token: bytes,
        console: Console,
        on_event: Callable[[], None],
        store: CheckpointStore | None = None,
        *,
        files: BroughtFiles | None = None,
        artifacts: ArtifactStore | None = None,
        results: ResultStore | None = None,
        tasks: int = 1,
        flows: Sequence[Handlers] = (),
    ) -> None:
        self._run_id = run_id
        self._console = console
        self._on_event = on_event
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="horovodrunner-channel", daemon=True
        )
        self._server = EventServer(token, self._serve, console.note, peers=tasks)
        self._transfer_handlers: dict[type[Event], TransferHandler] = {}
        if results is not None:
            self._transfer_handlers[UploadResult] = results.handler
        self._checkpoints = None if store is None else CheckpointReceiver(store)
        if self._checkpoints is not None:
            self._transfer_handlers |= self._checkpoints.handlers
        if artifacts is not None:
            self._transfer_handlers[UploadArtifacts] = artifacts.handler
        if files is not None:
            self._transfer_handlers[UploadFile] = file_handler(files, console.note)
        self._transfers: dict[Transfer, threading.Thread] = {}
        self._gather_point = GatherPoint(tasks)
        self._leader: Connection | None = None
        self._saves_wanted: list[SaveWanted] = []
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
        self.placement: tuple[tuple[int, int, str], ...] = ()
        """Partition, rank and host of every rank, once they are placed."""
        self.storing_until = 0.0
        """Until then (monotonic clock) a file may be on its way after the ranks' end."""
        self.has_taken_leave = False
        """Whether partition 0 came to its end, and so has sent everything."""
        self._emit = dispatcher(
            [
                console.handlers,
                *flows,
                _FOR_OBSERVERS,
                {
                    Failed: self._take_failure,
                    Placed: self._take_placement,
                    Storing: self._take_storing,
                    Leave: self._take_leave,
                },
            ],
            otherwise=refuse,
        )

    def open(self, host: str, port: int) -> int:
        """Start to listen."""
        self._thread.start()
        self._open.add(self)
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

    @classmethod
    def cut_all(cls) -> bool:
        """Close the ports and connections of this process's runs, as a broken network would.

        Return whether there were any.
        """
        channels = list(cls._open)
        for channel in channels:
            cutting = asyncio.run_coroutine_threadsafe(channel._server.cut(), channel._loop)
            cutting.result(CLOSE_SECONDS)
            for transfer in list(channel._transfers):
                transfer.close()
        return bool(channels)

    def stop_run(self) -> None:
        """Ask partition 0 to end the run."""

        def send() -> None:
            if self._leader is not None:
                self._leader.send(Stop())

        self._loop.call_soon_threadsafe(send)

    def want_save(self, wanted: SaveWanted) -> None:
        """Ask partition 0, now or as soon as it is there, for a checkpoint of all ranks."""

        def send() -> None:
            if self._leader is None:
                self._saves_wanted.append(wanted)
            else:
                self._leader.send(wanted)

        with contextlib.suppress(RuntimeError):  # the channel is closed
            self._loop.call_soon_threadsafe(send)

    def wait_for_leaving(self, timeout: float) -> None:
        """Wait until partition 0 has ended its part of the run and closed the connection."""
        self._left.wait(timeout)

    def close(self) -> None:
        """Close the port and every connection."""
        self._open.discard(self)
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
        if self._checkpoints is not None:
            self._checkpoints.close()

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
        event = await connection.receive()
        if event is None or getattr(event, "run_id", None) != self._run_id:
            return
        _logger.debug("%s begins with %s", connection.peer, type(event).__name__)
        self.has_heard = True
        if (handler := self._transfer_handlers.get(type(event))) is not None:
            await self._serve_transfer(connection, handler, event)
        elif isinstance(event, Gather):
            if not await self._gather_point.serve(connection, event):
                self._refuse_retry(connection)
        elif isinstance(event, Register):
            await self._serve_leader(connection)

    async def _serve_leader(self, connection: Connection) -> None:
        if self.registered:
            self._refuse_retry(connection)
            return
        self.registered = True
        self._leader = connection
        self._left.clear()
        connection.send(Accepted())
        for wanted in self._saves_wanted:
            connection.send(wanted)
        self._on_event()
        try:
            while (event := await connection.receive()) is not None:
                self._emit(event)
        finally:
            self._leader = None
            self._left.set()
        if not self.has_taken_leave and self.failure is None:
            lost = ", and checkpoints may not arrive here" if self._checkpoints is not None else ""
            self._console.note(
                f"the connection to rank 0's task at {connection.peer} is lost; if the run goes "
                f"on, its output stays in the executor's log{lost}"
            )

    def _refuse_retry(self, connection: Connection) -> None:
        self.retried = True
        connection.send(Refused(RETRY_REFUSED))

    async def _serve_transfer(
        self, connection: Connection, handler: TransferHandler, request: Event
    ) -> None:
        transfer = Transfer(connection.detach())
        ended = asyncio.Event()

        def serve() -> None:
            try:
                transfer.serve(handler, request, self._console.note)
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

    def _take_failure(self, event: Failed) -> None:
        self.failure = Outcome.from_bytes(event.outcome)
        self._on_event()

    def _take_placement(self, event: Placed) -> None:
        self.placement = event.ranks

    def _take_storing(self, event: Storing) -> None:
        self.storing_until = time.monotonic() + STORING_SECONDS

    def _take_leave(self, event: Leave) -> None:
        self.has_taken_leave = True
