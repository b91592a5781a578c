"""Runs under a key on executors, whose tasks refuse what a driver that was followed would store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import HorovodRunner, WorkerFailedError
from horovodrunner.flows.checkpoints.store import CheckpointStore

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("spark")]


def train(directory: str, epochs: int) -> dict[str, Any]:
    from horovodrunner import checkpoint

    latest = checkpoint.latest()
    start = 0 if latest is None else latest.step + 1
    for epoch in range(start, epochs):
        if epoch == 1 and os.environ["RANK"] == "0" and Path(directory, "bad").exists():
            raise ValueError("no luck")
        with checkpoint.save(step=epoch) as saved:
            (saved / "epoch.txt").write_text(str(epoch))
    return {"start": start, "epochs": epochs}


@pytest.mark.parametrize("prefix", ["", "file://"], ids=["path", "URL"])
def test_a_run_on_executors_goes_on_and_is_done_once(tmp_path: Path, prefix: str) -> None:
    where = f"{prefix}{tmp_path}"
    runner = HorovodRunner(np=2, checkpoint_dir=f"{where}/kept", run_dir=f"{where}/runs")
    (tmp_path / "bad").touch()
    arguments: dict[str, Any] = {"directory": str(tmp_path), "epochs": 3}
    with pytest.raises(WorkerFailedError, match="no luck"):
        runner.run(train, run_key="k", **arguments)
    (tmp_path / "bad").unlink()
    found = runner.run(train, run_key="k", **arguments)
    assert found == {"start": 1, "epochs": 3}
    # on this machine, and without Spark
    alone = HorovodRunner(np=-1, checkpoint_dir=f"{where}/kept", run_dir=f"{where}/runs")
    assert alone.run(train, run_key="k", **arguments) == found
    assert alone.checkpoints[-1].step == 2


def test_a_task_refuses_checkpoints_of_a_driver_that_was_followed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where rank 0's task writes itself, it looks itself."""
    url = f"file://{tmp_path}/kept"
    runner = HorovodRunner(np=1, checkpoint_dir=url, run_dir=tmp_path / "runs")

    def main(directory: str) -> None:
        from horovodrunner import checkpoint

        if checkpoint.latest() is None:
            # as a driver does that takes over; this one has not noticed yet
            (of_key,) = Path(directory, "kept").glob("key-*/*")
            CheckpointStore(f"file://{of_key}", 3).begin_epoch(7, resume=True)
        with checkpoint.save(step=2) as saved:
            (saved / "a.txt").write_text("late")

    runner.run(main, run_key="k", directory=str(tmp_path))
    assert "another driver has taken over this run" in capfd.readouterr().out
    assert not [*tmp_path.glob("kept/key-*/*/epoch-000001/step-*")]
