"""A task's directory goes with it, however the task ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from horovodrunner.processes.task.scratch import Scratch
from tests.processes import PIPE, started
from tests.waiting import wait_until

HOLD = """
import sys, time
from horovodrunner.processes.task.scratch import Scratch
print(Scratch("abc", sys.argv[1]).path, flush=True)
time.sleep(600)
"""


def test_it_is_deleted_with_all_that_is_in_it(tmp_path: Path) -> None:
    scratch = Scratch("abc", str(tmp_path))
    assert scratch.path.name.startswith("horovodrunner-abc-")
    (scratch.path / "latest-3").mkdir()
    (scratch.path / "latest-3" / "weights").write_bytes(b"x")
    scratch.delete()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_it_is_deleted_when_its_task_is_killed(
    tmp_path: Path, kill: Callable[[int, int], None]
) -> None:
    base = tmp_path / "a base $(with) 'quotes'"
    base.mkdir()
    with started([sys.executable, "-c", HOLD, str(base)], stdout=PIPE) as task:
        assert task.stdout is not None
        path = Path(task.stdout.readline().strip())
        (path / "weights").write_bytes(b"x")
        kill(task.pid, signal.SIGKILL)
        task.wait()
    wait_until(lambda: not list(base.iterdir()))


def test_nothing_is_left_when_it_cannot_be_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_processes(*_args: object, **_options: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.Popen", no_processes)
    with pytest.raises(BlockingIOError):
        Scratch("abc", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
