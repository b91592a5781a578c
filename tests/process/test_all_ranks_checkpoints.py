"""checkpoint.save(ranks="all"): every rank's files are one checkpoint, in real runs."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import (
    ArgumentTypeError,
    ArgumentValueError,
    CheckpointError,
    HorovodRunner,
    WorkerFailedError,
    checkpoint,
)
from tests.process import mains
from tests.waiting import wait_until


def save_all(step: int) -> None:
    """Save something of this rank's own, and something that all ranks have."""
    with checkpoint.save(step, ranks="all", metrics={"loss": 1.0 / (step + 1)}) as directory:
        (directory / "own.txt").write_text(f"rank {mains.rank()} step {step}")
        (directory / "deep").mkdir()
        (directory / "deep" / "vocabulary").write_bytes(b"the same everywhere" * 1000)


def is_stored(location: str | Path, step: int) -> bool:
    return Path(location, f"step-{step:08d}", "manifest.json").exists()


def save_and_wait(location: str, steps: list[int]) -> None:
    for step in steps:
        save_all(step)
        wait_until(functools.partial(is_stored, location, step))


def look(answers: str) -> Any:
    """Return what this rank finds, and write it down."""
    latest = checkpoint.latest()
    assert latest is not None
    assert latest.world_size is not None
    own = sorted(path.name for path in latest.iterdir())
    texts = [(latest.of_rank(rank) / "own.txt").read_text() for rank in range(latest.world_size)]
    shared = {(latest.of_rank(rank) / "deep" / "vocabulary").read_bytes() for rank in (0, 1)}
    assert shared == {b"the same everywhere" * 1000}
    source = latest.source()
    assert source.files()["rank-1/deep/vocabulary"] == 19_000
    parts = source.read([("rank-1/own.txt", 5, 1), ("rank-1/deep/vocabulary", 18_996, 4)])
    assert [bytes(part) for part in parts] == [b"1", b"here"]
    with pytest.raises(ArgumentValueError, match=f"saved by {latest.world_size} ranks"):
        latest.of_rank(latest.world_size)
    with pytest.raises(CheckpointError, match="has no 9 bytes at 0 of 'rank-0/nothing'"):
        source.read([("rank-0/nothing", 0, 9)])
    text = (latest / "own.txt").read_text() if own else ""
    Path(answers, f"rank-{mains.rank()}").write_text(text)
    return latest.step, latest.world_size, own, texts


def notes(capsys: pytest.CaptureFixture[str], word: str) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("HorovodRunner: ") and word in line]


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.mark.parametrize("prefix", ["", "file://"], ids=["path", "URL"])
def test_every_rank_finds_its_own_files_and_those_of_the_others(
    kept: Path, tmp_path: Path, prefix: str
) -> None:
    runner = HorovodRunner(np=-3, checkpoint_dir=f"{prefix}{kept}", keep_checkpoints=2)
    runner.run(save_and_wait, location=str(kept), steps=[0, 1, 2])
    assert [saved.step for saved in runner.checkpoints] == [1, 2]
    assert {path.name for path in kept.iterdir()} == {"step-00000001", "step-00000002"}
    assert runner.checkpoints[-1].size == 3 * len("rank 0 step 2") + 19_000

    texts = [f"rank {rank} step 2" for rank in (0, 1, 2)]
    found = runner.run(look, answers=str(tmp_path))
    assert found == (2, 3, ["deep", "own.txt"], texts)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1, 2)] == texts

    fewer = HorovodRunner(np=-2, checkpoint_dir=f"{prefix}{kept}")
    assert fewer.run(look, answers=str(tmp_path)) == (2, 3, [], texts)


def test_what_is_saved_just_before_main_returns_arrives(kept: Path) -> None:
    runner = HorovodRunner(np=-2, checkpoint_dir=kept)
    runner.run(save_all, step=4)
    assert [saved.step for saved in runner.checkpoints] == [4]


def test_a_rank_that_dies_leaves_no_half_checkpoint_and_is_named(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(location: str) -> None:
        save_and_wait(location, [1])
        if mains.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        save_all(2)

    runner = HorovodRunner(np=-2, checkpoint_dir=kept)
    with pytest.raises(WorkerFailedError, match=r"rank 1.*SIGKILL"):
        runner.run(main, location=str(kept))
    assert [saved.step for saved in runner.checkpoints] == [1]
    assert [path.name for path in kept.iterdir()] == ["step-00000001"]
    told = notes(capsys, "of 2 ranks' files")
    # unless rank 0 was stopped before it had saved
    assert all("step 2 has 1 of 2 ranks' files: rank 1 ended without" in text for text in told)


def test_a_rank_that_raises_in_the_block_gives_up_that_one_only(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(location: str) -> str:
        try:
            with checkpoint.save(1, ranks="all") as directory:
                (directory / "state").write_text("half")
                if mains.rank() == 1:
                    raise KeyError("no such layer")
        except KeyError:
            pass
        save_and_wait(location, [2])
        return "trained"

    runner = HorovodRunner(np=-2, checkpoint_dir=kept)
    assert runner.run(main, location=str(kept)) == "trained"
    assert [saved.step for saved in runner.checkpoints] == [2]
    (text,) = notes(capsys, "ranks' files")
    assert "the checkpoint of step 1 has 1 of 2 ranks' files: rank 1 on " in text
    assert "could not save its own: KeyError: 'no such layer'" in text


def test_a_rank_that_never_saves_is_an_error_for_who_wants_one(kept: Path) -> None:
    def main() -> None:
        if mains.rank() == 0:
            save_all(1)

    runner = HorovodRunner(np=-2, checkpoint_dir=kept, on_checkpoint_error="raise")
    with pytest.raises(CheckpointError, match="step 1 has 1 of 2 ranks' files: rank 1"):
        runner.run(main)
    assert runner.checkpoints == ()


def test_what_a_child_of_a_rank_does_in_the_block_changes_nothing(kept: Path) -> None:
    def main() -> None:
        with checkpoint.save(1, ranks="all") as directory:
            if (child := os.fork()) == 0:  # noqa: TID251 - main may
                raise SystemExit(0)  # leaves through the block
            os.waitpid(child, 0)
            (directory / "state").write_text(f"of rank {mains.rank()}")

    runner = HorovodRunner(np=-2, checkpoint_dir=kept)
    runner.run(main)
    assert (kept / "step-00000001" / "rank-1" / "state").read_text() == "of rank 1"


def test_a_restart_goes_on_from_what_all_ranks_saved(kept: Path, tmp_path: Path) -> None:
    def main(location: str, answers: str) -> Any:
        if checkpoint.attempt == 1:
            save_and_wait(location, [5])
            if mains.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        return look(answers)

    runner = HorovodRunner(np=-2, checkpoint_dir=kept, max_restarts=1)
    found = runner.run(main, location=str(kept), answers=str(tmp_path))
    assert found == (5, 2, ["deep", "own.txt"], ["rank 0 step 5", "rank 1 step 5"])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"ranks": "every"}, ArgumentValueError, "ranks='every'"),
        ({"ranks": 1}, ArgumentValueError, "ranks=1"),
        ({"ranks": True}, ArgumentValueError, "ranks=True"),
        ({"metrics": 0.5}, ArgumentTypeError, "metrics=0.5"),
        ({"metrics": {"loss": "low"}}, ArgumentTypeError, "metrics\\['loss'\\]='low'"),
        ({"metrics": {3: 0.5}}, ArgumentTypeError, "a metric's name"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text), checkpoint.save(1, **options):
        pass


def test_outside_a_run_nothing_is_kept() -> None:
    with checkpoint.save(1, ranks="all") as directory:
        (directory / "state").write_text("gone soon")
    assert not directory.exists()
