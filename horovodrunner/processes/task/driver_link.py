"""Partition 0's way to the driver, which may be out of reach. Runs in: the task.

Every task but partition 0 connects to partition 0; partition 0 connects to the driver. So the
driver has one connection, whatever np is.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.logs.task import LineSender, own_line, what_the_log_keeps
from horovodrunner.wire.events import (
    Accepted,
    Event,
    Handlers,
    Leave,
    Lines,
    Refused,
    Register,
    Sink,
    dispatcher,
    ignore,
    refuse,
)
from horovodrunner.wire.stream import Connection, connect

__all__ = ["DriverLink", "StartRefusedError", "register_with_driver"]

CONNECT_SECONDS = 10.0

_logger = logging.getLogger(__name__)


class StartRefusedError(Exception):
    """The driver says that the run must not start, and why."""


async def _nothing() -> None:
    """Close nothing."""


@dataclass(frozen=True)
class DriverLink:
    """Where partition 0 sends events for the driver, and whether the driver can be reached."""

    emit: Sink
    is_reached: bool = True
    close: Callable[[], Awaitable[None]] = _nothing


async def register_with_driver(
    job: JobSpec, handlers: Handlers, log: Callable[[bytes], None]
) -> DriverLink:
    """Connect to the driver and ask whether this run may start; StartRefusedError if not.

    `handlers` take what the driver sends later.

    Spark tries a barrier stage again when it lost an executor, and PySpark does not tell a task
    that it is such a second try. The driver knows: it accepts one registration per run.
    """
    unreached = DriverLink(dispatcher([what_the_log_keeps(log)], ignore), is_reached=False)
    if job.driver_address is None:
        return unreached
    host, port = job.driver_address
    try:
        connection = await connect(host, port, job.token, CONNECT_SECONDS)
        connection.send(Register(job.run_id))
        answer = await asyncio.wait_for(connection.receive(), CONNECT_SECONDS)
    except (OSError, asyncio.TimeoutError) as error:
        log(
            own_line(
                f"the driver at {host}:{port} cannot be reached from here ({socket.gethostname()}):"
                f" {error}: the run goes on, its output stays in this executor's log"
            )
        )
        return unreached
    _logger.debug("registered with the driver at %s:%d: %s", host, port, answer)
    if not isinstance(answer, Accepted):
        await connection.close()
        closed = "the driver closed the channel"
        raise StartRefusedError(answer.why if isinstance(answer, Refused) else closed)
    channel = _Channel(connection, job.stream_output, handlers, log)
    return DriverLink(channel.emit, close=channel.close)


class _Channel:
    """The connection to the driver; when it is lost, messages go to this task's log."""

    def __init__(
        self,
        connection: Connection,
        stream_output: bool,
        handlers: Handlers,
        log: Callable[[bytes], None],
    ) -> None:
        self._connection = connection
        self._sender = LineSender(connection, of_all_ranks=True)
        self._stream_output = stream_output
        self._log = log
        self._keep = dispatcher([what_the_log_keeps(log)], ignore)
        self._is_lost = False
        self._take = dispatcher([handlers], refuse)
        self._listening = asyncio.create_task(self._listen())

    def emit(self, event: Event) -> None:
        if self._is_lost:
            self._keep(event)
        elif self._stream_output or not isinstance(event, Lines):
            self._sender.send(event)

    async def close(self) -> None:
        self._listening.cancel()
        await asyncio.wait([self._listening])
        self._sender.send(Leave())
        await self._sender.close()

    async def _listen(self) -> None:
        ends = f"from {self._connection.local_address} to the driver at {self._connection.peer}"
        while (event := await self._connection.receive()) is not None:
            self._take(event)
        self._is_lost = True
        self._log(
            own_line(
                f"the connection {ends} is lost: the run goes on, its output stays in this "
                "executor's log"
            )
        )
