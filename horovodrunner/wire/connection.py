"""Frames over sockets and pipes, with the token handshake. Runs in: the driver and the task."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from horovodrunner.flows.logs.lines import count_lines, missing_mark
from horovodrunner.wire import auth
from horovodrunner.wire.auth import AuthenticationError
from horovodrunner.wire.frames import (
    MAX_BODY_BYTES,
    PREFIX_BYTES,
    Frame,
    FrameError,
    encode_frame,
    parse_header,
    parse_prefix,
)

__all__ = ["AuthenticationError", "Connection", "FrameServer", "connect", "read_frame"]

HANDSHAKE_SECONDS = 10.0
"""A peer that has not proved the token by then is disconnected."""

MAX_UNPROVED_CONNECTIONS = 256
"""So many peers may be in the handshake at once, beside those that are expected; for a further one
the oldest is dropped."""

_ACCEPTED_AT_ONCE = 16
"""So many connections asyncio accepts before the others have their turn.

With more, a flood could drop a peer before it has had the time to answer.
"""

_ACCEPTING_TURNS = 8
"""More turns of the loop than a connection takes from the kernel to us; in CPython it is three."""

_WAITING_CONNECTIONS = 1024
"""So many may wait in the kernel until they are accepted; further ones try again after 1 s."""

MAX_UNSENT_BYTES = 8 * 1024 * 1024
"""Log lines that would make more than this wait for a slow peer are dropped and counted."""

FLUSH_SECONDS = 5.0
"""How long closing waits for a slow peer to take what was sent."""

_READ_BYTES = 1024 * 1024


async def read_frame(
    reader: asyncio.StreamReader, max_body_bytes: int | None = MAX_BODY_BYTES
) -> Frame | None:
    """Read one frame.

    Parameters
    ----------
    reader
        Where from.
    max_body_bytes
        Largest body to accept; None for no limit.

    Returns
    -------
    Frame or None
        None when the stream ends, also in the middle of a frame.

    Raises
    ------
    FrameError
        If the bytes are no frame or one that is too large.
    """
    try:
        return await _read_frame(reader, max_body_bytes)
    except _CutOffError:
        return None


class _CutOffError(FrameError):
    """The stream ended in the middle of a frame."""


async def _read_frame(reader: asyncio.StreamReader, max_body_bytes: int | None) -> Frame | None:
    prefix = b""
    try:
        prefix = await reader.readexactly(PREFIX_BYTES)
        header_bytes, body_bytes = parse_prefix(prefix, max_body_bytes)
        header = parse_header(await reader.readexactly(header_bytes))
        body = bytearray()
        while len(body) < body_bytes:
            piece = await reader.read(min(_READ_BYTES, body_bytes - len(body)))
            if not piece:
                raise _CutOffError(f"a body of {len(body)} bytes where {body_bytes} were announced")
            body += piece
    except RecursionError:
        raise FrameError("a header that is nested too deeply") from None
    except asyncio.IncompleteReadError as error:
        if not prefix and not error.partial:
            return None
        raise _CutOffError(f"{len(error.partial)} bytes where {error.expected} belong") from None
    except ConnectionError as error:
        if not prefix:
            return None
        raise _CutOffError(str(error)) from None
    return Frame(header, body)


class Connection:
    """A peer that has proved the token.

    Parameters
    ----------
    reader, writer
        The socket's streams.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.cut_off = ""
        """What was received of a frame that the peer did not send to its end, in words."""
        self._dropped_lines = 0
        self._dropped_header: dict[str, Any] = {}

    @property
    def peer(self) -> str:
        """The peer's address, for messages."""
        name = self._writer.get_extra_info("peername")
        return f"{name[0]}:{name[1]}" if name else "a closed connection"

    @property
    def local_address(self) -> str:
        """IP address of this end, as the peer sees it."""
        name = self._writer.get_extra_info("sockname")
        return str(name[0]) if name else ""

    async def receive(self) -> Frame | None:
        """Wait for the next frame.

        Returns
        -------
        Frame or None
            None when the peer is gone, also in the middle of a frame.

        Raises
        ------
        FrameError
            If the bytes are no frame or one that is too large.
        """
        try:
            return await _read_frame(self._reader, MAX_BODY_BYTES)
        except _CutOffError as error:
            self.cut_off = str(error)
            return None

    def send(self, kind: str, body: bytes | bytearray | memoryview = b"", **header: Any) -> None:
        """Send a frame without waiting; to a peer that is gone, nothing happens.

        Parameters
        ----------
        kind
            What the message is.
        body
            Its bytes.
        **header
            More JSON-compatible fields.
        """
        if not self._writer.is_closing():
            self._writer.write(encode_frame(kind, body, **header))
            self._writer.write(body)

    def send_lines(self, lines: bytes, **header: Any) -> None:
        """Send log lines, or drop them when the peer reads too slowly, and say how many.

        Parameters
        ----------
        lines
            Whole lines.
        **header
            More JSON-compatible fields.
        """
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._dropped_lines += count_lines(lines)
            self._dropped_header = header
            return
        self._report_dropped_lines()
        self.send("lines", lines, **header)

    def detach(self) -> socket.socket:
        """Give the socket to a thread; nothing more is read or sent here.

        The peer must be waiting for an answer, so that nothing of what it sends was read already.

        Returns
        -------
        socket.socket
            A second handle of the same connection, to be closed by the caller.
        """
        transport = self._writer.transport
        assert isinstance(transport, asyncio.ReadTransport)  # noqa: S101 - a socket's is both
        transport.pause_reading()
        return socket.socket(fileno=os.dup(self._writer.get_extra_info("socket").fileno()))

    async def close(self, farewell: str = "") -> None:
        """Send what is waiting, for a bounded time, and close.

        Parameters
        ----------
        farewell
            The kind of a last frame, after which the peer reads no more.
        """
        self._report_dropped_lines()
        if farewell:
            self.send(farewell)
        await _close(self._writer)

    def _report_dropped_lines(self) -> None:
        if self._dropped_lines:
            why = "the reader was too slow; the executor's log has them"
            mark = missing_mark(self._dropped_lines, why)
            self._dropped_lines = 0
            self.send("lines", mark, **self._dropped_header)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError, OSError, asyncio.TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), FLUSH_SECONDS)
    if writer.transport.get_write_buffer_size():
        writer.transport.abort()


async def connect(host: str, port: int, token: bytes, timeout: float) -> Connection:
    """Connect to a :class:`FrameServer` and prove the token to each other.

    Parameters
    ----------
    host, port
        Where the server listens.
    token
        The run's secret.
    timeout
        Seconds until the attempt is given up.

    Returns
    -------
    Connection
        Ready for frames.

    Raises
    ------
    AuthenticationError
        If the server is not ours.
    OSError
        If nothing answers there; a TimeoutError after `timeout` seconds.
    """

    async def attempt() -> Connection:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            await _prove_as_client(reader, writer, token)
        except BaseException:
            writer.transport.abort()
            raise
        return Connection(reader, writer)

    try:
        return await asyncio.wait_for(attempt(), timeout)
    except asyncio.TimeoutError:
        raise TimeoutError(f"no answer from {host}:{port} within {timeout:g} s") from None


async def _prove_as_client(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes
) -> None:
    try:
        auth.check_magic(await reader.readexactly(auth.MAGIC_BYTES))
        answer, expected = auth.answer_nonce(token, await reader.readexactly(auth.NONCE_BYTES))
        writer.write(answer)
        auth.check_proof(expected, await reader.readexactly(auth.PROOF_BYTES))
    except asyncio.IncompleteReadError:
        raise AuthenticationError("the peer closed the connection during the handshake") from None


async def _prove_as_server(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes
) -> None:
    greeting = auth.greeting()
    writer.write(greeting)
    answer = await reader.readexactly(auth.ANSWER_BYTES)
    writer.write(auth.check_answer(token, greeting, answer))


class FrameServer:
    """Listens on one port and serves every peer that proves the token.

    Parameters
    ----------
    token
        The run's secret.
    serve
        Called with each proved connection; the connection is closed when it returns.
    on_refused
        Called with a sentence about the first peer that was refused, and with one about the first
        that proved the token and then sent what cannot be understood; never again after that.
    peers
        How many will come at about the same time; all of them have room in the handshake.
    """

    def __init__(
        self,
        token: bytes,
        serve: Callable[[Connection], Awaitable[None]],
        on_refused: Callable[[str], None],
        peers: int = 0,
    ) -> None:
        self._token = token
        self._serve = serve
        self._on_refused = on_refused
        self._most_unproved = MAX_UNPROVED_CONNECTIONS + peers
        self._reported: set[str] = set()
        self._unproved: dict[asyncio.StreamWriter, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int | socket.socket = 0) -> int:
        """Start to listen.

        Parameters
        ----------
        host
            Address to bind, ``"0.0.0.0"`` for all.
        port
            Port to bind, 0 for any free one; or a socket that is bound already.

        Returns
        -------
        int
            The port.

        Raises
        ------
        OSError
            If the port cannot be bound.
        """
        where: dict[str, Any] = (
            {"sock": port} if isinstance(port, socket.socket) else {"host": host, "port": port}
        )
        self._server = await asyncio.start_server(self._accept, **where, backlog=_ACCEPTED_AT_ONCE)
        for listening in self._server.sockets:
            # asyncio takes one number for both: how many wait, and how many it accepts at once.
            with socket.socket(fileno=os.dup(listening.fileno())) as same:
                same.listen(_WAITING_CONNECTIONS)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop to listen and close every connection."""
        if self._server is not None:
            # What asyncio accepted reaches _accept a few turns of the loop later, and is lost with
            # its socket open when the server is closed before.
            for listening in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listening.fileno())
            for _ in range(_ACCEPTING_TURNS):
                await asyncio.sleep(0)
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio runs this function as a task
        self._tasks.add(task)
        try:
            if await self._prove(reader, writer):
                await self._serve_proved(Connection(reader, writer))
            await _close(writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _serve_proved(self, connection: Connection) -> None:
        peer = connection.peer
        try:
            await self._serve(connection)
            wrong = connection.cut_off
        except (ValueError, KeyError, TypeError) as error:
            # A FrameError, or a frame of the right form that lacks what its kind needs.
            wrong = str(error) if isinstance(error, FrameError) else repr(error)
        if wrong:
            self._report("closed", peer, f"what it sent is not one of our messages: {wrong}")

    async def _prove(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if len(self._unproved) >= self._most_unproved:
            oldest = next(iter(self._unproved))
            del self._unproved[oldest]
            self._refuse(oldest, f"{self._most_unproved} newer ones were in the handshake")
        self._unproved[writer] = None
        try:
            await asyncio.wait_for(_prove_as_server(reader, writer, self._token), HANDSHAKE_SECONDS)
        except asyncio.TimeoutError:
            return self._refuse(writer, f"it sent no proof within {HANDSHAKE_SECONDS:g} s")
        except (AuthenticationError, asyncio.IncompleteReadError, ConnectionError) as error:
            return self._refuse(writer, str(error) or "it closed the connection")
        finally:
            self._unproved.pop(writer, None)
        return not writer.is_closing()

    def _refuse(self, writer: asyncio.StreamWriter, why: str) -> bool:
        peer = writer.get_extra_info("peername")
        writer.transport.abort()
        self._report("refused", f"{peer[0]}:{peer[1]}" if peer else "a closed connection", why)
        return False

    def _report(self, what: str, peer: str, why: str) -> None:
        if what not in self._reported:
            self._reported.add(what)
            self._on_refused(
                f"a connection from {peer} was {what}: {why} (further ones are not reported)"
            )
