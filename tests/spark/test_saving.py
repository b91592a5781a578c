"""checkpoint.should_save_now() on executors, one of which Spark decommissions."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from horovodrunner import HorovodRunner
from tests.process.test_saving import pid_of, results_of, step_until

if TYPE_CHECKING:
    from horovodrunner.testing.clusters import Clusters

pytestmark = pytest.mark.spark


@pytest.fixture
def decommissioning(_spark_clusters: Clusters) -> Iterator[None]:
    """Have executors that Spark may decommission, and none of them afterwards."""
    from horovodrunner.testing.clusters import Shape

    confs = (("spark.decommission.enabled", "true"),)
    _spark_clusters.session(Shape(cores=2, confs=confs))
    yield
    _spark_clusters.stop()


def executor_of(worker: int) -> psutil.Process:
    """Return the JVM that a rank belongs to."""
    return next(
        each
        for each in psutil.Process(worker).parents()
        if any("CoarseGrainedExecutorBackend" in word for word in each.cmdline())
    )


@pytest.mark.usefixtures("decommissioning")
def test_ranks_save_before_an_executor_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = HorovodRunner(np=4, results="all")
    gone: list[str] = []

    def signal_executor() -> None:
        pids = [pid_of(tmp_path, rank) for rank in range(4)]
        executor = executor_of(pids[3])
        words = executor.cmdline()
        gone.append(words[words.index("--executor-id") + 1])
        os.kill(executor.pid, signal.SIGPWR)

    thread = threading.Thread(target=signal_executor)
    thread.start()
    first, *others = results_of(runner, step_until, saves=1, directory=str(tmp_path))
    thread.join()
    assert others == [first] * 3
    shown = capsys.readouterr().out
    assert re.search(
        rf"^HorovodRunner: executor {gone[0]} on \S+, with ranks . and 3, is being "
        r"decommissioned: all ranks are to save a checkpoint$",
        shown,
        re.M,
    )
    assert f"all ranks save at their call {first[0]} of checkpoint.should_save_now()" in shown


@pytest.mark.usefixtures("spark")
def test_a_checkpoint_is_requested_from_the_driver() -> None:
    def on_report(point: Any) -> None:
        if "saves" not in point.values:
            assert runner.request_checkpoint()

    runner = HorovodRunner(np=2, results="all", on_report=on_report)
    first, second = results_of(runner, step_until, saves=1)
    assert first == second
