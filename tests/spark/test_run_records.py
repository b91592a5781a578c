"""Records of runs on executors."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from horovodrunner import ClusterCapacityError, HorovodRunner, metrics
from horovodrunner.flows.rundir.reading import read_run

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("spark")]


def test_all_output_is_kept_though_the_cell_shows_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def main(runs: Path) -> None:
        rank = os.environ["RANK"]
        metrics.report(loss=float(rank))
        print(f"this is rank {rank}")
        for pattern in (f"*/stacks-rank-{rank}.speedscope.json", "*/usage.jsonl"):
            while not list(runs.glob(pattern)):
                time.sleep(0.02)

    runner = HorovodRunner(np=2, run_dir=tmp_path)
    runner.run(main, runs=tmp_path)
    shown = capfd.readouterr().out
    assert "this is rank" not in shown
    assert f"the record of this run: {runner.record}" in shown
    run = read_run(Path(str(runner.record)))
    assert run.status == "succeeded"
    assert [run.ranks[rank].tail for rank in (0, 1)] == ["this is rank 0", "this is rank 1"]
    assert all(run.ranks[rank].hot for rank in (0, 1))
    assert run.metrics["loss"].span.rows == [(0, 0.0, 1.0)]
    assert run.facts["cluster"]["spark.master"].startswith("local-cluster")
    assert {"stage start", "main", "outcome back"} <= {each[0] for each in run.facts["phases"]}


def test_a_run_that_was_refused_has_a_record(tmp_path: Path) -> None:
    runner = HorovodRunner(np=50, run_dir=tmp_path)
    with pytest.raises(ClusterCapacityError):
        runner.run(print)
    assert read_run(Path(str(runner.record))).status == "failed"
    assert "ClusterCapacityError" in (Path(str(runner.record)) / "report.html").read_text()
