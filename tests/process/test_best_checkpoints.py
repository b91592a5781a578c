"""The best checkpoints of real runs on this machine, by what main reports."""

from __future__ import annotations

import functools
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import (
    ArgumentTypeError,
    ConfigurationError,
    HorovodRunner,
    WorkerFailedError,
    checkpoint,
    metrics,
)
from horovodrunner.flows.rundir.reading import read_run
from tests.process import mains
from tests.waiting import wait_until

LOSSES = [0.9, 0.3, 0.5, 0.4, math.nan, 0.7, 0.8, 0.3]


def is_stored(location: str, step: int) -> bool:
    """Whether the checkpoint of a step is stored, or a later one, for which it was deleted."""
    return any(
        int(Path(here).name.removeprefix("step-")) >= step
        for here, _, names in os.walk(location)  # unlike rglob(), whatever goes meanwhile
        if "manifest.json" in names and Path(here).name.startswith("step-")
    )


def train(location: str, epochs: int, ranks: int | str = 0, dies_at: int = -1) -> int:
    """Report and save each epoch; return the first one."""
    latest = checkpoint.latest()
    start = 0 if latest is None else latest.step + 1
    for epoch in range(start, epochs):
        metrics.report(epoch, loss=5.0)
        metrics.report(epoch, loss=1, val_loss=LOSSES[epoch] - mains.rank())
        with checkpoint.save(epoch, ranks=ranks) as directory:
            (directory / "weights").write_text(f"{epoch} of rank {mains.rank()}")
        wait_until(functools.partial(is_stored, location, epoch))
        if epoch == dies_at and checkpoint.attempt == 1 and mains.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return start


def steps(runner: HorovodRunner) -> list[int]:
    return [saved.step for saved in runner.checkpoints]


def best_of(runner: HorovodRunner) -> int | None:
    best = runner.best_checkpoint
    return None if best is None else best.step


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.mark.parametrize("ranks", [0, "all"])
@pytest.mark.parametrize("scheme", ["", "file://"], ids=["path", "URL"])
def test_the_best_of_all_attempts_and_runs_is_kept(
    kept: Path, scheme: str, ranks: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make = functools.partial(
        HorovodRunner,
        np=-2,
        checkpoint_dir=f"{scheme}{kept}",
        keep_checkpoints=1,
        keep_best=("val_loss", "min"),
    )
    runner = make(max_restarts=1)
    assert best_of(runner) is None
    started = runner.run(train, location=str(kept), epochs=4, ranks=ranks, dies_at=2)
    assert started >= 3  # the second attempt went on
    assert steps(runner) == [1, 3]
    best = runner.best_checkpoint
    assert best is not None
    assert (best.step, best.metrics) == (1, {"loss": 1.0, "val_loss": 0.3})
    assert best.world_size == (2 if ranks == "all" else None)
    assert best.path == f"{scheme}{kept}/step-00000001"
    assert best in {*runner.checkpoints}
    of_rank_0 = "rank-0/weights" if ranks == "all" else "weights"
    assert Path(best.path.removeprefix("file://"), of_rank_0).read_text() == "1 of rank 0"
    notes = [line for line in capsys.readouterr().out.splitlines() if "the best so far" in line]
    assert notes == [
        "HorovodRunner: step 0 is the best so far: val_loss 0.9000",
        "HorovodRunner: step 1 is the best so far: val_loss 0.3000",
    ]

    again = make()
    assert again.run(train, location=str(kept), epochs=7, ranks=ranks) == 4
    assert (steps(again), best_of(again)) == ([1, 6], 1)
    assert again.run(train, location=str(kept), epochs=8, ranks=ranks) == 7
    assert (steps(again), best_of(again)) == ([7], 7)  # of equally good ones it is the newer
    assert "the best so far" not in capsys.readouterr().out

    anew = make(resume=False)
    assert anew.run(train, location=f"{kept}", epochs=0) == 0
    assert (steps(anew), anew.best_checkpoint) == ([], None)
    assert best_of(again) == 7


def test_a_key_s_run_keeps_the_best_of_a_driver_that_failed(kept: Path, tmp_path: Path) -> None:
    make = functools.partial(
        HorovodRunner,
        np=-2,
        checkpoint_dir=kept,
        keep_checkpoints=1,
        keep_best=("val_loss", "min"),
        run_dir=tmp_path / "runs",
    )
    given: dict[str, Any] = {"location": str(kept), "epochs": 4, "ranks": "all", "dies_at": 2}
    with pytest.raises(WorkerFailedError):
        make().run(train, run_key="nightly", **given)
    runner = make(keep_every=2)
    assert runner.run(train, run_key="nightly", **given) == 3
    assert steps(runner) == [1, 2, 3]  # 0 was deleted before it was to be kept
    assert best_of(runner) == 1
    assert runner.record is not None
    listed = read_run(Path(runner.record)).facts["checkpoints"]
    assert [(each["step"], each["is_best"]) for each in listed][-1] == (3, False)


def save_each(numbers: list[Mapping[str, Any] | None], location: str) -> None:
    for step, given in enumerate(numbers):
        metrics.report(step, loss=step, val_loss=10 - step)
        with checkpoint.save(step, metrics=given) as directory:
            (directory / "state").touch()
        wait_until(functools.partial(is_stored, location, step))


def test_numbers_that_are_given_stand_for_the_reported_ones(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = HorovodRunner(
        np=-1,
        checkpoint_dir=kept,
        keep_best=("acc", "max", 2),
        keep_checkpoints=1,
        run_dir=tmp_path / "runs",
    )
    numbers = [None, {"acc": 0.5}, {"acc": 1}, {"acc": math.inf}, {}, {"acc": math.nan}]
    runner.run(save_each, numbers=numbers, location=str(kept))
    found = [dict(saved.metrics) for saved in runner.checkpoints]
    assert found[:2] == [{"acc": 1.0}, {"acc": math.inf}]
    assert best_of(runner) == 3
    shown = capsys.readouterr().out
    assert shown.count("the checkpoint of step 0 has no 'acc' and is never the best") == 1
    assert "(it has loss, val_loss; said once)" in shown
    assert runner.record is not None
    marked = [
        each["step"]
        for each in read_run(Path(runner.record)).facts["checkpoints"]
        if each["is_best"]
    ]
    assert marked == [3]


def test_what_was_reported_goes_with_one_checkpoint(kept: Path) -> None:
    def main(location: str) -> None:
        named: Any = {"val/loss\ud800": 2, "acc": 1.5}
        metrics.report(0, **named)
        for step in range(3):
            metrics.report(step, loss=step)
            if step == 1:
                with pytest.raises(ArgumentTypeError, match=r"metrics=\[1\]: give numbers"):
                    checkpoint.save(1, metrics=[1]).__enter__()  # type: ignore[arg-type]
                with pytest.raises(ArgumentTypeError, match=r"metrics\['a'\]='1': .* a number"):
                    checkpoint.save(1, metrics={"a": "1"}).__enter__()  # type: ignore[dict-item]
            with checkpoint.save(step) as directory:
                (directory / "state").touch()
            wait_until(functools.partial(is_stored, location, step))

    runner = HorovodRunner(np=-1, checkpoint_dir=kept)
    runner.run(main, location=str(kept))
    assert [saved.metrics for saved in runner.checkpoints] == [
        {"val/loss?": 2.0, "acc": 1.5, "loss": 0.0},
        {"loss": 1.0},
        {"loss": 2.0},
    ]


def test_the_best_needs_to_be_told_what_is_best(kept: Path) -> None:
    for runner in (HorovodRunner(np=-1), HorovodRunner(np=-1, checkpoint_dir=kept)):
        with pytest.raises(ConfigurationError, match="best_checkpoint needs keep_best"):
            assert runner.best_checkpoint
