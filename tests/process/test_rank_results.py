"""What every rank returned: ``HorovodRunner(results="all")``."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from horovodrunner import (
    ArgumentValueError,
    HorovodRunner,
    PayloadError,
    WorkerFailedError,
    checkpoint,
    metrics,
)
from tests.waiting import wait_until

MEGABYTE = 1024 * 1024


def rank() -> int:
    return int(os.environ["RANK"])


def test_every_ranks_value_comes() -> None:
    runner = HorovodRunner(np=-3, results="all")
    first = runner.run(lambda: [np.full(100_000, rank()), rank(), None])
    results = runner.results
    assert len(results) == 3
    assert results[0] is first
    assert results[-1] is results[2]
    assert [value[1] for value in results] == [0, 1, 2]
    assert all((results[number][0] == number).all() for number in range(3))
    results[2][0][:] = 7  # it is the user's own
    assert results[1:] == [results[1], results[2]]
    with pytest.raises(IndexError, match=r"results\[3\]: the run had 3 ranks"):
        results[3]
    assert repr(results) == "<results of 3 ranks>"


def test_tensors_and_many_small_values_come() -> None:
    def main() -> Any:
        return (rank(), None if rank() % 2 else "x" * rank())

    runner = HorovodRunner(np=-16, results="all")
    assert runner.run(main) == (0, "")
    assert list(runner.results) == [(n, None if n % 2 else "x" * n) for n in range(16)]

    def of_torch() -> Any:
        import torch

        return torch.full((300, 300), rank())

    runner = HorovodRunner(np=-2, results="all")
    runner.run(of_torch)
    assert runner.results[1].sum() == 90_000


def test_by_default_only_rank_0s_value_is_sent() -> None:
    runner = HorovodRunner(np=-2)
    with pytest.raises(IndexError, match="nothing has run yet"):
        runner.results[0]
    # what the other one returns could not even be pickled
    assert runner.run(lambda: threading.Lock() if rank() else 5) == 5
    assert list(runner.results) == []
    with pytest.raises(IndexError, match=r'only HorovodRunner\(..., results="all"\)'):
        runner.results[1]
    with pytest.raises(ArgumentValueError, match="results='each': it must be 'rank-0' or 'all'"):
        HorovodRunner(np=-2, results="each")


def test_a_value_that_cannot_be_pickled_fails_the_run_with_its_rank() -> None:
    runner = HorovodRunner(np=-2, results="all")
    with pytest.raises(PayloadError, match=r"rank 1: the value that main returned.*lock") as caught:
        runner.run(lambda: threading.Lock() if rank() else 5)
    assert "<class" not in str(caught.value)
    with pytest.raises(IndexError, match=r"because the run failed: PayloadError: rank 1"):
        runner.results[0]


def test_a_value_that_cannot_be_restored_is_named_with_its_rank_and_the_others_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Refuses:
        def __setstate__(self, state: object) -> None:
            raise ValueError("not here")

        def __init__(self) -> None:
            self.a = 1

    runner = HorovodRunner(np=-3, results="all")
    assert runner.run(lambda: Refuses() if rank() == 1 else rank()) == 0
    with pytest.raises(PayloadError, match=r"what rank 1 returned cannot be unpickled here.*kept"):
        runner.results[1]
    assert runner.results[2] == 2


def test_a_run_that_failed_has_no_results_and_the_next_one_its_own(tmp_path: Path) -> None:
    def main(fails: bool) -> int:
        if fails and rank() == 1:
            raise ValueError("diverged")
        return rank()

    runner = HorovodRunner(np=-2, results="all")
    runner.run(main, fails=False)
    before = runner.results
    with pytest.raises(WorkerFailedError):
        runner.run(main, fails=True)
    assert len(runner.results) == 0
    with pytest.raises(IndexError, match=r"the run failed: WorkerFailedError: rank 1.*diverged"):
        runner.results[1]
    assert before[1] == 1  # whoever has kept them still has them
    runner.run(main, fails=False)
    assert list(runner.results) == [0, 1]


def test_after_a_restart_there_are_those_of_the_last_attempt() -> None:
    def main() -> int:
        if checkpoint.attempt == 1 and rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return 10 * checkpoint.attempt + rank()

    runner = HorovodRunner(np=-2, results="all", max_restarts=1)
    assert runner.run(main) == 20
    assert list(runner.results) == [20, 21]


def test_results_can_be_copied_and_stored() -> None:
    runner = HorovodRunner(np=-2, results="all")
    for other in (copy.deepcopy(runner.results), pickle.loads(pickle.dumps(runner.results))):
        with pytest.raises(IndexError, match="nothing has run yet"):
            other[1]
    runner.run(rank)
    for other in (copy.copy(runner.results), pickle.loads(pickle.dumps(runner.results))):
        assert list(other) == [0, 1]


def test_main_may_refer_to_a_runner_that_has_run(tmp_path: Path) -> None:
    """What is the driver's stays there: on_report, results, what is going."""
    lock = threading.Lock()

    def follow(point: object) -> None:
        with lock:
            points.append(point)

    def main() -> Any:
        metrics.report(loss=1.0)
        return repr(runner.results), runner.record, runner.stop()

    points: list[object] = []
    runner = HorovodRunner(np=-2, results="all", run_dir=tmp_path, on_report=follow)
    for _ in range(2):
        runner.run(main)
        stays = "<no results: they stay in the process that ran the run>", None, False
        assert list(runner.results) == [stays, stays]
    assert len(points) == 2
    assert "the function test_main_may" in Path(runner.record or "", "run.json").read_text()
    copy.deepcopy(runner).run(main)
    assert len(points) == 3


def test_a_run_that_has_failed_keeps_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def open_files() -> list[Path]:
        links = [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
        return [each for each in links if each.is_relative_to(tmp_path)]

    def main() -> Any:
        if rank() == 2:
            time.sleep(60)
        metrics.report(loss=1.0)
        return rank()

    def fail(point: object) -> None:
        wait_until(open_files)
        raise ValueError("enough")

    runner = HorovodRunner(np=-3, results="all", on_report=fail)
    with pytest.raises(ValueError, match="enough") as caught:
        runner.run(main)
    assert caught.traceback  # it still refers to the run
    wait_until(lambda: not open_files())


def test_of_a_run_that_was_done_before_rank_0s_value_alone_is_there(tmp_path: Path) -> None:
    HorovodRunner(np=-2, run_dir=tmp_path).run(rank, run_key="nightly")
    runner = HorovodRunner(np=-2, results="all", run_dir=tmp_path)
    assert runner.run(rank, run_key="nightly") == 0
    with pytest.raises(IndexError, match=r"done before, and rank 0's value alone is stored"):
        runner.results[1]


def test_without_room_on_the_driver_the_run_fails_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PayloadError, match=r"rank 1: .*no room for its .* in .*TMPDIR"):
        HorovodRunner(np=-2, results="all").run(rank)


@pytest.mark.heavy
def test_the_driver_takes_the_others_in_without_memory_for_them() -> None:
    def main() -> Any:
        return np.full(200 * MEGABYTE if rank() else 1, rank(), np.uint8)

    runner = HorovodRunner(np=-4, results="all")
    Path("/proc/self/clear_refs").write_text("5")  # forget what there was before
    before = peak()
    runner.run(main)
    assert peak() - before < 64 * MEGABYTE
    for number in (1, 2, 3):
        assert (runner.results[number][::4096] == number).all()
    assert peak() - before > 500 * MEGABYTE  # which it would have been


def peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
