"""Horovod's own ports stay in the range that the user opens."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import psutil
import pytest

from horovodrunner import HorovodRunner, WorkerFailedError

pytestmark = [pytest.mark.horovod, pytest.mark.spark]

FIRST, LAST = 22100, 22199  # below those that the kernel gives to others


def listening_ports(process: psutil.Process) -> set[int]:
    """List the ports that a process and what it started listen on."""
    return {
        connection.laddr.port
        for one in [process, *process.children(recursive=True)]
        for connection in one.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def ports_while_rank_0_waits_in_init() -> tuple[float, set[int], set[int]]:
    """Return the sum of the ranks, and the ports of rank 0's worker and of its task."""
    import horovod.torch as hvd
    import torch

    seen: set[int] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.update(listening_ports(psutil.Process()))

    if os.environ["RANK"] == "1":
        time.sleep(1)  # rank 0 listens until its peer comes
    looking = threading.Thread(target=look)
    looking.start()
    hvd.init()
    stop.set()
    looking.join()
    task = psutil.Process().parent()
    assert task is not None
    total = hvd.allreduce(torch.tensor([float(hvd.rank())]), op=hvd.Sum)
    return float(total.item()), seen, listening_ports(task) - {int(os.environ["MASTER_PORT"])}


def test_gloo_and_the_tasks_listen_inside_the_range(spark: Any) -> None:
    spark.conf.set("spark.horovodrunner.ports", f"{FIRST}-{LAST}")
    try:
        runner = HorovodRunner(np=2, keep_warm=False)
        total, of_worker, of_task = runner.run(ports_while_rank_0_waits_in_init)
    finally:
        spark.conf.unset("spark.horovodrunner.ports")
    assert total == 1
    assert of_worker
    assert len(of_task) == 2  # the peer server and the rendezvous
    assert all(FIRST <= port <= LAST for port in of_worker | of_task)


def test_a_range_without_a_free_port_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import socket

    def main() -> None:
        import horovod.torch as hvd

        hvd.init()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("HOROVOD_GLOO_PORTS", f"{port}-{port}")
        with pytest.raises(WorkerFailedError, match=rf"listen on {port}-{port}: Address already"):
            HorovodRunner(np=-2).run(main)
