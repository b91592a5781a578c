"""The client ends of a run's two connections: to partition 0 and to the driver. Runs in: the task.

Every task but partition 0 connects to partition 0; partition 0 connects to the driver. So the
driver has one connection, whatever np is.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

from horovodrunner.flows.checkpoints.task import LatestAnswer
from horovodrunner.flows.logs.lines import prefix_lines
from horovodrunner.flows.telemetry.phases import Phase
from horovodrunner.placement.topology import Slot
from horovodrunner.wire.connection import Connection, connect
from horovodrunner.wire.job import JobSpec, Outcome

__all__ = ["HubLink", "RemoteDriver", "SilentDriver", "register_with_driver"]

HUB_CONNECT_SECONDS = 15.0
"""Less than partition 0 waits (hub.py), so that this task's log has the reason."""

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
        self._answers: asyncio.Queue[LatestAnswer] = asyncio.Queue()

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

    async def listen(self, on_stack_request: Callable[[], None]) -> bool:
        """Take what partition 0 says until the workers are to end.

        Parameters
        ----------
        on_stack_request
            Called when it wants to see the workers' stacks.

        Returns
        -------
        bool
            True if partition 0 said so, False if it is gone.
        """
        while (frame := await self._connection.receive()) is not None:
            if frame.kind == "stop":
                return True
            if frame.kind == "stacks":
                on_stack_request()
            elif frame.kind == "latest":
                manifest = bytes(frame.body).decode()
                self._answers.put_nowait({**frame.header, "manifest": manifest})
        return False

    async def ask_latest(self) -> LatestAnswer:
        """Ask which checkpoint all ranks start from.

        Returns
        -------
        LatestAnswer
            Partition 0's answer.
        """
        self._connection.send("latest")
        return await self._answers.get()

    def fetched(self, directory: str) -> None:
        """Tell where this task has its copy of that checkpoint; "" if it has none."""
        self._connection.send("fetched", directory=directory)

    def lines(self, rank: int, stream: str, lines: bytes) -> None:
        """Forward whole lines."""
        self._connection.send_lines(lines, rank=rank, stream=stream)

    def message(self, rank: int, message: bytes) -> None:
        """Forward a ``log_to_driver`` message."""
        self._connection.send("message", message, rank=rank)

    def notice(self, rank: int, key: str, text: bytes) -> None:
        """Forward what is to be shown once."""
        self._connection.send("notice", text, rank=rank, key=key)

    def started(self, rank: int) -> None:
        """Forward that the rank calls main."""
        self._connection.send("started", rank=rank)

    def state(self, rank: int, fields: Mapping[str, Any]) -> None:
        """Forward where the rank's main is."""
        self._connection.send("state", **{**fields, "rank": rank})

    def times(self, rank: int, spans: Mapping[str, Sequence[float]]) -> None:
        """Forward when the rank's phases began and ended."""
        self._connection.send("times", rank=rank, spans=spans)

    def stack(self, rank: int, text: str) -> None:
        """Forward the rank's Python stack."""
        self._connection.send("stack", text.encode(errors="backslashreplace"), rank=rank)

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

    def note(self, text: str, *, routine: bool = False) -> None:
        """Put the line where it can be found at least."""
        self._log(f"HorovodRunner: {text}\n".encode(errors="backslashreplace"))

    def placed(self, slots: Sequence[Slot]) -> None:
        """Do nothing."""

    def failed(self, outcome: Outcome) -> None:
        """Do nothing: the outcome also goes back through the stage."""

    def phases(self, phases: Sequence[Phase]) -> None:
        """Do nothing."""

    def storing(self) -> None:
        """Do nothing."""

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
    log
        Takes whole lines for this task's own log.
    """

    def __init__(
        self,
        connection: Connection,
        stream_output: bool,
        on_stop: Callable[[], None],
        log: Callable[[bytes], None],
    ) -> None:
        self._connection = connection
        self._stream_output = stream_output
        self._log = log
        self._ends = f"from {connection.local_address} to the driver at {connection.peer}"
        self._is_lost = False
        self._listening = asyncio.create_task(self._listen(on_stop))

    def lines(self, lines: bytes) -> None:
        """Forward lines if the driver wants them."""
        if self._stream_output:
            self._connection.send_lines(lines)

    def message(self, rank: int, message: bytes) -> None:
        """Forward a ``log_to_driver`` message."""
        if self._is_lost:
            self._log(prefix_lines(message + b"\n", rank, "log_to_driver"))
        self._connection.send("message", message, rank=rank)

    def note(self, text: str, *, routine: bool = False) -> None:
        """Forward a line of the run's own."""
        self._connection.send("note", text.encode(errors="backslashreplace"), routine=routine)

    def placed(self, slots: Sequence[Slot]) -> None:
        """Tell which task and host has which rank."""
        self._connection.send(
            "placed", ranks=[[slot.partition, slot.rank, slot.host] for slot in slots]
        )

    def phases(self, phases: Sequence[Phase]) -> None:
        """Tell when the phases of the run began and ended."""
        self._connection.send("phases", phases=[astuple(phase) for phase in phases])

    def storing(self) -> None:
        """Tell that a checkpoint is still on its way."""
        self._connection.send("storing")

    def failed(self, outcome: Outcome) -> None:
        """Report the run's failure ahead of the stage's end."""
        header, body = outcome.to_frame()
        self._connection.send("failed", body, outcome=header)

    async def close(self) -> None:
        """Send what is waiting and close."""
        self._listening.cancel()
        await asyncio.wait([self._listening])
        await self._connection.close("leave")

    async def _listen(self, on_stop: Callable[[], None]) -> None:
        while (frame := await self._connection.receive()) is not None:
            if frame.kind == "stop":
                on_stop()
        self._is_lost = True
        warning = (
            f"HorovodRunner: the connection {self._ends} is lost: the run goes on, its output "
            "stays in this executor's log\n"
        )
        self._log(warning.encode(errors="backslashreplace"))


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
            f"HorovodRunner: the driver at {host}:{port} cannot be reached from here "
            f"({socket.gethostname()}): {error}: the run goes on, its output stays in this "
            "executor's log\n"
        )
        log(warning.encode(errors="backslashreplace"))
        return SilentDriver(log)
    if answer is None or answer.kind != "accepted":
        await connection.close()
        return "the driver closed the channel" if answer is None else str(answer.header.get("why"))
    return RemoteDriver(connection, job.stream_output, on_stop, log)
