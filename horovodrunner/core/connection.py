"""Frames over sockets and pipes, with the token handshake. Runs in: the driver and the task."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from horovodrunner.core.frames import (
    MAGIC,
    MAX_BODY_BYTES,
    NONCE_BYTES,
    PREFIX_BYTES,
    PROOF_BYTES,
    Frame,
    FrameError,
    encode_frame,
    handshake_proof,
    parse_header,
    parse_prefix,
)

__all__ = ["AuthenticationError", "Connection", "FrameServer", "connect", "read_frame"]

HANDSHAKE_SECONDS = 10.0
"""A peer that has not proved the token by then is disconnected."""

MAX_UNPROVED_CONNECTIONS = 256
"""So many peers may be in the handshake at once; further ones are disconnected."""

MAX_UNSENT_BYTES = 8 * 1024 * 1024
"""Log lines that would make more than this wait for a slow peer are dropped and counted."""

FLUSH_SECONDS = 5.0
"""How long closing waits for a slow peer to take what was sent."""

_READ_BYTES = 1024 * 1024


class AuthenticationError(ConnectionError):
    """The peer does not speak our protocol or does not hold the run's token."""


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
        prefix = await reader.readexactly(PREFIX_BYTES)
        header_bytes, body_bytes = parse_prefix(prefix, max_body_bytes)
        header = parse_header(await reader.readexactly(header_bytes))
        body = bytearray()
        while len(body) < body_bytes:
            piece = await reader.read(min(_READ_BYTES, body_bytes - len(body)))
            if not piece:
                return None
            body += piece
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
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
            None when the peer is gone.
        """
        return await read_frame(self._reader)

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
            self._dropped_lines += lines.count(b"\n")
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

    async def close(self) -> None:
        """Send what is waiting, for a bounded time, and close."""
        self._report_dropped_lines()
        await _close(self._writer)

    def _report_dropped_lines(self) -> None:
        if self._dropped_lines:
            mark = (
                f"HorovodRunner: {self._dropped_lines} lines are missing here, because the reader "
                "was too slow; the executor's log has them\n"
            )
            self._dropped_lines = 0
            self.send("lines", mark.encode(), **self._dropped_header)


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
        if await reader.readexactly(len(MAGIC)) != MAGIC:
            raise AuthenticationError("what listens there is not a HorovodRunner channel")
        server_nonce = await reader.readexactly(NONCE_BYTES)
        client_nonce = os.urandom(NONCE_BYTES)
        proof = handshake_proof(token, "client", server_nonce, client_nonce)
        writer.write(client_nonce + proof)
        answer = await reader.readexactly(PROOF_BYTES)
    except asyncio.IncompleteReadError:
        raise AuthenticationError("the peer closed the connection during the handshake") from None
    if not hmac.compare_digest(
        answer, handshake_proof(token, "server", server_nonce, client_nonce)
    ):
        raise AuthenticationError("the peer does not hold this run's token")


async def _prove_as_server(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes
) -> None:
    server_nonce = os.urandom(NONCE_BYTES)
    writer.write(MAGIC + server_nonce)
    client_nonce = await reader.readexactly(NONCE_BYTES)
    proof = await reader.readexactly(PROOF_BYTES)
    if not hmac.compare_digest(proof, handshake_proof(token, "client", server_nonce, client_nonce)):
        raise AuthenticationError("the peer does not hold this run's token")
    writer.write(handshake_proof(token, "server", server_nonce, client_nonce))


class FrameServer:
    """Listens on one port and serves every peer that proves the token.

    Parameters
    ----------
    token
        The run's secret.
    serve
        Called with each proved connection; the connection is closed when it returns.
    on_refused
        Called once, with a sentence about the first peer that was refused.
    """

    def __init__(
        self,
        token: bytes,
        serve: Callable[[Connection], Awaitable[None]],
        on_refused: Callable[[str], None],
    ) -> None:
        self._token = token
        self._serve = serve
        self._on_refused = on_refused
        self._refused = 0
        self._unproved = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int = 0) -> int:
        """Start to listen.

        Parameters
        ----------
        host
            Address to bind, ``"0.0.0.0"`` for all.
        port
            Port to bind, 0 for any free one.

        Returns
        -------
        int
            The port.

        Raises
        ------
        OSError
            If the port cannot be bound.
        """
        self._server = await asyncio.start_server(self._accept, host, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop to listen and close every connection."""
        if self._server is not None:
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
                with contextlib.suppress(FrameError):
                    await self._serve(Connection(reader, writer))
            await _close(writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _prove(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if self._unproved >= MAX_UNPROVED_CONNECTIONS:
            return self._refuse(writer, f"{self._unproved} others are in the handshake")
        self._unproved += 1
        try:
            await asyncio.wait_for(_prove_as_server(reader, writer, self._token), HANDSHAKE_SECONDS)
        except asyncio.TimeoutError:
            return self._refuse(writer, f"it sent no proof within {HANDSHAKE_SECONDS:g} s")
        except (AuthenticationError, asyncio.IncompleteReadError, ConnectionError) as error:
            return self._refuse(writer, str(error) or "it closed the connection")
        finally:
            self._unproved -= 1
        return True

    def _refuse(self, writer: asyncio.StreamWriter, why: str) -> bool:
        peer = writer.get_extra_info("peername")
        writer.transport.abort()
        self._refused += 1
        if self._refused == 1:
            self._on_refused(
                f"a connection from {peer} was refused: {why} (further ones are not reported)"
            )
        return False
