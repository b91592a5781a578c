"""Horovod's own launcher code, as partition 0 uses it."""

from __future__ import annotations

import contextlib
import http.client
import re
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from horovodrunner.placement import rendezvous as horovodrun
from horovodrunner.placement.rendezvous import Rendezvous
from horovodrunner.placement.topology import Member, assign_slots
from tests import processes
from tests.waiting import wait_until

pytestmark = pytest.mark.horovod


def member(workers: int) -> Member:
    return Member(0, "a-id", "a", "10.0.0.1", "eth0", workers=workers)


@pytest.fixture
def rendezvous() -> Iterator[Rendezvous]:
    server = Rendezvous("127.0.0.1")
    yield server
    server.close()


@pytest.fixture
def planned(rendezvous: Rendezvous) -> Rendezvous:
    rendezvous.set_plan(assign_slots([member(workers=2)]))
    return rendezvous


@pytest.fixture
def silent(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], rendezvous: Rendezvous
) -> Iterator[None]:
    """Fail a test in which the server writes anything to stdout, stderr or a log."""
    yield
    rendezvous.close()
    assert [record.getMessage() for record in caplog.records] == []
    assert capfd.readouterr() == ("", "")


def request(
    port: int, method: str, body: bytes | None = None, path: str = "/global/rank0"
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def exchange(port: int, sent: bytes) -> bytes:
    """Send bytes as they are; return all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as stranger:
        answer = b""
        try:
            stranger.sendall(sent)
            while piece := stranger.recv(65536):
                answer += piece
        except ConnectionError:
            pass  # it did not read what we sent
        return answer


def test_what_an_eager_worker_stores_before_the_plan_is_kept(rendezvous: Rendezvous) -> None:
    """Without waiting it would be lost, and the job would die half a minute later."""
    answers: list[tuple[int, bytes]] = []
    eager = threading.Thread(
        target=lambda: answers.append(request(rendezvous.port, "PUT", b"address"))
    )
    eager.start()
    eager.join(0.5)
    assert eager.is_alive()  # it waits for the plan
    rendezvous.set_plan(assign_slots([member(workers=2)]))
    eager.join(10)
    assert answers == [(200, b"")]
    assert request(rendezvous.port, "GET") == (200, b"address")


def test_closing_frees_the_port() -> None:
    server = Rendezvous("127.0.0.1")
    server.close()
    with socket.create_server(("127.0.0.1", server.port)):
        pass


STRANGERS = """
import resource, socket, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
port, count, sent = int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3])
opened = []
print("begins", flush=True)
for _ in range(count):
    stranger = socket.create_connection(("127.0.0.1", port), timeout=30)
    try:
        stranger.sendall(sent)
    except ConnectionError:
        pass
    opened.append(stranger)
print("opened", flush=True)
sys.stdin.read()
"""
"""Opens as many connections as it is told to, says the beginning of a request, keeps them."""


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """Let this process have 1024 file descriptors, as many systems do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_descriptors", "silent")
@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /global", b"PUT /global/k HTTP/1.1\r\nContent-Length: 1000000\r\n\r\nhalf"],
    ids=["nothing", "half a line", "half a value"],
)
def test_thousands_of_strangers_do_not_keep_a_worker_out(planned: Rendezvous, sent: bytes) -> None:
    process = psutil.Process()
    fds, rss, threads = process.num_fds(), process.memory_info().rss, threading.active_count()
    command = [sys.executable, "-c", STRANGERS, str(planned.port), "3000", sent.hex()]
    with processes.started(command, stdin=processes.PIPE, stdout=processes.PIPE) as flood:
        assert flood.stdout is not None
        assert flood.stdout.readline() == "begins\n"
        all_opened = threading.Thread(target=flood.stdout.readline)
        all_opened.start()
        asked = 0
        most = [0, 0]
        while all_opened.is_alive() or asked < 5:
            assert request(planned.port, "PUT", b"address") == (200, b"")
            assert request(planned.port, "GET") == (200, b"address")
            asked += 1
            most = [max(most[0], process.num_fds()), max(most[1], threading.active_count())]
        assert 200 < most[0] - fds < 256 + 50
        assert 200 < most[1] - threads < 256 + 50
        assert process.memory_info().rss - rss < 100 * 1024 * 1024


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("head", [b"", b"PUT /global/k HTTP/1.1\r\nContent-Length: 99\r\n\r\n"])
def test_a_request_that_comes_byte_by_byte_is_dropped_in_time(
    planned: Rendezvous, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(horovodrun, "REQUEST_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", planned.port), timeout=10) as stranger:
        stranger.sendall(head)
        with contextlib.suppress(ConnectionError):
            while True:
                stranger.sendall(b"x")
                time.sleep(0.05)
    assert request(planned.port, "GET", path="/global/k")[0] == 404


@pytest.mark.usefixtures("silent")
def test_a_request_that_waits_for_the_plan_is_not_dropped(
    rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither because its time is over nor for those that come later."""
    monkeypatch.setattr(horovodrun, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(horovodrun, "MAX_CONNECTIONS", 4)
    answers: list[tuple[int, bytes]] = []
    eager = threading.Thread(
        target=lambda: answers.append(request(rendezvous.port, "PUT", b"address"))
    )
    eager.start()
    eager.join(0.2)
    strangers = [socket.create_connection(("127.0.0.1", rendezvous.port)) for _ in range(20)]
    eager.join(0.5)
    assert eager.is_alive()
    rendezvous.set_plan(assign_slots([member(workers=2)]))
    eager.join(10)
    assert answers == [(200, b"")]
    for stranger in strangers:
        stranger.close()


@pytest.mark.usefixtures("silent")
def test_more_workers_than_connections_wait_for_their_turn(
    rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(horovodrun, "MAX_CONNECTIONS", 4)
    answers: list[tuple[int, bytes]] = []
    eager = [
        threading.Thread(
            target=lambda i=i: answers.append(
                request(rendezvous.port, "PUT", b"address", f"/global/{i}")
            )
        )
        for i in range(20)
    ]
    for thread in eager:
        thread.start()
    eager[-1].join(0.5)
    assert answers == []
    rendezvous.set_plan(assign_slots([member(workers=20)]))
    for thread in eager:
        thread.join(10)
    assert answers == [(200, b"")] * 20


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\0" * 200 + b"\n", b"Error code: 400"),
        (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x99" * 500 + b"\n\r\n",
            b"Error code: 400",
        ),
        (b"GET /a/b SMTP\r\n\r\n", b"Error code: 400"),
        (b"GET /a HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /a/b/c HTTP/1.1\r\n\r\n", b"400"),
        (b"PUT /a/b HTTP/1.1\r\n\r\n", b"400"),
        (b"PUT /a/b HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"PUT /a/b HTTP/1.1\r\nContent-Length: ten\r\n\r\n", b"400"),
        (b"PUT /a/b HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n", b"413"),
        (b"PUT /a/b HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", b"413"),
        (b"HEAD /setup.cfg HTTP/1.1\r\n\r\n", b"501"),
        (b"HEAD /a/b HTTP/1.1\r\n\r\n", b"501"),
        (b"POST /a/b HTTP/1.1\r\n\r\n", b"501"),
        (b"G" * 100_000 + b"\r\n\r\n", b"414|^$"),
        (b"GET /a/b HTTP/1.1\r\n" + b"X: " + b"x" * 100_000 + b"\r\n\r\n", b"431|^$"),
        (b"GET /a/b HTTP/1.1\r\n" + b"X: x\r\n" * 1000 + b"\r\n", b"431|^$"),
    ],
)
def test_what_is_no_request_of_horovods_is_refused_at_once(
    rendezvous: Rendezvous, sent: bytes, status: bytes
) -> None:
    """Without waiting for the plan."""
    answer = exchange(rendezvous.port, sent)
    assert re.search(status, answer)
    assert b"[metadata]" not in answer


def test_a_value_that_is_cut_off_is_not_stored(planned: Rendezvous) -> None:
    head = b"PUT /global/rank0 HTTP/1.1\r\nContent-Length: 8\r\n\r\n"
    with socket.create_connection(("127.0.0.1", planned.port), timeout=10) as dying:
        dying.sendall(head + b"half")
        dying.shutdown(socket.SHUT_WR)
        assert dying.recv(100) == b""
    assert request(planned.port, "GET")[0] == 404


@pytest.mark.usefixtures("silent")
def test_what_is_stored_is_bounded(planned: Rendezvous) -> None:
    process = psutil.Process()
    rss = process.memory_info().rss
    value = b"v" * 1024 * 1024
    statuses = [request(planned.port, "PUT", value, f"/scope/{i}")[0] for i in range(100)]
    assert statuses == [200] * 63 + [507] * 37
    assert process.memory_info().rss - rss < 100 * 1024 * 1024
    for i in range(3):
        assert request(planned.port, "DELETE", path=f"/scope/{i}")[0] == 200
    for _ in range(100):  # what is overwritten does not count
        assert request(planned.port, "PUT", b"v" * 1000_000, "/scope/again")[0] == 200
    assert request(planned.port, "GET", path="/scope/50") == (200, value)


@pytest.mark.usefixtures("silent")
def test_values_that_never_arrive_take_no_room(planned: Rendezvous) -> None:
    head = b"PUT /scope/k HTTP/1.1\r\nContent-Length: 1048576\r\n\r\n"
    announced = [socket.create_connection(("127.0.0.1", planned.port)) for _ in range(80)]
    for stranger in announced:
        stranger.sendall(head)
    for i in range(60):
        assert request(planned.port, "PUT", b"v" * 1024 * 1024, f"/scope/{i}")[0] == 200
    for stranger in announced:
        stranger.close()


@pytest.mark.usefixtures("silent")
def test_a_worker_has_a_moment_to_send_its_request(
    planned: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(horovodrun, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(horovodrun, "IDLE_SECONDS", 1.0)
    worker = http.client.HTTPConnection("127.0.0.1", planned.port, timeout=10)
    worker.connect()
    strangers = [socket.create_connection(("127.0.0.1", planned.port)) for _ in range(10)]
    time.sleep(0.3)
    worker.request("PUT", "/global/rank0", b"address")
    assert worker.getresponse().status == 200
    worker.close()
    for stranger in strangers:
        stranger.close()


def test_a_large_run_may_store_more(rendezvous: Rendezvous) -> None:
    """Each of 1000 ranks stores an address for each other one, up to twice."""
    rendezvous.set_plan(assign_slots([member(workers=1000)]))
    value = b"v" * 150_000
    for i in range(1000):
        assert request(rendezvous.port, "PUT", value, f"/global/{i}")[0] == 200


def test_closing_ends_every_connection_and_thread() -> None:
    before = threading.active_count()
    server = Rendezvous("127.0.0.1")
    peers = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(20)]
    peers[0].sendall(b"GET /a/b HTTP/1.1\r\n\r\n")
    server.close()
    wait_until(lambda: threading.active_count() <= before)
    for peer in peers:
        peer.close()
