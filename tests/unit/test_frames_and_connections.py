"""Frames and the handshake, over real sockets."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable

import pytest

from horovodrunner.core import connection as connection_module
from horovodrunner.core.connection import (
    AuthenticationError,
    Connection,
    FrameServer,
    connect,
)
from horovodrunner.core.frames import (
    MAGIC,
    MAX_BODY_BYTES,
    PREFIX_BYTES,
    Frame,
    FrameError,
    encode_frame,
    handshake_proof,
    parse_header,
    parse_prefix,
)

TOKEN = b"t" * 32
Scenario = Callable[[FrameServer, int, list[Frame], list[str]], Awaitable[None]]


def serve(scenario: Scenario) -> tuple[list[Frame], list[str]]:
    """Run a scenario against a server that collects frames; gives frames and refusals."""
    frames: list[Frame] = []
    refusals: list[str] = []

    async def collect(peer: Connection) -> None:
        while (frame := await peer.receive()) is not None:
            frames.append(frame)
            peer.send("echo", frame.body)

    async def run() -> None:
        server = FrameServer(TOKEN, collect, refusals.append)
        port = await server.start("127.0.0.1")
        try:
            await scenario(server, port, frames, refusals)
        finally:
            await server.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    return frames, refusals


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_frames_cross_a_proved_connection_both_ways() -> None:
    async def scenario(server: FrameServer, port: int, *_: object) -> None:
        peer = await connect("127.0.0.1", port, TOKEN, 5)
        peer.send("lines", b"x" * 3_000_000, rank=1)
        answer = await peer.receive()
        assert answer is not None
        assert answer.kind == "echo"
        assert len(answer.body) == 3_000_000
        await peer.close()

    frames, refusals = serve(scenario)
    assert [(f.kind, f.header["rank"], len(f.body)) for f in frames] == [("lines", 1, 3_000_000)]
    assert refusals == []


def test_a_client_with_another_token_is_refused_and_told_so() -> None:
    async def scenario(server: FrameServer, port: int, *_: object) -> None:
        with pytest.raises(ConnectionError):
            await connect("127.0.0.1", port, b"wrong" * 8, 5)

    frames, refusals = serve(scenario)
    assert frames == []
    assert "token" in refusals[0]


def test_a_client_does_not_trust_a_server_with_another_token() -> None:
    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(MAGIC + b"n" * 32)
        await reader.readexactly(64)
        writer.write(b"p" * 32)
        await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(pretend, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(AuthenticationError, match="token"):
                await connect("127.0.0.1", port, TOKEN, 5)

    asyncio.run(run())


def test_an_answer_cannot_be_sent_back_as_ones_own() -> None:
    nonces = (b"s" * 32, b"c" * 32)
    client = handshake_proof(TOKEN, "client", *nonces)
    assert client != handshake_proof(TOKEN, "server", *nonces)
    assert client != handshake_proof(TOKEN, "client", *nonces[::-1])
    assert client == handshake_proof(TOKEN, "client", *nonces)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10, b"\0" * 200, b"\x80\x04."]
)
def test_bytes_that_are_not_ours_are_refused_once_logged(garbage: bytes) -> None:
    async def scenario(
        server: FrameServer, port: int, frames: list[Frame], refusals: list[str]
    ) -> None:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as intruder:
                intruder.sendall(garbage)
        await until(lambda: bool(refusals))
        peer = await connect("127.0.0.1", port, TOKEN, 5)
        peer.send("still-here")
        await until(lambda: bool(frames))
        await peer.close()

    frames, refusals = serve(scenario)
    assert [frame.kind for frame in frames] == ["still-here"]
    assert len(refusals) == 1


def test_peers_that_say_nothing_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "HANDSHAKE_SECONDS", 0.3)

    async def scenario(
        server: FrameServer, port: int, frames: list[Frame], refusals: list[str]
    ) -> None:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(300)]
        await until(lambda: server._unproved == 0 and bool(refusals))
        peer = await connect("127.0.0.1", port, TOKEN, 5)
        peer.send("after-all")
        await until(lambda: bool(frames))
        await peer.close()
        for _, intruder in silent:
            intruder.transport.abort()

    frames, _ = serve(scenario)
    assert [frame.kind for frame in frames] == ["after-all"]


def test_an_oversized_frame_ends_the_connection_before_it_is_read() -> None:
    async def scenario(server: FrameServer, port: int, *_: object) -> None:
        peer = await connect("127.0.0.1", port, TOKEN, 5)
        head = encode_frame("lines", b"")
        peer._writer.write(head[:4] + (MAX_BODY_BYTES + 1).to_bytes(8, "big") + head[PREFIX_BYTES:])
        assert await peer.receive() is None
        await peer.close()

    frames, _ = serve(scenario)
    assert frames == []


def test_prefixes_and_headers_are_checked() -> None:
    with pytest.raises(FrameError, match="header"):
        parse_prefix(b"\xff" * PREFIX_BYTES, 10)
    with pytest.raises(FrameError, match="body of 11 bytes"):
        parse_prefix((1).to_bytes(4, "big") + (11).to_bytes(8, "big"), 10)
    for text in (b"{", b"[]", b'{"rank": 1}'):
        with pytest.raises(FrameError):
            parse_header(text)


def test_lines_a_slow_peer_does_not_read_are_dropped_and_counted() -> None:
    async def run() -> None:
        hold = asyncio.Event()
        received: list[Frame] = []

        async def slow(peer: Connection) -> None:
            await hold.wait()
            while (frame := await peer.receive()) is not None:
                received.append(frame)
            ended.set()

        ended = asyncio.Event()
        server = FrameServer(TOKEN, slow, lambda why: None)
        port = await server.start("127.0.0.1")
        peer = await connect("127.0.0.1", port, TOKEN, 5)
        block = (b"y" * 99 + b"\n") * 10_000
        for _ in range(100):
            peer.send_lines(block, rank=7)
            await asyncio.sleep(0)
        assert peer._writer.transport.get_write_buffer_size() < 16 * 1024 * 1024
        hold.set()
        await peer.close()
        await ended.wait()
        await server.close()
        text = b"".join(frame.body for frame in received)
        missing = [
            int(count) for count in re.findall(rb"HorovodRunner: (\d+) lines are missing", text)
        ]
        assert missing
        assert text.count(b"y\n") + sum(missing) == 1_000_000
        assert received[-1].header["rank"] == 7

    asyncio.run(asyncio.wait_for(run(), 60))


def test_connecting_to_nobody_is_an_os_error() -> None:
    with socket.socket() as keeper:
        keeper.bind(("127.0.0.1", 0))  # bound, not listening
        with pytest.raises(ConnectionRefusedError):
            asyncio.run(connect("127.0.0.1", keeper.getsockname()[1], TOKEN, 2))


def test_connecting_to_somebody_silent_times_out() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(TimeoutError, match=r"0\.2"),
    ):
        asyncio.run(connect("127.0.0.1", silent.getsockname()[1], TOKEN, 0.2))
