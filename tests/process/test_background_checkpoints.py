"""checkpoint.save_torch(asynchronous=True): main goes on, and nothing is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from horovodrunner import CheckpointError, HorovodRunner, WorkerFailedError
from tests.process import background

pytest.importorskip("torch", reason="needs torch")
pytestmark = pytest.mark.heavy


def test_what_main_changes_meanwhile_is_not_in_it(tmp_path: Path) -> None:
    runner = HorovodRunner(np=-1, checkpoint_dir=tmp_path)
    runner.run(background.save_and_go_on)
    assert runner.run(background.load) == ([1.0] * 4, [1], True)


@pytest.mark.parametrize("how", ["return", "exit"])
def test_the_end_of_main_waits_for_it(tmp_path: Path, how: str) -> None:
    runner = HorovodRunner(np=-1, checkpoint_dir=tmp_path)
    runner.run(background.return_before_it_is_written, how=how)
    assert [saved.step for saved in runner.checkpoints] == [1]


def test_an_error_of_mains_does_not_wait_for_it(tmp_path: Path) -> None:
    runner = HorovodRunner(np=-1, checkpoint_dir=tmp_path)
    with pytest.raises(WorkerFailedError, match="main does not go on"):
        runner.run(background.return_before_it_is_written, how="raise")
    assert not runner.checkpoints


def test_one_is_written_at_a_time(tmp_path: Path) -> None:
    runner = HorovodRunner(np=-1, checkpoint_dir=tmp_path)
    assert runner.run(background.save_twice) == ["written", "saved"]
    assert runner.checkpoints[-1].step == 2


def test_what_is_saved_otherwise_waits_for_it(tmp_path: Path) -> None:
    runner = HorovodRunner(np=-1, checkpoint_dir=tmp_path)
    runner.run(background.save_otherwise)
    assert runner.checkpoints[-1].step == 2


@pytest.mark.parametrize(
    ("sharded", "has_directory", "told"),
    [
        (False, True, "the checkpoint of step 4 was not stored: RuntimeError: [enforce fail"),
        (True, True, "rank 0 on {host} could not save its own: OSError: [Errno 27] File too large"),
        (True, False, "rank 0 on {host} could not save its own: FileNotFoundError: [Errno 2]"),
    ],
)
def test_what_cannot_be_written_is_told(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sharded: bool,
    has_directory: bool,
    told: str,
) -> None:
    runner = HorovodRunner(np=-1, checkpoint_dir=tmp_path)
    runner.run(background.cannot_write, sharded=sharded, has_directory=has_directory)
    shown = capsys.readouterr().out
    assert told.format(host=os.uname().nodename) in shown
    assert "lder checkpoints are intact" in shown
    assert not runner.checkpoints


def test_it_ends_the_run_where_that_is_wanted(tmp_path: Path) -> None:
    runner = HorovodRunner(np=-1, checkpoint_dir=tmp_path, on_checkpoint_error="raise")
    with pytest.raises(CheckpointError, match="step 4 was not stored: RuntimeError"):
        runner.run(background.cannot_write, sharded=False, has_directory=True)
