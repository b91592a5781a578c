"""The server end of the driver channel: one port, one accepted run. Runs in: the driver."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import TracebackType

from horovodrunner.core.connection import Connection, FrameServer
from horovodrunner.core.job import Outcome
from horovodrunner.driver.console import Console
from horovodrunner.errors import ConfigurationError

__all__ = ["RETRY_REFUSED", "DriverChannel"]

RETRY_REFUSED = (
    "Spark tried to run the barrier stage a second time, most likely because it lost an executor. "
    "main is not run twice unasked"
)
CLOSE_SECONDS = 10.0


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
    """

    def __init__(
        self, run_id: str, token: bytes, console: Console, on_event: Callable[[], None]
    ) -> None:
        self._run_id = run_id
        self._console = console
        self._on_event = on_event
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="horovodrunner-channel", daemon=True
        )
        self._server = FrameServer(token, self._serve, console.note)
        self._leader: Connection | None = None
        self._left = threading.Event()
        self._left.set()
        self.registered = False
        """Whether partition 0 has connected: the stage's tasks have started."""
        self.retried = False
        """Whether Spark tried the stage again."""
        self.failure: Outcome | None = None
        """The run's failure, when it was reported ahead of the stage's end."""

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
        if frame is None or frame.kind != "register" or frame.header.get("run_id") != self._run_id:
            return
        if self.registered:
            self.retried = True
            connection.send("refused", why=RETRY_REFUSED)
            return
        self.registered = True
        self._leader = connection
        self._left.clear()
        connection.send("accepted")
        self._on_event()
        try:
            await self._show(connection)
        finally:
            self._leader = None
            self._left.set()

    async def _show(self, connection: Connection) -> None:
        while (frame := await connection.receive()) is not None:
            if frame.kind == "lines":
                self._console.lines(bytes(frame.body))
            elif frame.kind == "message":
                self._console.message(int(frame.header["rank"]), bytes(frame.body))
            elif frame.kind == "note":
                self._console.note(bytes(frame.body).decode(errors="replace"))
            elif frame.kind == "failed":
                self.failure = Outcome.from_frame(frame.header["outcome"], frame.body)
                self._on_event()
