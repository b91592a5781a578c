"""One worker process, without a run around it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from horovodrunner import HorovodRunner, WorkerFailedError
from horovodrunner.pickling import payload
from horovodrunner.processes.task import output
from horovodrunner.processes.task.exits import describe_exit
from horovodrunner.processes.task.process import WorkerProcess
from horovodrunner.wire.events import Job
from tests.process import mains


def end_of_a_worker(
    act: Callable[[WorkerProcess], None], ignores_sigterm: bool = True
) -> tuple[int, bool]:
    """Start a worker, let `act` end it, and give its status and whether that was a stop."""

    async def scenario() -> tuple[int, bool]:
        # What is ignored here is ignored in the worker, too: that is inherited.
        before = signal.signal(
            signal.SIGTERM, signal.SIG_IGN if ignores_sigterm else signal.SIG_DFL
        )
        try:
            worker = WorkerProcess([], os.environ)
        finally:
            signal.signal(signal.SIGTERM, before)
        try:
            act(worker)
            status = await asyncio.wait_for(worker.wait(), 20)
            return status, worker.was_stopped(status)
        finally:
            worker.kill()

    return asyncio.run(scenario())


def test_our_own_sigkill_after_the_grace_period_is_a_stop() -> None:
    assert end_of_a_worker(lambda worker: worker.stop(grace=0.2)) == (-signal.SIGKILL, True)


def test_a_sigkill_of_somebody_else_within_the_grace_period_is_not() -> None:
    """The kernel's, say, just when a peer's complaint has made everybody stop."""

    def act(worker: WorkerProcess) -> None:
        worker.stop(grace=60)
        os.kill(worker.pid, signal.SIGKILL)

    assert end_of_a_worker(act) == (-signal.SIGKILL, False)


def test_an_end_that_came_before_the_stop_is_not_a_stop() -> None:
    def act(worker: WorkerProcess) -> None:
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        worker.stop()

    assert end_of_a_worker(act) == (-signal.SIGKILL, False)


def test_an_idle_worker_leaves_on_sigterm_and_that_is_a_stop() -> None:
    assert end_of_a_worker(lambda worker: worker.stop(grace=60), ignores_sigterm=False) == (
        -signal.SIGTERM,
        True,
    )


def test_a_worker_without_a_job_ends_when_its_pipe_does() -> None:
    async def scenario() -> int:
        worker = WorkerProcess([], os.environ)
        try:
            os.close(worker._control_write)
            worker._control_write = -1
            return await asyncio.wait_for(worker.wait(), 20)
        finally:
            worker.kill()

    assert asyncio.run(scenario()) == -signal.SIGKILL


def test_a_worker_ends_when_it_can_tell_its_task_nothing_more() -> None:
    """The task may go just between the look at the control pipe and the report on main."""

    async def scenario() -> int:
        worker = WorkerProcess([], os.environ)
        try:
            call = payload.dump_call(mains.wait_for_ever, {})
            await worker.send(Job(0, "h", {}, beat_seconds=0.1, call=call))
            reported = b""
            while b"Started" not in reported:
                reported += await asyncio.to_thread(worker._report.read, 1000)
            worker._report.close()
            return await asyncio.wait_for(worker.wait(), 20)
        finally:
            worker.kill()

    assert asyncio.run(scenario()) == -signal.SIGKILL


def test_a_worker_of_a_process_with_thousands_of_open_files_gets_its_job() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1500:
        pytest.skip(f"this machine allows {hard} open files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1500), hard))
    try:
        with contextlib.ExitStack() as files:
            for _ in range(1100):
                files.enter_context(Path(os.devnull).open())
            assert HorovodRunner(np=-1).run(lambda: "here") == "here"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_sending_a_job_to_a_worker_that_has_died_is_no_error() -> None:
    async def scenario() -> int:
        worker = WorkerProcess([], os.environ)
        try:
            os.kill(worker.pid, signal.SIGKILL)
            status = await worker.wait()
            await worker.send(Job(0, "h", {}, call=bytes(10_000_000)))
            return status
        finally:
            worker.kill()

    assert asyncio.run(scenario()) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("status", "words", "exit_code", "signal_name"),
    [
        (7, "exit code 7", 7, None),
        (-11, "SIGSEGV", None, "SIGSEGV"),
        (-9, "memory", None, "SIGKILL"),
        (-63, "ended by", None, None),
    ],
)
def test_ends_in_words(
    status: int, words: str, exit_code: int | None, signal_name: str | None
) -> None:
    text, code, name = describe_exit(status)
    assert words in text
    assert code == exit_code
    assert signal_name in (None, name)


def test_lines_that_come_one_by_one_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is taken at once: reading each by itself costs the task fifty times as much."""
    monkeypatch.setattr(output, "PAUSE_SECONDS", 600)

    async def scenario() -> list[tuple[str, bytes]]:
        taken: list[tuple[str, bytes]] = []
        first = asyncio.Event()

        def take(stream: str, lines: bytes) -> None:
            taken.append((stream, lines))
            first.set()

        def main() -> None:
            import signal
            import time

            print("first")
            signal.sigwait({signal.SIGUSR1})
            for index in range(100):
                print(index)
                time.sleep(0.002)

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        worker = WorkerProcess([], os.environ)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        reading = asyncio.create_task(worker.read_output(take))
        try:
            await worker.send(Job(0, "h", {}, call=payload.dump_call(main, {})))
            await asyncio.wait_for(first.wait(), 20)
            os.kill(worker.pid, signal.SIGUSR1)
            assert await asyncio.wait_for(worker.wait(), 20) == 0
            worker.catch_up()
            await asyncio.wait_for(reading, 20)
        finally:
            worker.kill()
        return taken

    numbers = "".join(f"{index}\n" for index in range(100)).encode()
    assert asyncio.run(scenario()) == [("stdout", b"first\n"), ("stdout", numbers)]


def test_what_was_printed_before_a_message_is_shown_before_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "PAUSE_SECONDS", 600)

    def main() -> None:
        import time

        from horovodrunner import log_to_driver

        print("begin")
        time.sleep(0.3)  # the task takes this line, and leaves the next ones for a while
        for index in range(100):
            print(index)
            log_to_driver(f"after {index}")

    HorovodRunner(np=-1).run(main)
    shown = capsys.readouterr().out.splitlines()
    for index in range(100):
        assert shown.index(f"[0]<stdout>:{index}") < shown.index(f"after {index}")


def test_of_a_bar_some_states_are_shown_and_all_lines_in_their_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "STATE_SECONDS", 600)

    def main() -> None:
        import sys
        import time

        from tqdm import tqdm

        for i in tqdm(range(200), mininterval=0, ascii=True, desc="ä"):
            time.sleep(0.001)
            if i % 50 == 0:
                tqdm.write(f"line {i}", file=sys.stderr)
        for i in range(200):
            print("\b" * 100 + f"\r{i}/200", end="")
        os.write(1, b"\n")
        sys.stdout.write("\rlast words")
        os._exit(3)

    with pytest.raises(WorkerFailedError, match="exit code 3"):
        HorovodRunner(np=-1).run(main)
    shown = capsys.readouterr().out.splitlines()
    stderr = [line for line in shown if line.startswith("[0]<stderr>:")]
    lines = [line for line in stderr if "ä:" not in line]
    assert lines == [f"[0]<stderr>:line {i}" for i in (0, 50, 100, 150)]
    assert "200/200" in stderr[-1]
    assert len(stderr) in (5, 6)  # one state, unless it was drawn over by a line at that moment
    stdout = [line for line in shown if line.startswith("[0]<stdout>:")]
    assert stdout[-2:] == ["[0]<stdout>:199/200", "[0]<stdout>:last words"]
    assert len(stdout) in (2, 3)
