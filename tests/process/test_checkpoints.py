"""checkpoint.save() and checkpoint.latest() in real runs on this machine."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import (
    ArgumentTypeError,
    ArgumentValueError,
    CheckpointError,
    HorovodRunner,
    SavedCheckpoint,
    WorkerFailedError,
    checkpoint,
)
from horovodrunner.flows.checkpoints.store import CheckpointStore
from tests.process import mains
from tests.waiting import wait_until


def is_stored(location: str | Path, step: int) -> bool:
    return Path(location, f"step-{step:08d}", "manifest.json").exists()


def save(step: int, text: str = "") -> Path:
    """Save a checkpoint the way a training function does, the same on every rank."""
    with checkpoint.save(step=step) as directory:
        (directory / "state").write_text(text or f"rank {mains.rank()} step {step}")
        (directory / "deep" / "er").mkdir(parents=True)
        (directory / "deep" / "index").write_bytes(b"\0" * 5000)
    return directory


def save_and_wait(location: str, steps: list[int]) -> None:
    """Save on every rank; rank 0 waits for each to be stored, so that none is skipped."""
    for step in steps:
        save(step)
        if mains.rank() == 0:
            wait_until(functools.partial(is_stored, location, step))


def tell_latest(answers: str) -> None:
    """Every rank writes down which checkpoint it got."""
    latest = checkpoint.latest()
    text = "None"
    if latest is not None:
        assert isinstance(latest, Path)
        assert (latest / "deep" / "index").read_bytes() == b"\0" * 5000
        assert (latest / "deep" / "er").is_dir()
        text = f"{latest.step}: {(latest / 'state').read_text()}"
    Path(answers, f"rank-{mains.rank()}").write_text(text)


def latest_of_every_rank(runner: HorovodRunner, tmp_path: Path) -> list[str]:
    answers = Path(tempfile.mkdtemp(dir=tmp_path))
    runner.run(tell_latest, answers=str(answers))
    return [path.read_text() for path in sorted(answers.iterdir())]


def notes(capsys: pytest.CaptureFixture[str], word: str) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("HorovodRunner: ") and word in line]


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.mark.parametrize("kind", ["path", "url"])
def test_the_next_run_goes_on_where_the_last_one_stopped(
    kept: Path, tmp_path: Path, kind: str
) -> None:
    location = kept if kind == "path" else f"file://{kept}"
    runner = HorovodRunner(np=-2, checkpoint_dir=location)
    assert runner.checkpoints == ()
    assert latest_of_every_rank(runner, tmp_path) == ["None", "None"]
    runner.run(save_and_wait, location=str(kept), steps=[3, 4])
    assert latest_of_every_rank(runner, tmp_path) == ["4: rank 0 step 4"] * 2
    another = HorovodRunner(np=-1, checkpoint_dir=location)
    assert latest_of_every_rank(another, tmp_path) == ["4: rank 0 step 4"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_is_kept_is_listed_the_newest_last(kept: Path, scheme: str) -> None:
    runner = HorovodRunner(np=-2, checkpoint_dir=f"{scheme}{kept}", keep_checkpoints=2)
    before = datetime.now(timezone.utc) - timedelta(seconds=1)
    runner.run(save_and_wait, location=str(kept), steps=[7, 9, 8])
    older, newer = runner.checkpoints
    assert (older.step, newer.step) == (9, 8)
    size = len("rank 0 step 8") + 5000
    assert newer == SavedCheckpoint(8, f"{scheme}{kept}/step-00000008", size, newer.time)
    assert before <= older.time <= newer.time <= datetime.now(timezone.utc)
    assert sorted(path.name for path in kept.iterdir()) == ["step-00000008", "step-00000009"]


def test_without_a_directory_nothing_is_listed() -> None:
    assert HorovodRunner(np=-1).checkpoints == ()


def test_only_what_rank_0_writes_is_kept(kept: Path) -> None:
    def main() -> None:
        with checkpoint.save(step=1) as directory:
            (directory / f"of-rank-{mains.rank()}").touch()

    HorovodRunner(np=-3, checkpoint_dir=kept).run(main)
    assert sorted(path.name for path in (kept / "step-00000001").iterdir()) == [
        "manifest.json",
        "of-rank-0",
    ]


def test_a_damaged_checkpoint_is_skipped_with_a_warning_on_every_rank(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = HorovodRunner(np=-2, checkpoint_dir=kept)
    runner.run(save_and_wait, location=str(kept), steps=[1, 2])
    state = kept / "step-00000002" / "state"
    content = bytearray(state.read_bytes())
    content[3] ^= 1
    state.write_bytes(content)
    capsys.readouterr()
    assert latest_of_every_rank(runner, tmp_path) == ["1: rank 0 step 1"] * 2
    (warning,) = notes(capsys, "is damaged")
    assert str(kept / "step-00000002") in warning
    assert "state" in warning


def test_what_a_crash_left_is_no_checkpoint(kept: Path, tmp_path: Path) -> None:
    runner = HorovodRunner(np=-2, checkpoint_dir=kept, keep_checkpoints=4)
    runner.run(save_and_wait, location=str(kept), steps=[1, 2, 3, 4])
    without, half, incoming = (kept / f"step-0000000{step}" / "manifest.json" for step in (2, 3, 4))
    without.unlink()
    half.write_text(half.read_text()[:100])
    incoming.parent.rename(kept / ".incoming-step-00000004-00000000")
    assert [each.step for each in runner.checkpoints] == [1]
    assert latest_of_every_rank(runner, tmp_path) == ["1: rank 0 step 1"] * 2


LR = 0.1


def train(epochs: int, lr: float, fails_at: int = -1, directory: str = "") -> list[int]:
    """Go on from the latest checkpoint; return the epochs that were trained."""
    latest = checkpoint.latest()
    epochs_left = range(0 if latest is None else latest.step + 1, epochs)
    for epoch in epochs_left:
        save(epoch, text=str(lr * LR))
        if epoch == fails_at and checkpoint.attempt == 1:
            manifests = f"step-*{epoch}/manifest.json"
            wait_until(functools.partial(any_below, directory, manifests))
            os.kill(os.getpid(), signal.SIGKILL)
    return list(epochs_left)


def evaluate(lr: float) -> int:
    latest = checkpoint.latest()
    return -1 if latest is None else latest.step


def any_below(directory: str, pattern: str) -> bool:
    return any(Path(directory).rglob(pattern))


RESUMED = "going on from step"
DIFFERS = "this run differs from the one that saved that checkpoint"
NOTHING_SAVED = "returned without saving a checkpoint"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_run_that_goes_on_from_another_says_so_and_what_differs(
    kept: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = HorovodRunner(np=-2, checkpoint_dir=f"{scheme}{kept}", keep_checkpoints=9)
    assert runner.run(train, epochs=3, lr=0.1) == [0, 1, 2]
    first = capsys.readouterr().out
    assert RESUMED not in first
    assert NOTHING_SAVED not in first

    # the same cell again: said once, without a warning
    assert runner.run(train, epochs=3, lr=0.1) == []
    shown = capsys.readouterr().out
    assert shown.count(f"HorovodRunner: {RESUMED} 2, saved ") == 1
    assert f"by an earlier run: {scheme}{kept}/step-00000002. resume=False starts anew" in shown
    assert DIFFERS not in shown
    assert shown.count(NOTHING_SAVED) == 1

    # a run that was trained elsewhere, with another lr and another number of ranks
    assert HorovodRunner(np=-1, checkpoint_dir=f"{scheme}{kept}").run(train, epochs=4, lr=0.01) == [
        3
    ]
    shown = capsys.readouterr().out
    assert shown.count(DIFFERS) == 1
    (warning,) = [line for line in shown.splitlines() if DIFFERS in line]
    for text in ("lr was 0.1, is 0.01", "epochs was 3, is 4", "ranks was 2, is 1"):
        assert text in warning
    assert NOTHING_SAVED not in shown

    # a run that evaluates has nothing to save
    assert runner.run(evaluate, lr=0.01) == 3
    shown = capsys.readouterr().out
    assert "checkpoint: main was train, is evaluate; the number of ranks was 1, is 2. What" in shown
    assert NOTHING_SAVED not in shown

    # a run that does not ask goes on from nothing
    runner.run(save, step=9)
    assert RESUMED not in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_release_does_not_tell_what_its_run_was_called_with(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = HorovodRunner(np=-1, checkpoint_dir=kept)
    assert runner.run(train, epochs=1, lr=0.1) == [0]
    manifest = kept / "step-00000000" / "manifest.json"
    fields = json.loads(manifest.read_text())
    del fields["run"]
    manifest.write_text(json.dumps(fields))
    capsys.readouterr()
    assert runner.run(train, epochs=2, lr=0.2) == [1]
    shown = capsys.readouterr().out
    assert "by an earlier run (what that was called with is not recorded)" in shown
    assert DIFFERS not in shown


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_run_that_starts_anew_leaves_older_checkpoints_alone(
    kept: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    location = f"{scheme}{kept}"
    HorovodRunner(np=-2, checkpoint_dir=location, keep_checkpoints=2).run(
        save_and_wait, location=str(kept), steps=[7, 8]
    )
    old = content_of(kept)
    capsys.readouterr()
    anew = HorovodRunner(
        np=-2, checkpoint_dir=location, keep_checkpoints=2, resume=False, max_restarts=1
    )
    assert [each.step for each in anew.checkpoints] == [7, 8]
    # the second attempt goes on from this run's own, and nothing is said of the old ones
    directory = str(kept)
    assert anew.run(train, epochs=3, lr=0.1, fails_at=1, directory=directory) == [2]
    shown = capsys.readouterr().out
    assert "going on from step 1\n" in shown
    assert "earlier run" not in shown
    assert [each.step for each in anew.checkpoints] == [1, 2]
    assert all(f"{location}/run-0002-" in each.path for each in anew.checkpoints)
    assert {path: text for path, text in content_of(kept).items() if path in old} == old

    # a later run goes on from the newest run's, though others have higher steps
    later = HorovodRunner(np=-2, checkpoint_dir=location)
    assert [each.step for each in later.checkpoints] == [1, 2]
    assert later.run(train, epochs=4, lr=0.1, directory=directory) == [3]
    assert f"{RESUMED} 2, saved" in capsys.readouterr().out


def content_of(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_an_attempt_after_one_that_never_asked_says_what_differs(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(lr: float) -> int:
        if checkpoint.attempt == 1 and lr < 0.1:
            os.kill(os.getpid(), signal.SIGKILL)
        latest = checkpoint.latest()
        save(4)
        return -1 if latest is None else latest.step

    runner = HorovodRunner(np=-1, checkpoint_dir=kept, max_restarts=1)
    assert runner.run(main, lr=0.1) == -1
    assert runner.run(main, lr=0.01) == 4
    shown = capsys.readouterr().out
    assert "going on from step 4 of an earlier run (warning: lr was 0.1, is 0.01)" in shown
    assert shown.count("going on from") == 1


def test_a_save_that_raises_saves_nothing(kept: Path) -> None:
    def main() -> bool:
        try:
            with checkpoint.save(step=1) as directory:
                (directory / "half").touch()
                raise KeyError("weights")
        except KeyError:
            return directory.exists()

    runner = HorovodRunner(np=-1, checkpoint_dir=kept)
    assert runner.run(main) is False
    assert runner.checkpoints == ()
    assert list(kept.iterdir()) == []


def test_what_is_saved_later_does_not_change_the_answer(kept: Path) -> None:
    def ask_save_ask(location: str) -> list[int | None]:
        steps = []
        for step in (5, 6, 7, 8):
            latest = checkpoint.latest()
            steps.append(None if latest is None else latest.step)
            save_and_wait(location, [step])
        assert latest is None or (latest / "state").exists()  # pruned there, not here
        return steps

    runner = HorovodRunner(np=-1, checkpoint_dir=kept, keep_checkpoints=2)
    assert runner.run(ask_save_ask, location=str(kept)) == [None] * 4
    assert runner.run(ask_save_ask, location=str(kept)) == [8] * 4


def test_a_step_that_is_saved_again_is_replaced(kept: Path) -> None:
    runner = HorovodRunner(np=-1, checkpoint_dir=kept)
    for text in ("old", "new"):
        runner.run(save, step=3, text=text)
    (only,) = runner.checkpoints
    assert Path(only.path, "state").read_text() == "new"


def test_the_copies_of_a_run_go_with_it(kept: Path) -> None:
    def main() -> list[str]:
        latest = checkpoint.latest()
        return [str(save(2)), *([] if latest is None else [str(latest)])]

    runner = HorovodRunner(np=-1, checkpoint_dir=kept)
    places = [*runner.run(main), *runner.run(main)]
    assert len(places) == 3
    assert [place for place in places if Path(place).exists()] == []


def test_what_is_saved_just_before_main_returns_arrives(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put = CheckpointStore.put

    def slow_put(self: CheckpointStore, *arguments: Any) -> None:
        time.sleep(1)
        put(self, *arguments)

    monkeypatch.setattr(CheckpointStore, "put", slow_put)

    def main() -> str:
        save(1)
        return "done"

    runner = HorovodRunner(np=-2, checkpoint_dir=kept)
    assert runner.run(main) == "done"
    assert [each.step for each in runner.checkpoints] == [1]
    assert len(notes(capsys, "still being stored")) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_saved_just_before_a_worker_is_killed_arrives(kept: Path, rank: int) -> None:
    def main(rank: int, saved: str) -> None:
        if mains.rank() == 0:
            with checkpoint.save(step=5) as directory:
                (directory / "large").write_bytes(bytes(20_000_000))
            Path(saved).touch()
        if mains.rank() == rank:
            wait_until(Path(saved).exists)
            os.kill(os.getpid(), signal.SIGKILL)
        mains.wait_for_ever()

    runner = HorovodRunner(np=-2, checkpoint_dir=kept)
    with pytest.raises(WorkerFailedError, match="SIGKILL"):
        runner.run(main, rank=rank, saved=str(kept.parent / "saved"))
    assert [(each.step, each.size) for each in runner.checkpoints] == [(5, 20_000_000)]


def test_saves_that_are_too_fast_take_bounded_space_and_the_newest_wins(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put, has_saved = CheckpointStore.put, kept.parent / "has saved"
    is_storing = kept.parent / "is storing"

    def slow_put(self: CheckpointStore, *arguments: Any) -> None:
        is_storing.touch()
        wait_until(has_saved.exists)
        put(self, *arguments)

    monkeypatch.setattr(CheckpointStore, "put", slow_put)

    def main() -> None:
        scratch = save(1).parent
        wait_until(is_storing.exists)
        for step in range(2, 51):
            save(step)
            # one is on its way, one waits
            wait_until(lambda: len(list(scratch.glob("horovodrunner-saving-*"))) <= 2)
        has_saved.touch()

    runner = HorovodRunner(np=-1, checkpoint_dir=kept)
    runner.run(main)
    assert [each.step for each in runner.checkpoints] == [1, 50]
    (warning,) = notes(capsys, "faster than they can be stored")
    assert "the newest one wins" in warning


def test_main_does_not_wait_for_what_is_stored(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, put = threading.Event(), CheckpointStore.put

    def held_put(self: CheckpointStore, *arguments: Any) -> None:
        assert gate.wait(60)
        put(self, *arguments)

    monkeypatch.setattr(CheckpointStore, "put", held_put)
    marker = kept.parent / "main goes on"

    def main() -> None:
        save(1)
        marker.touch()

    def open_gate() -> None:
        wait_until(marker.exists)
        gate.set()

    opener = threading.Thread(target=open_gate)
    opener.start()
    runner = HorovodRunner(np=-1, checkpoint_dir=kept)
    try:
        runner.run(main)
    finally:
        opener.join()
    assert [each.step for each in runner.checkpoints] == [1]


def test_a_directory_that_vanishes_comes_back_with_the_next_checkpoint(kept: Path) -> None:
    def main(location: str) -> None:
        save_and_wait(location, [1])
        shutil.rmtree(location)
        save_and_wait(location, [2])

    runner = HorovodRunner(np=-1, checkpoint_dir=kept)
    runner.run(main, location=str(kept))
    assert [each.step for each in runner.checkpoints] == [2]


def block(location: str) -> None:
    """Put a file where the checkpoints are: nothing can be stored there any more."""
    if Path(location).is_dir():
        Path(location).rename(location + ".moved")
    Path(location).touch()


def unblock(location: str) -> None:
    Path(location).unlink()
    Path(location + ".moved").rename(location)


def test_training_goes_on_when_a_checkpoint_cannot_be_stored(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = kept.parent / "failed"

    def main(location: str) -> str:
        save_and_wait(location, [1])
        block(location)
        save(2)
        wait_until(failed.exists)
        unblock(location)
        save_and_wait(location, [3])
        return "trained"

    def watch() -> None:
        wait_until(lambda: reported)
        failed.touch()

    reported: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        put = CheckpointStore.put

        def watched_put(self: CheckpointStore, step: int, *arguments: Any) -> None:
            try:
                put(self, step, *arguments)
            except OSError:
                reported.append(step)
                raise

        patch.setattr(CheckpointStore, "put", watched_put)
        watcher = threading.Thread(target=watch)
        watcher.start()
        runner = HorovodRunner(np=-1, checkpoint_dir=kept)
        try:
            assert runner.run(main, location=str(kept)) == "trained"
        finally:
            watcher.join()
    assert [each.step for each in runner.checkpoints] == [1, 3]
    (warning,) = notes(capsys, "was not stored")
    assert "the checkpoint of step 2 was not stored" in warning
    assert str(kept) in warning
    assert "Older checkpoints are intact" in warning


@pytest.mark.parametrize("ends", ["later", "at once"])
def test_a_checkpoint_that_cannot_be_stored_ends_the_run_if_that_is_wanted(
    kept: Path, ends: str
) -> None:
    def main(location: str) -> str:
        if mains.rank() == 0:
            block(location)
        save(2)
        if ends == "later":
            mains.wait_for_ever()
        return "trained"

    runner = HorovodRunner(np=-2, checkpoint_dir=kept, on_checkpoint_error="raise")
    with pytest.raises(CheckpointError, match="the checkpoint of step 2 was not stored") as caught:
        runner.run(main, location=str(kept))
    assert str(kept) in str(caught.value)


def test_a_latest_checkpoint_that_cannot_be_asked_for_is_an_error_of_main(kept: Path) -> None:
    def main(location: str) -> None:
        block(location)
        checkpoint.latest()

    with pytest.raises(WorkerFailedError, match="cannot get the latest checkpoint") as caught:
        HorovodRunner(np=-1, checkpoint_dir=kept).run(main, location=str(kept))
    assert isinstance(caught.value.__cause__, CheckpointError)


def test_without_a_directory_a_save_keeps_nothing_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> list[bool]:
        return [save(step).exists() for step in (1, 2, 3)]

    runner = HorovodRunner(np=-2)
    assert runner.run(main) == [False] * 3
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "keeps nothing" in line]
    assert line.startswith("HorovodRunner: ")
    assert "checkpoint_dir" in line
    assert latest_of_every_rank(runner, tmp_path) == ["None", "None"]


def test_outside_a_run_a_save_keeps_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with checkpoint.save(step=3) as directory:
        (directory / "state").write_text("weights")
        assert list(directory.iterdir()) == [directory / "state"]
    assert not directory.exists()
    assert checkpoint.latest() is None
    assert checkpoint.attempt == 1
    assert capsys.readouterr().out == ""


def test_a_process_that_main_forks_saves_nothing(kept: Path) -> None:
    def main() -> int:
        child = os.fork()  # noqa: TID251 -- in a rank
        if child == 0:
            save(1)
            os._exit(0 if checkpoint.latest() is None else 3)
        return os.waitpid(child, 0)[1]

    runner = HorovodRunner(np=-1, checkpoint_dir=kept)
    assert runner.run(main) == 0
    assert runner.checkpoints == ()


def test_numpy_integers_are_steps(kept: Path) -> None:
    numpy = pytest.importorskip("numpy")
    runner = HorovodRunner(np=-1, checkpoint_dir=kept)
    runner.run(save, step=numpy.int64(12))
    assert [each.step for each in runner.checkpoints] == [12]


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (True, ArgumentTypeError),
        (1.0, ArgumentTypeError),
        ("1", ArgumentTypeError),
        (None, ArgumentTypeError),
        (-1, ArgumentValueError),
    ],
)
def test_a_step_that_is_none_is_refused(step: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"step={step!r}"), checkpoint.save(step=step):
        pass


def test_a_checkpoint_is_a_path_whose_files_are_plain_paths(kept: Path) -> None:
    def main() -> list[str]:
        latest = checkpoint.latest()
        assert latest is not None
        parts = [latest / "state", latest.joinpath("deep"), *latest.glob("deep/*"), latest.parent]
        return sorted({str(part.relative_to(latest.parent)) for part in parts})

    runner = HorovodRunner(np=-1, checkpoint_dir=kept)
    runner.run(save, step=1)
    assert runner.run(main) == [
        ".",
        "latest-1/deep",
        "latest-1/deep/er",
        "latest-1/deep/index",
        "latest-1/state",
    ]
