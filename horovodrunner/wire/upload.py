"""Bulk between a task and the driver, on a connection of its own. Runs in: the driver and the task.

What travels is a sequence of pieces: names, sizes and bytes, larger than memory if need be::

    task ── what it is about ─────────────────▶ driver
    up:   task ◀─ go ────────────────────────── driver, which has made room for it
          task ── (piece, its bytes)*, end ───▶ driver, which answers "end" or "failed"
    (before "go", the driver says "not yet" while it takes in too many others)
    down: task ◀─ (piece, its bytes)*, end ──── driver; or "failed"

Sockets block here, in threads: an event loop's streams copy every byte twice more, which halves the
speed at a gigabyte a second.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from horovodrunner.wire.auth import (
    MAGIC_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    answer_nonce,
    check_magic,
    check_proof,
)
from horovodrunner.wire.events import (
    MAX_BODY_BYTES,
    PREFIX_BYTES,
    End,
    Event,
    FrameError,
    Go,
    NotYet,
    PieceFollows,
    TransferFailed,
    decode,
    encode,
    parse_prefix,
)

__all__ = [
    "IncomingPiece",
    "PeerFailedError",
    "Piece",
    "Transfer",
    "TransferClient",
    "TransferHandler",
    "chunks_of",
    "in_thread",
]

SILENCE_SECONDS = 30.0
"""A transfer that makes no progress for so long is given up."""

HANG_UP_SECONDS = 5.0
"""How long a task may take to notice that the driver does not want the rest."""

CHUNK_BYTES = 1024 * 1024

WAIT_SECONDS = 1.0
"""How often a task that has to wait for its turn hears so."""

_Result = TypeVar("_Result")


class PeerFailedError(OSError):
    """The peer failed, in its own words."""


@dataclass
class Piece:
    """A file or a buffer; its chunks are read once, each of them before the next is asked for."""

    name: str
    size: int
    chunks: Iterable[bytes | memoryview]

    def read(self) -> bytes:
        """Return all bytes of a piece that fits into memory."""
        if self.size > MAX_BODY_BYTES:
            raise FrameError(f"a piece of {self.size} bytes; at most {MAX_BODY_BYTES} are read")
        return b"".join(bytes(chunk) for chunk in self.chunks)


class IncomingPiece(Piece):
    """A piece that arrives, and has to be read before the next one is asked for."""

    def __init__(self, name: str, size: int, receive_into: Callable[[memoryview], object]) -> None:
        super().__init__(name, size, self._receive_chunks())
        self._left = size
        self._receive_into = receive_into

    def read_into(self, view: memoryview) -> None:
        """Fill a view with the next bytes."""
        if len(view) > self._left:
            raise FrameError(f"a piece of {self.size} bytes where more belong")
        self._receive_into(view)
        self._left -= len(view)

    def _receive_chunks(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(self._left, CHUNK_BYTES)))
        while self._left:
            chunk = buffer[: self._left]
            self.read_into(chunk)
            yield chunk


@dataclass(frozen=True)
class TransferHandler:
    """What the driver does with one kind of transfer.

    `handle` gets the request's fields and the pieces that come. It has taken them in when it
    returns None; otherwise it returns the pieces to send down. What it raises is told to the task.
    """

    title: str
    handle: Callable[[Any, Iterator[IncomingPiece]], Iterable[Piece] | None]
    turns: threading.Semaphore | None = None
    """Bounds how many tasks send at once, or None where so few do that it does not matter."""


class Transfer:
    """One transfer's connection, whose peer has proved the token."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.settimeout(SILENCE_SECONDS)
        self._is_within_piece = False

    @classmethod
    def open(cls, host: str, port: int, token: bytes) -> Transfer:
        """Connect to a server and prove the token to each other."""
        transfer = cls(socket.create_connection((host, port), SILENCE_SECONDS))
        try:
            transfer._prove(token)
        except BaseException:
            transfer.close()
            raise
        return transfer

    def upload(self, pieces: Iterable[Piece]) -> None:
        """Send pieces and wait until the driver has taken them in."""
        for _ in self.exchange(pieces):
            pass

    def exchange(self, pieces: Iterable[Piece]) -> Iterator[IncomingPiece]:
        """Send pieces, and yield those that the driver answers with once it has taken them in."""
        while isinstance(self._expect(Go, NotYet), NotYet):
            pass
        try:
            self._send_pieces(pieces)
        except ConnectionError:
            self._expect(End)  # the driver may have said why it hung up
            raise
        yield from self.download()

    def download(self) -> Iterator[IncomingPiece]:
        """Yield the pieces that the driver sends."""
        while isinstance(head := self._expect(PieceFollows, End), PieceFollows):
            piece = IncomingPiece(head.name, head.size, self._receive_into)
            yield piece
            for _ in piece.chunks:
                pass  # what nobody wanted

    def serve(self, handler: TransferHandler, request: Event, note: Callable[[str], None]) -> None:
        """Do, on the driver, what the task asks for; `note` takes a sentence for the user."""
        try:
            with contextlib.closing(self._upload(handler.turns)) as coming:
                reply = handler.handle(request, coming)
                if reply is None and next(coming, None) is not None:
                    raise FrameError("more pieces than belong there")
            self._send_pieces(reply or ())
        except ConnectionError as error:
            note(f"{handler.title} broke off: {error}")
        except Exception as error:  # noqa: BLE001 - the task is to know; nobody else would catch it
            if self._is_within_piece:  # nothing can be said any more; hanging up says it
                note(f"{handler.title} broke off: {error}")
                return
            why = str(error) if type(error) is OSError else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):  # it is gone, or the channel is closed
                self.send(TransferFailed(why))
                self._discard_rest()

    def close(self) -> None:
        """Close the socket; another thread that uses it gets an OSError."""
        with contextlib.suppress(OSError):  # the peer is gone
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _upload(self, turns: threading.Semaphore | None) -> Generator[IncomingPiece, None, None]:
        if turns is None:
            self.send(Go())  # once the receiver asks for the first piece, it is ready
            yield from self.download()
            return
        while not turns.acquire(timeout=WAIT_SECONDS):
            self.send(NotYet())
        try:
            self.send(Go())
            yield from self.download()
        finally:
            turns.release()

    def send(self, event: Event) -> None:
        self._socket.sendall(b"".join(encode(event)))

    def _send_pieces(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self.send(PieceFollows(piece.name, piece.size))
            self._is_within_piece = True
            self._send_chunks(piece)
            self._is_within_piece = False
        self.send(End())

    def _send_chunks(self, piece: Piece) -> None:
        sent = 0
        for chunk in piece.chunks:
            sent += len(chunk)
            if sent > piece.size:
                raise OSError(f"{piece.name} has more than the {piece.size} bytes announced")
            if self._has_something_to_say():
                raise ConnectionAbortedError("the peer does not want the rest")
            self._socket.sendall(chunk)
        if sent < piece.size:
            raise OSError(f"{piece.name} has {sent} bytes, {piece.size} were announced")

    def _has_something_to_say(self) -> bool:
        descriptor = self._socket.fileno()
        if descriptor < 0:
            raise ConnectionAbortedError("the connection was closed here")
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def _expect(self, *kinds: type[Event]) -> Event:
        header_bytes, _ = parse_prefix(self._exactly(PREFIX_BYTES), 0)
        event = decode(self._exactly(header_bytes))
        if isinstance(event, TransferFailed):
            raise PeerFailedError(event.why)
        if not isinstance(event, kinds):
            raise FrameError(f"{type(event).__name__} where {kinds[0].__name__} was to come")
        return event

    def _exactly(self, count: int) -> bytes:
        data = bytearray(count)
        self._receive_into(memoryview(data))
        return bytes(data)

    def _receive_into(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionResetError("the peer closed the connection in between")
            view = view[count:]

    def _discard_rest(self) -> None:
        """Drop what still comes, so that the peer can read our last frame first."""
        end_by = time.monotonic() + HANG_UP_SECONDS
        self._socket.settimeout(HANG_UP_SECONDS)
        while time.monotonic() < end_by and self._socket.recv(CHUNK_BYTES):
            pass

    def _prove(self, token: bytes) -> None:
        check_magic(self._exactly(MAGIC_BYTES))
        answer, expected = answer_nonce(token, self._exactly(NONCE_BYTES))
        self._socket.sendall(answer)
        check_proof(expected, self._exactly(PROOF_BYTES))


class TransferClient:
    """A task's transfers to and from the driver, each on a connection of its own."""

    def __init__(self, run_id: str, token: bytes, address: tuple[str, int] | None) -> None:
        self.run_id = run_id
        self._token = token
        self._address = address
        self._open: set[Transfer] = set()
        self.is_aborted = False

    def upload(self, request: Event, pieces: Iterable[Piece]) -> None:
        """Send pieces to the driver; they are taken in when this returns."""
        with self._connected(request) as transfer:
            transfer.upload(pieces)

    @contextlib.contextmanager
    def download(self, request: Event) -> Iterator[Iterator[IncomingPiece]]:
        """Ask the driver for pieces."""
        with self._connected(request) as transfer:
            yield transfer.download()

    @contextlib.contextmanager
    def exchange(
        self, request: Event, pieces: Iterable[Piece]
    ) -> Iterator[Iterator[IncomingPiece]]:
        """Send pieces to the driver, and receive those that it answers with."""
        with self._connected(request) as transfer:
            yield transfer.exchange(pieces)

    def abort(self) -> None:
        """Let transfers of other threads fail soon, and later ones at once."""
        self.is_aborted = True
        for transfer in list(self._open):
            transfer.close()

    @contextlib.contextmanager
    def _connected(self, request: Event) -> Iterator[Transfer]:
        if self.is_aborted or self._address is None:
            raise ConnectionAbortedError("the run has ended")
        host, port = self._address
        try:
            transfer = Transfer.open(host, port, self._token)
        except OSError as error:
            raise type(error)(f"the driver at {host}:{port} cannot be reached: {error}") from error
        with contextlib.closing(transfer):
            self._open.add(transfer)
            try:
                if self.is_aborted:
                    raise ConnectionAbortedError("the run has ended")
                transfer.send(request)
                yield transfer
            except FrameError as error:
                raise OSError(f"the driver at {host}:{port} answered {error}") from error
            finally:
                self._open.discard(transfer)


def chunks_of(file: BinaryIO, limit: int | None = None) -> Iterator[memoryview]:
    """Read a file, or its first `limit` bytes, in chunks that are valid until the next one."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while count := file.readinto(buffer[:limit]):  # type: ignore[attr-defined]
        yield buffer[:count]
        if limit is not None:
            limit -= count


async def in_thread(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call a blocking function; a thread that never returns does not keep the process."""
    future: concurrent.futures.Future[_Result] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # whoever gives the waiting up does not stop the thread

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
            future.set_exception(error)

    threading.Thread(target=work, name="horovodrunner-transfer", daemon=True).start()
    return await asyncio.wrap_future(future)
