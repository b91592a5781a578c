"""Frames over a blocking socket, for bulk data in a thread. Runs in: the driver and the task.

A frame's body may be larger than memory here: it is sent from an iterable and received in pieces.
(An event loop's streams copy every byte twice more; at a gigabyte a second that halves the speed.)
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from horovodrunner.wire.auth import (
    MAGIC_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    answer_nonce,
    check_magic,
    check_proof,
)
from horovodrunner.wire.frames import (
    MAX_BODY_BYTES,
    PREFIX_BYTES,
    FrameError,
    encode_prefix_and_header,
    parse_header,
    parse_prefix,
)

__all__ = ["BulkConnection", "PeerFailedError"]

PIECE_BYTES = 1024 * 1024


class PeerFailedError(OSError):
    """The peer says that it failed, in its own words."""


class BulkConnection:
    """A socket whose peer has proved the token.

    Parameters
    ----------
    sock
        The socket; closed by :meth:`close`.
    timeout
        Seconds without any progress after which a TimeoutError is raised.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self._socket = sock
        self._socket.settimeout(timeout)

    @classmethod
    def open(cls, host: str, port: int, token: bytes, timeout: float) -> BulkConnection:
        """Connect to a :class:`~horovodrunner.wire.connection.FrameServer`.

        Parameters
        ----------
        host, port
            Where the server listens.
        token
            The run's secret.
        timeout
            Seconds without any progress after which a TimeoutError is raised.

        Returns
        -------
        BulkConnection
            Ready for frames.

        Raises
        ------
        AuthenticationError
            If the server is not ours.
        OSError
            If nothing answers there.
        """
        connection = cls(socket.create_connection((host, port), timeout), timeout)
        try:
            connection._prove(token)
        except BaseException:
            connection.close()
            raise
        return connection

    def send(self, kind: str, **header: Any) -> None:
        """Send a frame without a body.

        Parameters
        ----------
        kind
            What the message is.
        **header
            JSON-compatible fields.
        """
        self._socket.sendall(encode_prefix_and_header(kind, 0, **header))

    def send_body(
        self, kind: str, size: int, pieces: Iterable[bytes | memoryview], **header: Any
    ) -> None:
        """Send a frame whose body comes in pieces.

        Parameters
        ----------
        kind
            What the message is.
        size
            Bytes of all pieces together.
        pieces
            The body.
        **header
            More JSON-compatible fields.

        Raises
        ------
        ConnectionError
            If the peer is gone, or has something to say before it has read everything; see
            :meth:`receive`.
        OSError
            If the body does not have `size` bytes.
        """
        self._socket.sendall(encode_prefix_and_header(kind, size, **header))
        sent = 0
        for piece in pieces:
            sent += len(piece)
            if sent > size:
                raise OSError(f"the body has more than the {size} bytes announced")
            if self._has_something_to_say():
                raise ConnectionAbortedError("the peer does not want the rest")
            self._socket.sendall(piece)
        if sent < size:
            raise OSError(f"the body has {sent} bytes, {size} were announced")

    def _has_something_to_say(self) -> bool:
        descriptor = self._socket.fileno()
        if descriptor < 0:
            raise ConnectionAbortedError("the connection was closed here")
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def send_bytes(self, kind: str, body: bytes, **header: Any) -> None:
        """Send a frame whose body is at hand.

        Parameters
        ----------
        kind
            What the message is.
        body
            Its bytes.
        **header
            More JSON-compatible fields.
        """
        self._socket.sendall(encode_prefix_and_header(kind, len(body), **header))
        self._socket.sendall(body)

    def receive(self) -> tuple[dict[str, Any], int]:
        """Read a frame's header; its body is to be read with :meth:`body` before the next one.

        Returns
        -------
        tuple of dict and int
            The header, and the number of bytes of the body.

        Raises
        ------
        ConnectionError
            If the peer is gone.
        FrameError
            If the bytes are no frame.
        """
        header_bytes, body_bytes = parse_prefix(self._exactly(PREFIX_BYTES), None)
        return parse_header(self._exactly(header_bytes)), body_bytes

    def expect(self, kind: str) -> tuple[dict[str, Any], int]:
        """Read a frame that has to be of one kind.

        Parameters
        ----------
        kind
            What the message has to be.

        Returns
        -------
        tuple of dict and int
            As :meth:`receive`.

        Raises
        ------
        PeerFailedError
            If the peer says that it failed, with its words.
        FrameError
            If it is another one.
        """
        header, size = self.receive()
        if header["kind"] == "failed":
            raise PeerFailedError(str(header.get("why")))
        if header["kind"] != kind:
            raise FrameError(f"a {header['kind']!r} frame where {kind!r} was to come")
        return header, size

    def body(self, size: int) -> Iterator[memoryview]:
        """Read a body in pieces, each valid until the next one is asked for.

        Parameters
        ----------
        size
            Its bytes.

        Yields
        ------
        memoryview
            The next bytes.
        """
        buffer = memoryview(bytearray(min(size, PIECE_BYTES)))
        while size:
            piece = buffer[: min(size, PIECE_BYTES)]
            self.read_into(piece)
            size -= len(piece)
            yield piece

    def read_into(self, view: memoryview) -> None:
        """Read the next bytes of a body to where they are needed.

        Parameters
        ----------
        view
            The memory; all of it is filled.

        Raises
        ------
        ConnectionError
            If the peer is gone.
        """
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionResetError("the peer closed the connection in between")
            view = view[count:]

    def whole_body(self, size: int) -> bytes:
        """Read a body that fits into memory.

        Parameters
        ----------
        size
            Its bytes.

        Returns
        -------
        bytes
            The body.

        Raises
        ------
        FrameError
            If it is larger than a frame's body may be.
        """
        if size > MAX_BODY_BYTES:
            raise FrameError(f"a body of {size} bytes; at most {MAX_BODY_BYTES} are read")
        return self._exactly(size)

    def discard_rest(self, seconds: float) -> None:
        """Read and drop what still comes, so that the peer can read our last frame first.

        Parameters
        ----------
        seconds
            Most seconds to go on.
        """
        end_by = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        with contextlib.suppress(OSError):
            while time.monotonic() < end_by and self._socket.recv(PIECE_BYTES):
                pass

    def close(self) -> None:
        """Close the socket; another thread that uses it gets an OSError."""
        with contextlib.suppress(OSError):  # the peer is gone
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> BulkConnection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _exactly(self, count: int) -> bytes:
        return b"".join(bytes(piece) for piece in self.body(count))

    def _prove(self, token: bytes) -> None:
        check_magic(self._exactly(MAGIC_BYTES))
        answer, expected = answer_nonce(token, self._exactly(NONCE_BYTES))
        self._socket.sendall(answer)
        check_proof(expected, self._exactly(PROOF_BYTES))
