"""Horovod's own launcher code, as partition 0 uses it."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator

import pytest

from horovodrunner.core.topology import Member, Slot
from horovodrunner.task.horovodrun import Rendezvous, assign_slots

pytestmark = pytest.mark.horovod


def member(partition: int, host: str, workers: int = 1, gpus: tuple[str, ...] = ()) -> Member:
    address = f"10.0.0.{ord(host) - ord('a') + 1}"
    return Member(partition, f"{host}-id", host, address, "eth0", workers=workers, gpus=gpus)


def ranks(slots: list[Slot]) -> list[tuple[int, int, str, int, int, int, int]]:
    return [
        (s.rank, s.partition, s.host, s.local_rank, s.local_size, s.cross_rank, s.cross_size)
        for s in slots
    ]


def test_ranks_on_two_uneven_hosts() -> None:
    gathered = [member(0, "b"), member(1, "a"), member(2, "b"), member(3, "b"), member(4, "a")]
    assert ranks(assign_slots(gathered)) == [
        (0, 0, "b", 0, 3, 0, 2),
        (1, 2, "b", 1, 3, 0, 2),
        (2, 3, "b", 2, 3, 0, 1),
        (3, 1, "a", 0, 2, 1, 2),
        (4, 4, "a", 1, 2, 1, 2),
    ]
    assert [s.host_index for s in assign_slots(gathered)] == [0, 0, 0, 1, 1]


def test_every_task_derives_the_same_slots_from_the_same_messages() -> None:
    gathered = [member(i, "abc"[i % 3]) for i in range(9)]
    assert assign_slots(gathered) == assign_slots(gathered[::-1])


def test_one_agent_with_several_workers() -> None:
    slots = assign_slots([member(0, "a", workers=3)])
    assert [(s.rank, s.partition, s.local_rank, s.size) for s in slots] == [
        (0, 0, 0, 3),
        (1, 0, 1, 3),
        (2, 0, 2, 3),
    ]


def test_each_host_sees_its_own_gpus() -> None:
    slots = assign_slots(
        [member(0, "a", gpus=("1",)), member(1, "b", gpus=("0",)), member(2, "a", gpus=("0",))]
    )
    assert [(s.host, s.local_rank, s.devices) for s in slots] == [
        ("a", 0, "1,0"),
        ("a", 1, "1,0"),
        ("b", 0, "0"),
    ]


@pytest.fixture
def rendezvous() -> Iterator[Rendezvous]:
    server = Rendezvous("127.0.0.1")
    yield server
    server.close()


def request(port: int, method: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, "/global/rank0", body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_what_an_eager_worker_stores_before_the_plan_is_kept(rendezvous: Rendezvous) -> None:
    """Without waiting it would be lost, and the job would die half a minute later."""
    answers: list[tuple[int, bytes]] = []
    eager = threading.Thread(
        target=lambda: answers.append(request(rendezvous.port, "PUT", b"address"))
    )
    eager.start()
    eager.join(0.5)
    assert eager.is_alive()  # it waits for the plan
    rendezvous.set_plan(assign_slots([member(0, "a", workers=2)]))
    eager.join(10)
    assert answers == [(200, b"")]
    assert request(rendezvous.port, "GET") == (200, b"address")


def test_closing_frees_the_port() -> None:
    server = Rendezvous("127.0.0.1")
    server.close()
    with socket.create_server(("127.0.0.1", server.port)):
        pass
