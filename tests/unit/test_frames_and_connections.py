"""Frames and the handshake, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import re
import resource
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator

import psutil
import pytest

from horovodrunner.wire import connection as connection_module
from horovodrunner.wire.connection import (
    AuthenticationError,
    Connection,
    FrameServer,
    connect,
)
from horovodrunner.wire.frames import (
    MAGIC,
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    Frame,
    FrameError,
    encode_frame,
    handshake_proof,
    parse_header,
    parse_prefix,
)
from tests.processes import PIPE, started

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


STRANGERS = """
import resource, socket, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
opened = []
print("begins", flush=True)
for _ in range(int(sys.argv[2])):
    stranger = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=30)
    stranger.sendall(b"x")
    opened.append(stranger)
print("opened", flush=True)
sys.stdin.read()
"""
"""Opens as many connections as it is told to, says one byte on each, and keeps them."""


@contextlib.contextmanager
def strangers(port: int, count: int) -> Iterator[Callable[[], bool]]:
    """Let another process, with file descriptors of its own, connect; yield whether it has."""
    command = [sys.executable, "-c", STRANGERS, str(port), str(count)]
    with started(command, stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        yield asyncio.create_task(asyncio.to_thread(process.stdout.readline)).done


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """Let this process have 1024 file descriptors, as many systems do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield 1024
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def no_noise(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Fail a test in which asyncio complains, also about what the garbage collector finds."""
    yield
    gc.collect()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert capfd.readouterr().err == ""


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


@pytest.mark.usefixtures("few_descriptors", "no_noise")
def test_thousands_of_strangers_do_not_keep_a_peer_out() -> None:
    """They come faster than their time runs out, and they hold all the places there are."""
    process = psutil.Process()
    fds: list[int] = []

    async def scenario(
        server: FrameServer, port: int, frames: list[Frame], refusals: list[str]
    ) -> None:
        fds_before, rss_before = process.num_fds(), process.memory_info().rss
        with strangers(port, 4000) as all_opened:
            while not all_opened() or len(fds) < 5:
                peer = await connect("127.0.0.1", port, TOKEN, 60)
                peer.send("hello")
                fds.append(process.num_fds() - fds_before)
                await peer.close()
            await until(lambda: len(frames) == len(fds))
            assert len(server._unproved) <= connection_module.MAX_UNPROVED_CONNECTIONS
            assert process.memory_info().rss - rss_before < 100 * 1024 * 1024

    _, refusals = serve(scenario)
    assert 200 < max(fds) < 256 + 100
    assert len(refusals) == 1
    assert "256 newer ones" in refusals[0]


def test_peers_that_are_expected_have_room_in_the_handshake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All tasks of a run come at once, and there may be more than strangers may be."""
    monkeypatch.setattr(connection_module, "MAX_UNPROVED_CONNECTIONS", 3)
    refusals: list[str] = []

    async def run() -> None:
        server = FrameServer(TOKEN, lambda peer: asyncio.sleep(0), refusals.append, peers=5)
        port = await server.start("127.0.0.1")
        others = []
        try:
            for number in range(1, 9):
                others.append((await asyncio.open_connection("127.0.0.1", port))[1])
                await until(lambda number=number: len(server._unproved) == number)  # type: ignore[misc]
            assert refusals == []
            others.append((await asyncio.open_connection("127.0.0.1", port))[1])
            await until(lambda: bool(refusals))
            assert len(server._unproved) <= 8
        finally:
            for stranger in others:
                stranger.transport.abort()
            await server.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert "8 newer ones" in refusals[0]


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("turns", range(6))
def test_a_server_that_closes_under_a_flood_leaves_no_task_behind(turns: int) -> None:
    """In a loop of its own that ends right then, as the driver channel's does."""
    loop = asyncio.new_event_loop()
    server = FrameServer(TOKEN, lambda peer: asyncio.sleep(0), lambda why: None)

    async def run() -> None:
        port = await server.start("127.0.0.1")
        clients = []
        for _ in range(100):
            clients.append(socket.socket())
            clients[-1].setblocking(False)
            clients[-1].connect_ex(("127.0.0.1", port))
        for _ in range(turns):
            await asyncio.sleep(0)
        await server.close()
        for client in clients:
            client.close()

    loop.run_until_complete(run())
    left = asyncio.all_tasks(loop)
    loop.close()
    assert left == set()


@pytest.mark.usefixtures("no_noise")
def test_a_peer_that_sends_a_byte_now_and_then_is_dropped_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection_module, "HANDSHAKE_SECONDS", 0.5)

    async def scenario(server: FrameServer, port: int, *_: object) -> None:
        writer = (await asyncio.open_connection("127.0.0.1", port))[1]
        while not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(0.05)
        assert not server._unproved

    _, refusals = serve(scenario)
    assert "it sent no proof within 0.5 s" in refusals[0]


def announce(header: bytes, body_bytes: int = 0, header_bytes: int | None = None) -> bytes:
    """Encode a frame's beginning, of any kind."""
    size = len(header) if header_bytes is None else header_bytes
    return size.to_bytes(4, "big") + body_bytes.to_bytes(8, "big") + header


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"\0\0\0", "3 bytes where 12 belong"),
        (announce(b'{"ki', header_bytes=16), "4 bytes where 16 belong"),
        (announce(b'{"kind": "x"}', 100) + b"half", "a body of 4 bytes where 100"),
        (announce(b'{"kind": "x"}', MAX_BODY_BYTES + 1), "at most"),
        (announce(b"", header_bytes=MAX_HEADER_BYTES + 1), "at most"),
        (announce(b"GET / HTTP/1.1"), "not JSON"),
        (announce(b"\xff\xfe\x80"), "not JSON"),
        (announce(b"[" * 1_000_000), "nested too deeply"),
        (announce(b"[1]"), "not a JSON object"),
        (announce(b'{"kind": "needs-rank"}'), "KeyError('rank')"),
    ],
)
def test_a_proved_peer_that_sends_something_else_is_closed_and_reported_once(
    sent: bytes, why: str
) -> None:
    reports: list[str] = []

    async def collect(peer: Connection) -> None:
        while (frame := await peer.receive()) is not None:
            if frame.kind == "needs-rank":
                peer.send("echo", rank=frame.header["rank"])

    async def run() -> None:
        server = FrameServer(TOKEN, collect, reports.append)
        port = await server.start("127.0.0.1")
        for _ in range(3):
            peer = await connect("127.0.0.1", port, TOKEN, 5)
            peer._writer.write(sent)
            peer._writer.write_eof()
            assert await peer.receive() is None
            await peer.close()
        peer = await connect("127.0.0.1", port, TOKEN, 5)
        peer.send("needs-rank", rank=3)
        answer = await peer.receive()
        assert answer is not None
        assert answer.header["rank"] == 3
        await peer.close()
        await server.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    (report,) = reports
    assert re.match(r"a connection from 127\.0\.0\.1:\d+ was closed: ", report)
    assert why in report


def test_a_refused_stranger_does_not_hide_a_proved_peer_that_is_closed() -> None:
    async def scenario(
        server: FrameServer, port: int, frames: list[Frame], refusals: list[str]
    ) -> None:
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"x" * 200)
            await until(lambda: len(refusals) == 1)
        peer = await connect("127.0.0.1", port, TOKEN, 5)
        peer._writer.write(announce(json.dumps([]).encode()))
        assert await peer.receive() is None
        await peer.close()

    _, refusals = serve(scenario)
    assert ["refused" in refusals[0], "closed" in refusals[1]] == [True, True]


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
