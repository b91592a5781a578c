"""Checkpoints of all ranks from two executors: to the driver and behind a URL."""

from __future__ import annotations

import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import HorovodRunner, WorkerFailedError
from horovodrunner.flows.checkpoints.driver import CheckpointReceiver
from tests.waiting import wait_until

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("spark")]

MEGABYTES = 1_000_000


def save_all(step: int, megabytes: int = 0) -> None:
    from horovodrunner import checkpoint

    rank = int(os.environ["RANK"])
    with checkpoint.save(step, ranks="all") as directory:
        (directory / "own").write_text(f"rank {rank} step {step}")
        (directory / "same").write_bytes(b"same" * 10_000)
        (directory / "weights").write_bytes(bytes([rank, step]) * (megabytes * MEGABYTES // 2))


def wait_for(location: str, step: int) -> None:
    manifest = Path(location, f"step-{step:08d}", "manifest.json")
    wait_until(manifest.exists)


def look() -> Any:
    from horovodrunner import checkpoint

    latest = checkpoint.latest()
    assert latest is not None
    assert latest.world_size == 2
    own = (latest / "own").read_text() if (latest / "own").exists() else ""
    assert (latest.of_rank(1) / "same").read_bytes() == b"same" * 10_000
    (part,) = latest.source().read([("rank-1/own", 5, 1)])
    return latest.step, own, [(latest.of_rank(r) / "own").read_text() for r in (0, 1)], bytes(part)


@pytest.mark.parametrize("prefix", ["", "file://"], ids=["path", "URL"])
def test_the_parts_of_two_executors_are_one_checkpoint(tmp_path: Path, prefix: str) -> None:
    kept = tmp_path / "kept"

    def main(location: str) -> None:
        for step in (1, 2):
            save_all(step, megabytes=3)
            wait_for(location, step)

    runner = HorovodRunner(np=2, checkpoint_dir=f"{prefix}{kept}", results="all")
    runner.run(main, location=str(kept))
    assert [saved.step for saved in runner.checkpoints] == [1, 2]
    assert {path.name for path in kept.iterdir()} == {"step-00000001", "step-00000002"}
    assert (kept / "step-00000002" / "rank-1" / "weights").read_bytes() == b"\1\2" * 1_500_000
    assert not (kept / "step-00000002" / "rank-1" / "same").exists()  # it is rank 0's
    texts = ["rank 0 step 2", "rank 1 step 2"]
    runner.run(look)
    assert list(runner.results) == [(2, text, texts, b"1") for text in texts]
    alone = HorovodRunner(np=1, checkpoint_dir=f"{prefix}{kept}")
    assert alone.run(look) == (2, "", texts, b"1")


@pytest.mark.parametrize("how", ["returned", "killed"])
def test_large_parts_arrive_though_main_has_returned_or_died(tmp_path: Path, how: str) -> None:
    def main(how: str, told: str) -> None:
        save_all(7, megabytes=150)
        Path(told, os.environ["RANK"]).touch()
        wait_until(lambda: len(list(Path(told).iterdir())) == 2)
        if how == "killed" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    told = tmp_path / "told"
    told.mkdir()
    runner = HorovodRunner(np=2, checkpoint_dir=tmp_path / "kept")
    if how == "killed":
        with pytest.raises(WorkerFailedError, match="SIGKILL"):
            runner.run(main, how=how, told=str(told))
    else:
        runner.run(main, how=how, told=str(told))
    (saved,) = runner.checkpoints
    assert (saved.step, saved.size) == (7, 2 * 150_000_000 + 2 * len("rank 0 step 7") + 40_000)


@pytest.mark.parametrize("prefix", ["", "file://"], ids=["path", "URL"])
def test_an_executor_that_is_lost_leaves_no_half_checkpoint_and_is_named(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, told = tmp_path / "kept", tmp_path / "told"
    told.mkdir()

    def main(location: str, told: str) -> Any:
        import psutil

        from horovodrunner import checkpoint

        if checkpoint.attempt == 2:
            return look()
        save_all(1)
        wait_for(location, 1)
        if os.environ["RANK"] == "1":
            save_all(2)
            Path(told, "saved").touch()
            signal.pause()
        wait_until(Path(told, "saved").exists)
        # rank 1's task has its part, and goes with its executor
        own = {each.pid for each in psutil.Process().parents()}
        for process in psutil.process_iter(["cmdline"]):
            if process.pid not in own and any(
                "CoarseGrainedExecutorBackend" in word for word in process.info["cmdline"] or ()
            ):
                process.kill()
        signal.pause()
        return None

    runner = HorovodRunner(np=2, checkpoint_dir=f"{prefix}{kept}", max_restarts=1)
    texts = ["rank 0 step 1", "rank 1 step 1"]
    found = runner.run(main, location=str(kept), told=str(told))
    assert found == (1, "rank 0 step 1", texts, b"1")
    shown = capsys.readouterr().out
    assert "the checkpoint of step 2 has " in shown
    assert "rank 1's task on " in shown
    assert {path.name for path in kept.iterdir() if path.name.startswith("step")} >= {
        "step-00000001"
    }
    assert [saved.step for saved in runner.checkpoints] == [1]


def test_a_disk_that_is_full_on_the_driver_leaves_older_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"

    def main(location: str, limited: str) -> str:
        save_all(1)
        wait_for(location, 1)
        Path(limited, os.environ["RANK"]).touch()
        wait_until(Path(limited, "go").exists)
        save_all(2, megabytes=4)
        wait_until(Path(limited, "failed").exists)
        save_all(3)
        return "trained"

    limited = tmp_path / "limited"
    limited.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit() -> None:
        wait_until(lambda: len(list(limited.iterdir())) == 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MEGABYTES, before[1]))
        (limited / "go").touch()

    limiting = threading.Thread(target=limit)
    limiting.start()
    try:
        runner = HorovodRunner(np=2, checkpoint_dir=kept)
        with pytest.MonkeyPatch.context() as patch:
            discard = CheckpointReceiver._discard

            def discard_and_tell(self: Any, *arguments: Any) -> None:
                discard(self, *arguments)
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
                (limited / "failed").touch()

            patch.setattr(CheckpointReceiver, "_discard", discard_and_tell)
            assert runner.run(main, location=str(kept), limited=str(limited)) == "trained"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        limiting.join()
    assert [saved.step for saved in runner.checkpoints] == [1, 3]
    assert "step 2 has" in (shown := capsys.readouterr().out)
    assert "File too large" in shown
    assert {path.name for path in kept.iterdir()} == {"step-00000001", "step-00000003"}
