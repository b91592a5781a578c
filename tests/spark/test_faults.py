"""What dies around a run, and what is left of it: real executors."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from horovodrunner import BarrierStageError, HorovodRunner, WorkerFailedError
from horovodrunner.processes.driver import addresses, slots
from tests import processes
from tests.conftest import workers_left
from tests.process import mains
from tests.process.test_local_runs import is_running
from tests.waiting import wait_until

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("spark")]


def run(main: Any, verbosity: str = "log_callback_only", **kwargs: Any) -> Any:
    return HorovodRunner(np=2, driver_log_verbosity=verbosity).run(main, **kwargs)


def run_for_ever(directory: str) -> None:
    mains.count_run(directory)
    mains.wait_for_ever()


def pids_in(directory: Path) -> dict[int, int]:
    """Return the workers' process ids by rank, as mains.count_run left them."""
    names = [path.name.split("-") for path in directory.glob("rank*-*")]
    return {int(name[0].removeprefix("rank")): int(name[1]) for name in names}


def when_both_run(directory: Path, act: Callable[[], None]) -> threading.Thread:
    """Act from another thread as soon as main runs on both ranks."""
    return when_ranks_run(2, directory, act)


def when_ranks_run(count: int, directory: Path, act: Callable[[], None]) -> threading.Thread:
    """Act from another thread as soon as main runs on so many ranks."""

    def wait_and_act() -> None:
        deadline = time.monotonic() + 60
        while len(pids_in(directory)) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


def wait_for_two_slots(spark: Any) -> None:
    wait_until(lambda: (slots.total_slots(spark) or 0) >= 2)  # Spark replaces a lost executor


def usable(spark: Any) -> bool:
    wait_for_two_slots(spark)
    return bool(run(lambda: int(os.environ["WORLD_SIZE"])) == 2)


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGTERM", "sys.exit text"])
def test_other_ends_of_a_worker_are_told_as_they_are(how: str) -> None:
    with pytest.raises(WorkerFailedError) as caught:
        run(mains.fail, how=how, on_rank=1)
    assert caught.value.rank == 1
    assert ("no data" if how == "sys.exit text" else how) in caught.value.summary


def test_a_lost_executor_is_named_with_its_ranks(tmp_path: Path, spark: Any) -> None:
    def kill() -> None:
        worker = psutil.Process(pids_in(tmp_path)[0])
        next(p for p in worker.parents() if p.name() == "java").kill()

    killer = when_both_run(tmp_path, kill)
    with pytest.raises((BarrierStageError, WorkerFailedError)) as caught:
        run(run_for_ever, directory=str(tmp_path))
    killer.join()
    text = str(caught.value)
    assert re.search(r"lost executor \d+, which ran rank 0 on ", text), text
    assert workers_left() == []
    assert usable(spark)


def job_ids(spark: Any) -> list[int]:
    tracker = spark.sparkContext._jsc.sc().statusTracker()
    return [int(job) for job in tracker.getActiveJobIds()]


def test_a_job_that_is_killed_in_the_ui_is_told_as_cancelled(tmp_path: Path, spark: Any) -> None:
    def cancel() -> None:
        [job] = job_ids(spark)
        spark.sparkContext._jsc.sc().cancelJob(job, "killed via the Web UI")

    canceller = when_both_run(tmp_path, cancel)
    with pytest.raises(
        BarrierStageError, match=r"killed via the Web UI.*; there is no checkp"
    ) as caught:
        HorovodRunner(np=2, max_restarts=2).run(run_for_ever, directory=str(tmp_path))
    canceller.join()
    assert caught.value.attempts == ()  # the user's wish is not tried again
    assert workers_left() == []
    assert usable(spark)


@pytest.mark.parametrize("on_rank", [0, 1])
def test_a_task_that_spark_kills_is_told(tmp_path: Path, on_rank: int, spark: Any) -> None:
    def kill() -> None:
        context = spark.sparkContext._jsc.sc()
        tracker = context.statusTracker()
        [job] = job_ids(spark)
        [stage] = tracker.getJobInfo(job).get().stageIds()
        tasks = context.statusStore().taskList(stage, 0, 10)
        for index in range(tasks.size()):
            task = tasks.apply(index)
            if task.index() == on_rank:
                context.killTaskAttempt(task.taskId(), True, "killed for the test")

    killer = when_both_run(tmp_path, kill)
    with pytest.raises((BarrierStageError, WorkerFailedError)) as caught:
        run(run_for_ever, directory=str(tmp_path))
    killer.join()
    assert f"rank {on_rank}" in str(caught.value), str(caught.value)
    assert "lost" in str(caught.value)
    assert workers_left() == []
    assert usable(spark)


def test_an_interrupt_is_raised_in_a_thread_other_than_the_main_one(
    tmp_path: Path, spark: Any
) -> None:
    """As servers do that run cells in threads: with an exception sent to the thread."""
    import ctypes

    raised: list[BaseException] = []

    def cell() -> None:
        try:
            run(run_for_ever, directory=str(tmp_path))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=cell)
    thread.start()
    when_both_run(tmp_path, lambda: None).join()
    pids = list(pids_in(tmp_path).values())
    interrupt = ctypes.py_object(KeyboardInterrupt)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), interrupt)
    wait_until(lambda: not any(is_running(pid) for pid in pids))
    thread.join(20)
    assert [type(error) for error in raised] == [KeyboardInterrupt]
    assert spark.range(10).count() == 10


def test_ctrl_c_leaves_other_jobs_of_the_session_alone(tmp_path: Path, spark: Any) -> None:
    """PySpark's own handler would cancel every job; here it is put back afterwards."""
    results: list[int] = []
    runs, enough = tmp_path / "runs", tmp_path / "enough"
    runs.mkdir()

    def slow(rows: Any, enough: str = str(enough)) -> Any:
        while not Path(enough).exists():
            time.sleep(0.02)
        return rows

    def other_job() -> None:
        results.append(spark.sparkContext.parallelize([1], 1).mapPartitions(slow).count())

    cancelled: list[int] = []

    def handler(number: int, frame: Any) -> None:
        cancelled.append(number)
        spark.sparkContext.cancelAllJobs()
        raise KeyboardInterrupt

    handler.__module__ = "pyspark.core.context"  # where Spark's own handler is defined
    before = signal.signal(signal.SIGINT, handler)
    other = threading.Thread(target=other_job)
    other.start()
    try:
        interrupter = when_ranks_run(1, runs, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            HorovodRunner(np=1).run(run_for_ever, directory=str(runs))
        interrupter.join()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
        enough.touch()
        other.join()
    assert results == [1]
    assert cancelled == []
    assert workers_left() == []


DRIVER = """
    import os, sys, threading, time
    from pyspark.sql import SparkSession
    from horovodrunner import HorovodRunner
    from tests.process import mains

    def run_for_ever(directory):
        mains.count_run(directory)
        mains.wait_for_ever()

    if int(sys.argv[2]) > 0:
        builder = SparkSession.builder.master("local-cluster[2,1,1024]")
        builder = builder.config("spark.ui.enabled", "false").config("spark.log.level", "ERROR")
        spark = builder.getOrCreate()
    runner = HorovodRunner(np=int(sys.argv[2]))
    if sys.argv[3] == "main":
        runner.run(run_for_ever, directory=sys.argv[1])
    else:
        thread = threading.Thread(target=runner.run, args=(run_for_ever,),
                                  kwargs={"directory": sys.argv[1]})
        thread.start()
        thread.join()
"""


@pytest.mark.parametrize(
    ("number", "np", "thread"),
    [
        (signal.SIGKILL, 2, "main"),
        (signal.SIGINT, -2, "another"),
        pytest.param(signal.SIGINT, 2, "another", marks=pytest.mark.slow),
    ],
)
def test_workers_go_with_the_driver(
    tmp_path: Path, number: signal.Signals, np: int, thread: str
) -> None:
    directory = tmp_path / "runs"
    directory.mkdir()
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(directory), str(np), thread]
    with processes.started(
        command,
        stdout=processes.DEVNULL,
        stderr=processes.PIPE,
        cwd=Path(__file__).parents[2],
    ) as driver:
        when_both_run(directory, lambda: None).join()
        driver.send_signal(number)
        _, errors = driver.communicate()
    # A worker, an executor or a JVM that had stayed would have failed the block.
    assert len(pids_in(directory)) == 2
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors


class Proxy:
    """Carries connections to the driver until it is cut."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.target = 0
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._server.close()
        for end in self._sockets:
            hang_up(end)

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._server.accept()
            except OSError:
                return
            outer = socket.create_connection(("127.0.0.1", self.target))
            self._sockets += [inner, outer]
            for pair in ((inner, outer), (outer, inner)):
                threading.Thread(target=carry, args=pair, daemon=True).start()


def hang_up(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)


def test_a_channel_that_breaks_leaves_the_run_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    executor_logs: Path,
) -> None:
    from horovodrunner.processes.driver import channel

    proxy = Proxy()
    listen = channel.DriverChannel.open

    def open_behind_proxy(self: Any, host: str, port: int) -> int:
        proxy.target = listen(self, "127.0.0.1", port)
        return proxy.port

    monkeypatch.setattr(channel.DriverChannel, "open", open_behind_proxy)
    monkeypatch.setattr(addresses, "advertised_host", lambda spark: "127.0.0.1")
    cutter = when_both_run(tmp_path, proxy.cut)

    def main(directory: str) -> str:
        mains.count_run(directory)
        time.sleep(3)
        print("after the cut")
        mains.log_things()
        return "done"

    assert run(main, "all", directory=str(tmp_path)) == "done"
    cutter.join()
    shown = capsys.readouterr().out
    assert shown.count("the connection to rank 0's task at") == 1
    assert "after the cut" not in shown
    logged = "\n".join(path.read_text() for path in executor_logs.glob("*/stderr"))
    pattern = r"the connection from 127\.0\.0\.1 to the driver at 127\.0\.0\.1:\d+ is lost"
    assert len(re.findall(pattern, logged)) == 1
    assert "[1]<stdout>:after the cut" in logged
    assert "[1]<log_to_driver>:from rank 1" in logged


def ports_of(pids: list[int]) -> set[str]:
    return {
        f"{connection.laddr.ip.replace('0.0.0.0', '127.0.0.1')}:{connection.laddr.port}"
        for pid in pids
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


FLOOD = r"""
import contextlib, socket, sys, time
put = b"PUT /a/b HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n"
said = {1: bytes(range(256)) * 16, 2: put, 3: b"HVDRUN1\n" + b"x" * 64}
idle = []
for place in sys.argv[1:]:
    host, _, port = place.rpartition(":")
    for number in range(700):
        try:
            s = socket.create_connection((host, int(port)), 5)
        except OSError as error:
            print(place, error, file=sys.stderr)
            break
        with contextlib.suppress(OSError):
            s.sendall(said.get(number % 100, b""))
        idle.append(s)
print(len(idle), flush=True)
time.sleep(4)
"""


def test_strangers_on_every_port_do_not_disturb_a_run(
    tmp_path: Path, spark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    floods: list[processes.CompletedProcess[str]] = []

    def main(directory: str) -> float:
        import horovod.torch as hvd
        import torch

        mains.count_run(directory)
        while not Path(directory, "flooded").exists():
            time.sleep(0.05)
        hvd.init()  # through the rendezvous
        print("through partition 0")
        return float(hvd.allreduce(torch.ones(1), op=hvd.Sum))

    def flood() -> None:
        agents = {psutil.Process(pid).ppid() for pid in pids_in(tmp_path).values()}
        ports = ports_of([*agents, os.getpid()]) - others
        marker = threading.Timer(3, (tmp_path / "flooded").touch)
        marker.start()
        floods.append(processes.run([sys.executable, "-c", FLOOD, *ports], capture_output=True))
        marker.join()

    others = ports_of([os.getpid()])  # Spark's own
    before = psutil.Process().memory_info().rss
    flooder = when_both_run(tmp_path, flood)
    assert run(main, "all", directory=str(tmp_path)) == 2.0
    flooder.join()
    assert int(floods[0].stdout) > 1500, floods[0]
    assert "[1]<stdout>:through partition 0" in capsys.readouterr().out
    assert psutil.Process().memory_info().rss - before < 200e6
