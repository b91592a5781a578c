"""The client ends of a run's two connections: to partition 0 and to the driver. Runs in: the task.

Every task but partition 0 connects to partition 0; partition 0 connects to the driver. So the
driver has one connection, whatever np is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from horovodrunner.core.connection import Connection, connect
from horovodrunner.core.job import JobSpec, Outcome
from horovodrunner.core.lines import prefix_lines

__all__ = ["HubLink", "RemoteDriver", "SilentDriver", "register_with_driver"]

HUB_CONNECT_SECONDS = 30.0
DRIVER_CONNECT_SECONDS = 10.0


class HubLink:
    """Tells partition 0 about this task's ranks.

    Parameters
    ----------
    connection
        To the hub.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @classmethod
    async def open(cls, host: str, port: int, token: bytes, partition: int) -> HubLink:
        """Connect to partition 0.

        Parameters
        ----------
        host, port
            Where the hub listens.
        token
            The run's secret.
        partition
            This task's partition.

        Returns
        -------
        HubLink
            Ready to report.

        Raises
        ------
        OSError
            If nothing of ours answers there.
        """
        connection = await connect(host, port, token, HUB_CONNECT_SECONDS)
        connection.send("join", partition=partition)
        return cls(connection)

    async def wait_for_stop(self) -> bool:
        """Wait until the workers are to end.

        Returns
        -------
        bool
            True if partition 0 said so, False if it is gone.
        """
        while (frame := await self._connection.receive()) is not None:
            if frame.kind == "stop":
                return True
        return False

    def lines(self, rank: int, stream: str, lines: bytes) -> None:
        """Forward whole lines."""
        self._connection.send_lines(lines, rank=rank, stream=stream)

    def message(self, rank: int, message: bytes) -> None:
        """Forward a ``log_to_driver`` message."""
        self._connection.send("message", message, rank=rank)

    def started(self, rank: int) -> None:
        """Forward that the rank calls main."""
        self._connection.send("started", rank=rank)

    def ended(self, rank: int, outcome: Outcome) -> None:
        """Forward how the rank ended; rank 0's result is never on this way."""
        header, body = outcome.to_frame()
        self._connection.send("ended", body, rank=rank, outcome=header)

    async def close(self) -> None:
        """Send what is waiting and close."""
        await self._connection.close()


class SilentDriver:
    """Stands for a driver that cannot be reached: the run goes on, its log stays here.

    Parameters
    ----------
    log
        Takes whole lines for this task's own log.
    """

    def __init__(self, log: Callable[[bytes], None]) -> None:
        self._log = log

    def lines(self, lines: bytes) -> None:
        """Do nothing."""

    def message(self, rank: int, message: bytes) -> None:
        """Put the message where it can be found at least."""
        self._log(prefix_lines(message + b"\n", rank, "log_to_driver"))

    def note(self, text: str) -> None:
        """Do nothing."""

    def failed(self, outcome: Outcome) -> None:
        """Do nothing: the outcome also goes back through the stage."""

    async def close(self) -> None:
        """Do nothing."""


class RemoteDriver:
    """The driver at the other end of the driver channel.

    Parameters
    ----------
    connection
        To the driver.
    stream_output
        Whether the driver wants the workers' output.
    on_stop
        Called when the driver wants the run to end.
    """

    def __init__(
        self, connection: Connection, stream_output: bool, on_stop: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._stream_output = stream_output
        self._listening = asyncio.create_task(self._listen(on_stop))

    def lines(self, lines: bytes) -> None:
        """Forward lines if the driver wants them."""
        if self._stream_output:
            self._connection.send_lines(lines)

    def message(self, rank: int, message: bytes) -> None:
        """Forward a ``log_to_driver`` message."""
        self._connection.send("message", message, rank=rank)

    def note(self, text: str) -> None:
        """Forward a line of the run's own."""
        self._connection.send("note", text.encode())

    def failed(self, outcome: Outcome) -> None:
        """Report the run's failure ahead of the stage's end."""
        header, body = outcome.to_frame()
        self._connection.send("failed", body, outcome=header)

    async def close(self) -> None:
        """Send what is waiting and close."""
        await self._connection.close()
        self._listening.cancel()
        await asyncio.wait([self._listening])

    async def _listen(self, on_stop: Callable[[], None]) -> None:
        while (frame := await self._connection.receive()) is not None:
            if frame.kind == "stop":
                on_stop()


async def register_with_driver(
    job: JobSpec, on_stop: Callable[[], None], log: Callable[[bytes], None]
) -> RemoteDriver | SilentDriver | str:
    """Connect to the driver and ask whether this run may start.

    Spark tries a barrier stage again when it lost an executor, and PySpark does not tell a task
    that it is such a second try. The driver knows: it accepts one registration per run.

    Parameters
    ----------
    job
        The run.
    on_stop
        Called when the driver wants the run to end.
    log
        Takes whole lines for this task's own log.

    Returns
    -------
    RemoteDriver, SilentDriver or str
        The way to the driver, or why this run must not start.
    """
    if job.driver_address is None:
        return SilentDriver(log)
    host, port = job.driver_address
    try:
        connection = await connect(host, port, job.token, DRIVER_CONNECT_SECONDS)
        connection.send("register", run_id=job.run_id)
        answer = await asyncio.wait_for(connection.receive(), DRIVER_CONNECT_SECONDS)
    except (OSError, asyncio.TimeoutError) as error:
        warning = (
            f"HorovodRunner: the driver at {host}:{port} cannot be reached from here ({error}): "
            "the run goes on, its output stays in this executor's log\n"
        )
        log(warning.encode())
        return SilentDriver(log)
    if answer is None or answer.kind != "accepted":
        await connection.close()
        return "the driver closed the channel" if answer is None else str(answer.header.get("why"))
    return RemoteDriver(connection, job.stream_output, on_stop)
