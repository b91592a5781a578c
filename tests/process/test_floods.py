"""Output and memory without measure: real processes of this machine."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from horovodrunner import HorovodRunner, WorkerFailedError
from tests.process import mains
from tests.waiting import wait_until


class PeakMemory:
    """Watches how much memory this process, which is driver and task, has at most."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = psutil.Process().memory_info().rss
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self.before

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.peak = max(self.peak, psutil.Process().memory_info().rss)


def test_half_a_gigabyte_without_a_newline_passes_in_bounded_memory(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def main(gigabytes: float) -> None:
        if mains.rank() == 1:
            return
        import sys

        piece = "x" * 1_000_000
        for _ in range(int(gigabytes * 1000)):
            sys.stdout.write(piece)

    with PeakMemory() as memory:
        HorovodRunner(np=-2).run(main, gigabytes=0.5)
    assert memory.growth < 300e6, f"grew by {memory.growth / 1e6:.0f} MB"
    shown = capfd.readouterr().out
    assert "...(line cut)" in shown
    assert re.search(r"\d+ lines are missing here", shown) or shown.count("x") == 500_000_000


def test_bytes_that_are_no_text_and_torn_characters_pass(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> None:
        os.write(1, b"not UTF-8: \xff\xfe\n")
        text = "ä€🦄".encode()
        for index in range(len(text)):
            os.write(1, text[index : index + 1])
            time.sleep(0.01)
        os.write(1, b"\n")

    HorovodRunner(np=-1).run(main)
    lines = capsys.readouterr().out.splitlines()
    assert "[0]<stdout>:not UTF-8: \ufffd\ufffd" in lines
    assert "[0]<stdout>:ä€🦄" in lines


def test_a_console_that_stands_still_does_not_hold_training(tmp_path: Path) -> None:
    """A notebook whose front end does not take output any more."""

    class Blocked:
        def __init__(self) -> None:
            self.go_on = threading.Event()

        def write(self, text: str) -> None:
            if "flood" in text:
                self.go_on.wait(60)

        def flush(self) -> None:
            pass

    def main(done: str) -> None:
        for _ in range(200):
            print("flood " + "y" * 500_000)
        Path(done).touch()

    import contextlib

    blocked = Blocked()
    done = tmp_path / "done"

    def release() -> None:
        deadline = time.monotonic() + 60
        while not done.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        was_done.append(done.exists())
        blocked.go_on.set()

    was_done: list[bool] = []
    thread = threading.Thread(target=release)
    thread.start()
    with contextlib.redirect_stdout(blocked):  # type: ignore[type-var]
        HorovodRunner(np=-1).run(main, done=str(done))
    thread.join()
    assert was_done == [True]


@pytest.fixture
def small_control_group() -> Iterator[Path]:
    """A control group that may use 100 MB, where this machine lets us make one."""
    version_1 = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    parent = version_1.parent if version_1.exists() else Path("/sys/fs/cgroup")
    group = parent / f"horovodrunner-test-{os.getpid()}"
    limit = "memory.limit_in_bytes" if version_1.exists() else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text("100000000")
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    wait_until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_worker_that_the_kernel_killed_for_memory_has_the_kernels_word(
    small_control_group: Path,
) -> None:
    def main(group: str) -> Any:
        if mains.rank() != 1:
            mains.wait_for_ever()
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
        hoard = []
        while True:
            hoard.append(os.urandom(1_000_000))

    with pytest.raises(WorkerFailedError) as caught:
        HorovodRunner(np=-2).run(main, group=str(small_control_group))
    error = caught.value
    assert (error.rank, error.signal) == (1, "SIGKILL")
    assert "because memory ran out: " in error.summary
    assert re.search(r"kernel's log says: .*Killed process|its control group .* counts", str(error))


def test_a_kill_by_somebody_is_not_taken_for_the_kernels() -> None:
    with pytest.raises(WorkerFailedError, match="most likely by the kernel because"):
        HorovodRunner(np=-2).run(mains.fail, how="SIGKILL", on_rank=1)
