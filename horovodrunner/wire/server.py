"""A port that serves every peer that proves the token. Runs in: the driver and the task."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from horovodrunner.wire.auth import ANSWER_BYTES, AuthenticationError, check_answer, greeting
from horovodrunner.wire.events import FrameError
from horovodrunner.wire.stream import Connection

__all__ = ["EventServer"]

HANDSHAKE_SECONDS = 10.0
"""A peer that has not proved the token by then is disconnected."""

MAX_UNPROVED_CONNECTIONS = 256
"""So many peers may be in the handshake at once, beside those that are expected; for a further one
the oldest is dropped."""

_ACCEPTED_AT_ONCE = 16
"""So many connections are accepted before those that were have their turn, and the limit holds."""

_BACKLOG = 1024
"""So many may wait in the kernel until they are accepted; further ones try again after 1 s."""

_ACCEPTING_TURNS = 8
"""More turns of the loop than a connection takes from the kernel to us; in CPython it is three."""


class EventServer:
    """Hands every peer that proves the token to `serve`; reports others, each kind once."""

    def __init__(
        self,
        token: bytes,
        serve: Callable[[Connection], Awaitable[None]],
        report: Callable[[str], None],
        peers: int = 0,
    ) -> None:
        self._token = token
        self._serve = serve
        self._report_to = report
        self._most_unproved = MAX_UNPROVED_CONNECTIONS + peers
        self._reported: set[str] = set()
        self._unproved: dict[asyncio.StreamWriter, None] = {}
        self._tasks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int | socket.socket = 0) -> int:
        """Start to listen, on a bound socket if one is given, and return the port."""
        where: dict[str, Any] = (
            {"sock": port} if isinstance(port, socket.socket) else {"host": host, "port": port}
        )
        self._server = await asyncio.start_server(self._accept, **where, backlog=_ACCEPTED_AT_ONCE)
        for listening in self._server.sockets:
            # asyncio takes one number for both: how many wait, and how many it accepts at once.
            with socket.socket(fileno=os.dup(listening.fileno())) as same:
                same.listen(_BACKLOG)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and close every connection."""
        await self._stop_listening()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def cut(self) -> None:
        """Let every connection break, as those of a broken network do, and no other be made."""
        await self._stop_listening()
        for writer in list(self._tasks.values()):
            writer.transport.abort()

    async def _stop_listening(self) -> None:
        if self._server is not None:
            # What asyncio accepted reaches _accept a few turns of the loop later, and is lost with
            # its socket open when the server is closed before.
            for listening in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listening.fileno())
            for _ in range(_ACCEPTING_TURNS):
                await asyncio.sleep(0)
            self._server.close()
            self._server = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio runs this function as a task
        self._tasks[task] = writer
        connection = Connection(reader, writer)
        peer = connection.peer
        try:
            if refusal := await self._handshake(reader, writer):
                writer.transport.abort()
                self._report("refused", peer, refusal)
                return
            if wrong := await self._served(connection):
                self._report("closed", peer, f"what it sent is not one of our events: {wrong}")
            await connection.close()
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.pop(task, None)

    async def _handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        """Let the peer prove the token; return why it is refused."""
        if len(self._unproved) >= self._most_unproved:
            oldest = next(iter(self._unproved))
            del self._unproved[oldest]
            oldest.transport.abort()
        self._unproved[writer] = None
        challenge = greeting()
        writer.write(challenge)
        try:
            answer = await asyncio.wait_for(reader.readexactly(ANSWER_BYTES), HANDSHAKE_SECONDS)
            writer.write(check_answer(self._token, challenge, answer))
        except asyncio.TimeoutError:
            return f"it sent no proof within {HANDSHAKE_SECONDS:g} s"
        except AuthenticationError as error:
            return str(error)
        except (asyncio.IncompleteReadError, ConnectionError):
            if writer not in self._unproved:
                return f"{self._most_unproved} newer ones were in the handshake"
            return "it closed the connection"
        finally:
            self._unproved.pop(writer, None)
        return ""

    async def _served(self, connection: Connection) -> str:
        """Serve a peer to its end; return what was wrong with what it sent."""
        try:
            await self._serve(connection)
        except FrameError as error:
            return str(error)
        except (ValueError, LookupError) as error:  # a rank that there is not, say
            return repr(error)
        return connection.cut_off

    def _report(self, what: str, peer: str, why: str) -> None:
        if what not in self._reported:
            self._reported.add(what)
            self._report_to(
                f"a connection from {peer} was {what}: {why} (further ones are not reported)"
            )
