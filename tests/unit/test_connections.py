"""Events and the handshake, over real sockets."""

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

from horovodrunner.wire import auth
from horovodrunner.wire import server as server_module
from horovodrunner.wire.auth import AuthenticationError
from horovodrunner.wire.events import MAX_BODY_BYTES, MAX_HEADER_BYTES, Event, Message, Stack, Stop
from horovodrunner.wire.server import EventServer
from horovodrunner.wire.stream import Connection, connect
from tests.processes import PIPE, started

TOKEN = b"t" * 32
Scenario = Callable[[EventServer, int, list[Event], list[str]], Awaitable[None]]


def serve(scenario: Scenario) -> tuple[list[Event], list[str]]:
    """Run a scenario against a server that collects events; return events and refusals."""
    events: list[Event] = []
    refusals: list[str] = []

    async def collect(peer: Connection) -> None:
        while (event := await peer.receive()) is not None:
            events.append(event)
            peer.send(event)

    async def run() -> None:
        server = EventServer(TOKEN, collect, refusals.append)
        port = await server.start("127.0.0.1")
        try:
            await scenario(server, port, events, refusals)
        finally:
            await server.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    return events, refusals


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


def test_events_cross_a_proved_connection_both_ways() -> None:
    sent = Stack(1, b"x" * 3_000_000)

    async def scenario(server: EventServer, port: int, *_: object) -> None:
        peer = await connect("127.0.0.1", port, TOKEN, 5)
        peer.send(sent)
        assert await peer.receive() == sent
        await peer.close()

    events, refusals = serve(scenario)
    assert events == [sent]
    assert refusals == []


def test_a_client_with_another_token_is_refused_and_told_so() -> None:
    async def scenario(server: EventServer, port: int, *_: object) -> None:
        with pytest.raises(ConnectionError):
            await connect("127.0.0.1", port, b"wrong" * 8, 5)

    events, refusals = serve(scenario)
    assert events == []
    assert "token" in refusals[0]


def test_a_client_does_not_trust_a_server_with_another_token() -> None:
    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(auth.greeting())
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
    greeting = auth.greeting()
    answer, expected = auth.answer_nonce(TOKEN, greeting[auth.MAGIC_BYTES :])
    proof = auth.check_answer(TOKEN, greeting, answer)
    auth.check_proof(expected, proof)
    assert answer[-auth.PROOF_BYTES :] != proof
    for wrong in (answer[:-1] + b"\0", bytes(auth.ANSWER_BYTES), proof + proof):
        with pytest.raises(AuthenticationError):
            auth.check_answer(TOKEN, greeting, wrong)
    with pytest.raises(AuthenticationError):
        auth.check_answer(TOKEN, auth.greeting(), answer)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10, b"\0" * 200, b"\x80\x04."]
)
def test_bytes_that_are_not_ours_are_refused_once_logged(garbage: bytes) -> None:
    async def scenario(
        server: EventServer, port: int, events: list[Event], refusals: list[str]
    ) -> None:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as intruder:
                intruder.sendall(garbage)
        await until(lambda: bool(refusals))
        peer = await connect("127.0.0.1", port, TOKEN, 5)
        peer.send(Stop())
        await until(lambda: bool(events))
        await peer.close()

    events, refusals = serve(scenario)
    assert events == [Stop()]
    assert len(refusals) == 1


@pytest.mark.usefixtures("few_descriptors", "no_noise")
def test_thousands_of_strangers_do_not_keep_a_peer_out() -> None:
    """They come faster than their time runs out, and they hold all the places there are."""
    process = psutil.Process()
    fds: list[int] = []

    async def scenario(
        server: EventServer, port: int, events: list[Event], refusals: list[str]
    ) -> None:
        fds_before, rss_before = process.num_fds(), process.memory_info().rss
        with strangers(port, 4000) as all_opened:
            while not all_opened() or len(fds) < 5:
                peer = await connect("127.0.0.1", port, TOKEN, 60)
                peer.send(Stop())
                fds.append(process.num_fds() - fds_before)
                await peer.close()
            await until(lambda: len(events) == len(fds))
            assert len(server._unproved) <= server_module.MAX_UNPROVED_CONNECTIONS
            assert process.memory_info().rss - rss_before < 100 * 1024 * 1024

    _, refusals = serve(scenario)
    assert 200 < max(fds) < 256 + 100
    assert len(refusals) == 1
    assert "256 newer ones" in refusals[0]


def test_peers_that_are_expected_have_room_in_the_handshake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All tasks of a run come at once, and there may be more than strangers may be."""
    monkeypatch.setattr(server_module, "MAX_UNPROVED_CONNECTIONS", 3)
    refusals: list[str] = []

    async def run() -> None:
        server = EventServer(TOKEN, lambda peer: asyncio.sleep(0), refusals.append, peers=5)
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
    server = EventServer(TOKEN, lambda peer: asyncio.sleep(0), lambda why: None)

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
    monkeypatch.setattr(server_module, "HANDSHAKE_SECONDS", 0.5)

    async def scenario(server: EventServer, port: int, *_: object) -> None:
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
        (announce(b'{"kind": "Stack", "rank": 0}', 100) + b"half", "a body of 4 bytes where 100"),
        (announce(b'{"kind": "Stack", "rank": 0}', MAX_BODY_BYTES + 1), "at most"),
        (announce(b"", header_bytes=MAX_HEADER_BYTES + 1), "at most"),
        (announce(b"GET / HTTP/1.1"), "not JSON"),
        (announce(b"[" * 1_000_000), "nested too deeply"),
        (announce(b'{"kind": "Started"}'), "Started lacks the field"),
        (announce(b'{"kind": "Message", "rank": 99, "text": ""}'), "KeyError(99)"),
    ],
)
def test_a_proved_peer_that_sends_something_else_is_closed_and_reported_once(
    sent: bytes, why: str
) -> None:
    reports: list[str] = []

    async def collect(peer: Connection) -> None:
        while (event := await peer.receive()) is not None:
            assert isinstance(event, Message)
            peer.send(Message(event.rank, {3: "known"}[event.rank]))

    async def run() -> None:
        server = EventServer(TOKEN, collect, reports.append)
        port = await server.start("127.0.0.1")
        for _ in range(3):
            peer = await connect("127.0.0.1", port, TOKEN, 5)
            peer._writer.write(sent)
            peer._writer.write_eof()
            assert await peer.receive() is None
            await peer.close()
        peer = await connect("127.0.0.1", port, TOKEN, 5)
        peer.send(Message(3, "?"))
        assert await peer.receive() == Message(3, "known")
        await peer.close()
        await server.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    (report,) = reports
    assert re.match(r"a connection from 127\.0\.0\.1:\d+ was closed: ", report)
    assert why in report


def test_a_refused_stranger_does_not_hide_a_proved_peer_that_is_closed() -> None:
    async def scenario(
        server: EventServer, port: int, events: list[Event], refusals: list[str]
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
