"""Records of real runs: of one that went well, that failed, and of one whose driver was killed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import (
    HorovodRunner,
    WorkerFailedError,
    artifacts,
    checkpoint,
    log_to_driver,
    metrics,
)
from horovodrunner.flows.rundir.reading import RunData, read_run
from tests import processes
from tests.waiting import wait_until

SECRETS = ("s3cr3t-value", "hunter2", "tok-abcdef")


def rank() -> int:
    return int(os.environ["RANK"])


def wait_for(pattern: str, directory: Path) -> None:
    """Wait in a rank until its driver has written a file."""
    while not list(directory.glob(pattern)):
        time.sleep(0.02)


def record_of(runner: HorovodRunner) -> RunData:
    assert runner.record is not None
    return read_run(Path(runner.record))


def test_a_good_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(epochs: int, runs: Path, **_: Any) -> None:
        for epoch in metrics.progress(range(epochs), desc="epoch"):
            metrics.report(step=epoch, loss=1 / (epoch + 1) + rank(), grad=float("nan"))
            print(f"epoch {epoch} from s3://me:hunter2@bucket")
        if rank() == 0:
            with checkpoint.save(step=3) as directory:
                (directory / "model.txt").write_text("weights")
        artifacts.path("notes.txt").write_text(f"from {rank()}")
        log_to_driver(f"token {os.environ['MLFLOW_TRACKING_TOKEN']}")
        wait_for(f"*/stacks-rank-{rank()}.speedscope.json", runs)
        wait_for("*/usage.jsonl", runs)

    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok-abcdef")
    runs = tmp_path / "runs"
    runner = HorovodRunner(np=-2, run_dir=runs, checkpoint_dir=tmp_path / "saved")
    assert runner.record is None
    runner.run(main, epochs=4, runs=runs, api_key="s3cr3t-value", config={"password": "hunter2"})
    run = record_of(runner)
    assert run.status == "succeeded"
    assert run.facts["arguments"]["epochs"] == "4"
    assert run.facts["arguments"]["api_key"].startswith("(not shown)")
    assert run.facts["versions"]["Python"]
    assert [each["step"] for each in run.facts["checkpoints"]] == [3]
    assert runner.artifacts == run.directory / "artifacts"
    assert (run.directory / "artifacts/rank-1/notes.txt").read_text() == "from 1"
    assert "main" in [each[0] for each in run.facts["phases"]]
    assert run.metrics["loss"].values.column(1) == [(0, 1.0), (1, 1 / 2), (2, 1 / 3), (3, 1 / 4)]
    assert list(run.metrics["loss"].span.rows[0]) == [0, 1.0, 2.0]
    assert run.metrics["grad"].odd == 4
    for number in (0, 1):
        found = run.ranks[number]
        assert "epoch 3 from s3://(not shown)@bucket" in found.tail
        assert "token (not shown)" in found.tail
        assert found.bar == ("epoch", 4, 4)
        assert any("wait_for" in place for place, _ in found.hot)
        assert found.seconds >= 1
    assert max(found.peak_memory for found in run.ranks.values()) > 2**20
    for path in runs.rglob("*"):
        if path.is_file():
            content = path.read_text()
            assert not [secret for secret in SECRETS if secret in content], path


def test_a_run_that_failed(tmp_path: Path) -> None:
    def main() -> None:
        metrics.report(loss=1.0)
        if rank() == 1:
            raise ValueError("the loss is no number")
        time.sleep(60)

    runner = HorovodRunner(np=-2, run_dir=tmp_path)
    with pytest.raises(WorkerFailedError):
        runner.run(main)
    run = record_of(runner)
    error = run.facts["outcome"]["error"]
    assert run.status == "failed"
    assert (error["type"], error["rank"]) == ("WorkerFailedError", 1)
    assert "raise ValueError(" in error["traceback"]
    page = (run.directory / "report.html").read_text()
    assert "ValueError: the loss is no number" in page.partition("Launch")[0]


def test_what_a_killed_rank_did_is_known(tmp_path: Path) -> None:
    def main(runs: Path) -> None:
        if not list(runs.glob("was here")):
            (runs / "was here").touch()
            print("about to go", flush=True)
            wait_for("*/stacks-rank-0.speedscope.json", runs)
            os.kill(os.getpid(), signal.SIGKILL)
        metrics.report(loss=2.0)

    runner = HorovodRunner(np=-1, run_dir=tmp_path, max_restarts=1)
    runner.run(main, runs=tmp_path)
    run = record_of(runner)
    first, second = run.facts["attempts"]
    assert "SIGKILL" in first["cause"]
    assert "cause" not in second
    assert any("wait_for" in place for place, _ in run.ranks[0].hot)
    assert "about to go" in run.ranks[0].tail
    assert run.metrics["loss"].last == 2.0
    assert "2 attempts" in (run.directory / "report.html").read_text()


def test_each_run_has_its_own(tmp_path: Path) -> None:
    runner = HorovodRunner(np=-1, run_dir=tmp_path)
    records = []
    for _ in range(2):
        runner.run(lambda: None)
        records.append(runner.record)
        assert record_of(runner).ranks[0].seconds > 0
    assert len(set(records)) == 2
    assert sorted(map(str, tmp_path.iterdir())) == sorted(map(str, records))


def test_a_record_that_cannot_be_written_ends_no_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def main() -> str:
        wait_for("*/output", tmp_path)
        for directory in tmp_path.iterdir():
            while directory.exists():
                shutil.rmtree(directory, ignore_errors=True)
        for _ in range(3):  # the first is lost, the second one's error is told
            print("still here", flush=True)
            time.sleep(0.3)
        return "well"

    assert HorovodRunner(np=-1, run_dir=tmp_path).run(main) == "well"
    output = capfd.readouterr().out
    assert output.count("keeping the record of the run ends here, the run goes on") == 1


DRIVER = """
import sys, time
from horovodrunner import HorovodRunner, metrics

def main():
    for step in range(10):
        metrics.report(step=step, loss=1.0)
    print("the last words")
    while True:
        time.sleep(0.1)

HorovodRunner(np=-2, run_dir=sys.argv[1]).run(main)
"""


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    """Return the record of a run whose driver was killed."""
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    with processes.started(command, stdout=processes.DEVNULL) as process:

        def is_written() -> bool:
            logs = list(tmp_path.glob("*/output/rank-*.log"))
            steps = [each.read_text().count("step") for each in tmp_path.glob("*/history.jsonl")]
            is_printed = len(logs) == 2 and all("last words" in each.read_text() for each in logs)
            return is_printed and steps == [20]

        wait_until(is_written)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (directory,) = tmp_path.iterdir()
    return directory


def test_the_record_of_a_killed_driver(lost: Path) -> None:
    run = read_run(lost)
    assert run.status == "lost"
    assert len(run.metrics["loss"].values.rows) == 10
    command = [sys.executable, "-m", "horovodrunner", "report", str(lost)]
    processes.run(command, check=True, stdout=processes.DEVNULL)
    page = (lost / "report.html").read_text()
    assert "this record has no outcome" in page
    assert "the last words" in page
