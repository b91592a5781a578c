"""Events over asyncio's streams. Runs in: the driver and the task."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

from horovodrunner.wire.auth import (
    MAGIC_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    AuthenticationError,
    answer_nonce,
    check_magic,
    check_proof,
)
from horovodrunner.wire.events import (
    MAX_BODY_BYTES,
    PREFIX_BYTES,
    Event,
    FrameError,
    decode,
    encode,
    parse_prefix,
)

__all__ = ["Connection", "connect", "read_event"]

FLUSH_SECONDS = 5.0
"""How long closing waits for a slow peer to take what was sent."""

_READ_BYTES = 1024 * 1024


class _CutOffError(FrameError):
    """The stream ended in the middle of a frame."""


async def read_event(
    reader: asyncio.StreamReader, max_body_bytes: int | None = MAX_BODY_BYTES
) -> Event | None:
    """Read one event; None when the stream ends before it."""
    prefix = b""
    try:
        prefix = await reader.readexactly(PREFIX_BYTES)
        header_bytes, body_bytes = parse_prefix(prefix, max_body_bytes)
        header = await reader.readexactly(header_bytes)
        body = bytearray()
        while len(body) < body_bytes:
            piece = await reader.read(min(_READ_BYTES, body_bytes - len(body)))
            if not piece:
                raise _CutOffError(f"a body of {len(body)} bytes where {body_bytes} were announced")
            body += piece
    except asyncio.IncompleteReadError as error:
        if not prefix and not error.partial:
            return None
        raise _CutOffError(f"{len(error.partial)} bytes where {error.expected} belong") from None
    except ConnectionError as error:
        if not prefix:
            return None
        raise _CutOffError(str(error)) from None
    return decode(header, bytes(body))


class Connection:
    """A peer that has proved the token."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.cut_off = ""
        """What came of an event that the peer did not send to its end, in words."""

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

    @property
    def unsent_bytes(self) -> int:
        """How much the peer has not taken yet."""
        return self._writer.transport.get_write_buffer_size()

    async def receive(self) -> Event | None:
        """Wait for the next event; None when the peer is gone, also in the middle of one."""
        try:
            return await read_event(self._reader)
        except _CutOffError as error:
            self.cut_off = str(error)
            return None

    def send(self, event: Event) -> None:
        """Send an event without waiting; to a peer that is gone, nothing happens."""
        if not self._writer.is_closing():
            self._writer.writelines(encode(event))

    def detach(self) -> socket.socket:
        """Hand the socket to a thread; nothing more is read or sent here.

        The peer must be waiting for an answer, so that nothing of what it sends was read already.
        """
        transport = self._writer.transport
        assert isinstance(transport, asyncio.ReadTransport)  # noqa: S101 - a socket's is both
        transport.pause_reading()
        return socket.socket(fileno=os.dup(self._writer.get_extra_info("socket").fileno()))

    async def close(self) -> None:
        """Send what is waiting, for a bounded time, and close."""
        self._writer.close()
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), FLUSH_SECONDS)
        if self.unsent_bytes:
            self._writer.transport.abort()


async def connect(host: str, port: int, token: bytes, timeout: float) -> Connection:
    """Connect to an :class:`~horovodrunner.wire.server.EventServer` and prove the token."""

    async def attempt() -> Connection:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            check_magic(await reader.readexactly(MAGIC_BYTES))
            answer, expected = answer_nonce(token, await reader.readexactly(NONCE_BYTES))
            writer.write(answer)
            check_proof(expected, await reader.readexactly(PROOF_BYTES))
        except asyncio.IncompleteReadError:
            writer.transport.abort()
            why = "the peer closed the connection during the handshake"
            raise AuthenticationError(why) from None
        except BaseException:
            writer.transport.abort()
            raise
        return Connection(reader, writer)

    try:
        return await asyncio.wait_for(attempt(), timeout)
    except asyncio.TimeoutError:
        raise TimeoutError(f"no answer from {host}:{port} within {timeout:g} s") from None
