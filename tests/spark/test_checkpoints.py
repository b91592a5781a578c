"""Checkpoints from executors to the driver, over the channel and behind a URL."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import CheckpointError, HorovodRunner

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("spark")]


def train(epochs: int) -> dict[str, Any]:
    """Count epochs on every rank, from the latest checkpoint on."""
    from horovodrunner import checkpoint

    latest = checkpoint.latest()
    start = 0 if latest is None else latest.step + 1
    total = 0 if latest is None else int((latest / "deep" / "total.txt").read_text())
    for epoch in range(start, epochs):
        total += epoch
        with checkpoint.save(step=epoch) as directory:
            (directory / "deep").mkdir()
            (directory / "deep" / "total.txt").write_text(str(total))
            (directory / "weights.bin").write_bytes(bytes([epoch]) * 3_000_000)
    Path(os.environ["TMPDIR_OF_TEST"], f"start{os.environ['RANK']}").write_text(str(start))
    return {"start": start, "total": total}


def starts(directory: Path) -> list[int]:
    return [int((directory / f"start{rank}").read_text()) for rank in (0, 1)]


def in_run(directory: Path, epochs: int) -> Any:
    def main(epochs: int, directory: str) -> dict[str, Any]:
        os.environ["TMPDIR_OF_TEST"] = directory
        return train(epochs)

    return main


@pytest.mark.parametrize("prefix", ["", "file://"], ids=["path", "URL"])
def test_a_second_run_goes_on_where_the_first_stopped_on_every_rank(
    tmp_path: Path, prefix: str, spark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = HorovodRunner(np=2, checkpoint_dir=f"{prefix}{tmp_path}/kept", keep_checkpoints=2)
    main = in_run(tmp_path, 3)
    assert runner.run(main, epochs=3, directory=str(tmp_path)) == {"start": 0, "total": 3}
    assert starts(tmp_path) == [0, 0]
    assert "going on from" not in capsys.readouterr().out
    last = runner.checkpoints[-1]
    assert (last.step, last.size) == (2, 3_000_001)
    assert (tmp_path / "kept" / "step-00000002" / "deep" / "total.txt").read_text() == "3"

    again = HorovodRunner(np=2, checkpoint_dir=f"{prefix}{tmp_path}/kept", keep_checkpoints=2)
    assert again.run(main, epochs=5, directory=str(tmp_path)) == {"start": 3, "total": 10}
    assert starts(tmp_path) == [3, 3]
    shown = capsys.readouterr().out
    where = f"{prefix}{tmp_path}/kept/step-00000002"
    assert shown.count("going on from step 2, saved ") == 1
    assert f"by an earlier run: {where}. resume=False starts anew" in shown
    assert shown.count("saved that checkpoint: epochs was 3, is 5. ") == 1
    assert [saved.step for saved in again.checkpoints][-1] == 4
    assert len(again.checkpoints) <= 2

    anew = HorovodRunner(np=2, checkpoint_dir=f"{prefix}{tmp_path}/kept", resume=False)
    assert anew.run(main, epochs=1, directory=str(tmp_path)) == {"start": 0, "total": 0}
    assert [saved.step for saved in anew.checkpoints] == [0]
    assert "going on from" not in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "file://"], ids=["path", "URL"])
def test_the_best_is_kept_on_the_driver_and_behind_a_url(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(losses: list[float], kept: str, ranks: Any) -> None:
        from horovodrunner import checkpoint, metrics

        for step, loss in enumerate(losses):
            metrics.report(step, val_loss=loss)
            with checkpoint.save(step, ranks=ranks) as directory:
                (directory / "state").write_text(str(loss))
            later = [Path(kept, f"step-{each:08d}", "manifest.json") for each in range(step, 9)]
            deadline = time.monotonic() + 60
            while not any(each.exists() for each in later) and time.monotonic() < deadline:
                time.sleep(0.02)

    kept = f"{tmp_path}/kept"
    runner = HorovodRunner(
        np=2,
        checkpoint_dir=prefix + kept,
        keep_checkpoints=1,
        keep_best=("val_loss", "min"),
        keep_every=3,
    )
    runner.run(main, losses=[0.5, 0.2, 0.3, 0.4, 0.6], kept=kept, ranks=0)
    assert [saved.step for saved in runner.checkpoints] == [0, 1, 3, 4]
    best = runner.best_checkpoint
    assert best is not None
    assert (best.step, best.metrics, best.world_size) == (1, {"val_loss": 0.2}, None)
    assert Path(kept, "step-00000001", "state").read_text() == "0.2"
    assert "step 1 is the best so far: val_loss 0.2000" in capsys.readouterr().out

    runner.run(main, losses=[0.5, 0.4, 0.1], kept=kept, ranks="all")
    best = runner.best_checkpoint
    assert best is not None
    assert (best.step, best.metrics, best.world_size) == (2, {"val_loss": 0.1}, 2)


def test_a_checkpoint_is_on_the_driver_while_training_goes_on(tmp_path: Path) -> None:
    def main(kept: str) -> bool:
        from horovodrunner import checkpoint

        with checkpoint.save(step=1) as directory:
            (directory / "state").write_text("here")
        expected = Path(kept, "step-00000001", "state")
        deadline = time.monotonic() + 30
        while not expected.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return expected.exists()

    runner = HorovodRunner(np=2, checkpoint_dir=tmp_path / "kept")
    assert runner.run(main, kept=str(tmp_path / "kept"))


def test_a_damaged_checkpoint_is_skipped_on_every_rank_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(steps: int) -> None:
        from horovodrunner import checkpoint

        for step in range(steps):
            with checkpoint.save(step=step) as directory:
                (directory / "state").write_text(f"state of {step}")
            time.sleep(0.5)

    def load() -> tuple[int, str]:
        from horovodrunner import checkpoint

        latest = checkpoint.latest()
        assert latest is not None
        return latest.step, (latest / "state").read_text()

    runner = HorovodRunner(np=2, checkpoint_dir=tmp_path)
    runner.run(save, steps=3)
    assert [saved.step for saved in runner.checkpoints] == [0, 1, 2]
    (tmp_path / "step-00000002" / "state").write_text("state of 3")
    (tmp_path / "step-00000001" / "state").unlink()
    capsys.readouterr()
    assert runner.run(load) == (0, "state of 0")
    shown = capsys.readouterr().out
    assert "step-00000002" in shown
    assert "step-00000001" in shown


@pytest.mark.parametrize("errors", ["warn", "raise"])
def test_a_checkpoint_that_cannot_be_stored_is_warned_of_or_ends_the_run(
    tmp_path: Path, errors: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(kept: str) -> str:
        from horovodrunner import checkpoint

        with checkpoint.save(step=1) as directory:
            (directory / "state").write_text("here")
        while os.environ["RANK"] == "0" and not Path(kept, "step-00000001").exists():
            time.sleep(0.02)
        if os.environ["RANK"] == "0":
            Path(kept, "step-00000001").rename(Path(kept).parent / "older")
            shutil.rmtree(kept)
            Path(kept).write_text("a file where the directory was")
        with checkpoint.save(step=2) as directory:
            (directory / "state").write_text("nowhere to go")
        time.sleep(2)
        return "trained"

    kept = tmp_path / "kept"
    runner = HorovodRunner(np=2, checkpoint_dir=kept, on_checkpoint_error=errors)
    if errors == "raise":
        with pytest.raises(CheckpointError, match="step 2 was not stored"):
            runner.run(main, kept=str(kept))
    else:
        assert runner.run(main, kept=str(kept)) == "trained"
        assert "the checkpoint of step 2 was not stored" in capsys.readouterr().out
    assert (tmp_path / "older" / "state").read_text() == "here"


def test_the_last_checkpoint_arrives_though_main_has_returned_or_died(tmp_path: Path) -> None:
    """It is on its way when rank 0's process is gone."""

    def main(how: str) -> None:
        from horovodrunner import checkpoint

        with checkpoint.save(step=7) as directory:
            (directory / "weights.bin").write_bytes(bytes(300_000_000))
        if how == "killed" and os.environ["RANK"] == "0":
            os.kill(os.getpid(), 9)

    from horovodrunner import WorkerFailedError

    for how in ("returned", "killed"):
        runner = HorovodRunner(np=2, checkpoint_dir=tmp_path / how)
        if how == "killed":
            with pytest.raises(WorkerFailedError, match="SIGKILL"):
                runner.run(main, how=how)
        else:
            runner.run(main, how=how)
        assert [(saved.step, saved.size) for saved in runner.checkpoints] == [(7, 300_000_000)]
