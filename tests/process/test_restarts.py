"""max_restarts: a run whose worker was lost is launched again and goes on."""

from __future__ import annotations

import builtins
import collections
import importlib
import os
import pickle
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy
import pytest

from horovodrunner import (
    CheckpointError,
    HorovodRunner,
    PayloadError,
    WorkerFailedError,
    checkpoint,
)
from tests.process import mains
from tests.waiting import wait_until


def train(location: str, epochs: int, kill_after: dict[int, int]) -> list[float]:
    """Fit a line by gradient descent; in some attempts rank 1 is killed after an epoch."""
    latest = checkpoint.latest()
    start, weights = 0, numpy.zeros(3)
    if latest is not None:
        start, weights = latest.step + 1, numpy.load(latest / "weights.npy")
    for epoch in range(start, epochs):
        random = numpy.random.default_rng(epoch)
        inputs = random.normal(size=(64, 3))
        errors = inputs @ weights - inputs @ numpy.array([1.0, -2.0, 0.5])
        weights = weights - 0.1 * inputs.T @ errors / len(inputs)
        with checkpoint.save(step=epoch) as directory:
            numpy.save(directory / "weights.npy", weights)
        if kill_after.get(checkpoint.attempt) == epoch:
            if mains.rank() == 1:
                wait_until(Path(location, f"step-{epoch:08d}", "manifest.json").exists)
                os.kill(os.getpid(), signal.SIGKILL)
            mains.wait_for_ever()
    return [float(weight) for weight in weights]


def announcements(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("HorovodRunner: attempt ")]


def note_attempt(directory: str) -> None:
    """Leave a file, so that a test can tell what ran."""
    Path(directory, f"attempt-{checkpoint.attempt}-rank-{mains.rank()}").touch()


def attempts_of(directory: Path, rank: int = 0) -> list[int]:
    names = [path.name for path in directory.glob(f"attempt-*-rank-{rank}")]
    return sorted(int(name.split("-")[1]) for name in names)


def test_a_run_that_lost_a_worker_ends_like_one_that_did_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, kill_after: dict[int, int]) -> Any:
        location = str(tmp_path / name)
        runner = HorovodRunner(np=-2, checkpoint_dir=location, max_restarts=2)
        value = runner.run(train, location=location, epochs=6, kill_after=kill_after)
        assert runner.checkpoints[-1].step == 5
        return value

    undisturbed = run("undisturbed", {})
    assert announcements(capsys) == []
    assert run("disturbed", {1: 2, 2: 3}) == undisturbed
    first, second = announcements(capsys)
    pattern = (
        r"HorovodRunner: attempt {} of 3, because rank 1 on \S+ failed: .*SIGKILL.*; "
        r"going on from step {}"
    )
    assert re.fullmatch(pattern.format(2, 2), first)
    assert re.fullmatch(pattern.format(3, 3), second)


def lose_rank_1(directory: str, how: str, until: int) -> int:
    note_attempt(directory)
    if checkpoint.attempt < until:
        mains.fail(how, on_rank=1)
    return checkpoint.attempt


@pytest.mark.parametrize("how", ["os._exit", "SIGSEGV", "SIGTERM"])
def test_however_a_worker_is_lost_the_run_is_launched_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    runner = HorovodRunner(np=-2, max_restarts=1)
    assert runner.run(lose_rank_1, directory=str(tmp_path), how=how, until=2) == 2
    assert attempts_of(tmp_path, rank=1) == [1, 2]
    (line,) = announcements(capsys)
    assert line.startswith("HorovodRunner: attempt 2 of 2, because rank 1 on ")
    assert line.endswith("; starting anew (the run has no checkpoint_dir)")


def test_before_anything_is_saved_it_starts_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = HorovodRunner(np=-2, max_restarts=5, checkpoint_dir=tmp_path / "kept")
    assert runner.run(lose_rank_1, directory=str(tmp_path), how="SIGKILL", until=3) == 3
    lines = announcements(capsys)
    assert [line.split(",")[0] for line in lines] == [
        "HorovodRunner: attempt 2 of 6",
        "HorovodRunner: attempt 3 of 6",
    ]
    assert all(line.endswith("; starting anew (nothing saved yet)") for line in lines)


def test_by_default_nothing_is_launched_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkerFailedError, match="SIGKILL") as caught:
        HorovodRunner(np=-2).run(lose_rank_1, directory=str(tmp_path), how="SIGKILL", until=2)
    assert attempts_of(tmp_path, rank=1) == [1]
    assert caught.value.attempts == ()
    assert "attempt" not in str(caught.value)
    assert announcements(capsys) == []


class TrainingError(ArithmeticError):
    pass


def raise_until(directory: str, error: BaseException, until: int) -> int:
    note_attempt(directory)
    if checkpoint.attempt < until:
        raise error
    return checkpoint.attempt


@pytest.mark.parametrize(
    "error", [ValueError("bad"), SystemExit(3), SystemExit("bad"), KeyboardInterrupt("bad")]
)
def test_what_main_raises_is_not_tried_again(tmp_path: Path, error: BaseException) -> None:
    runner = HorovodRunner(np=-1, max_restarts=3)
    with pytest.raises(WorkerFailedError) as caught:
        runner.run(raise_until, directory=str(tmp_path), error=error, until=2)
    assert attempts_of(tmp_path) == [1]
    assert isinstance(caught.value.__cause__, type(error))


@pytest.mark.parametrize(
    ("error", "restart_on"),
    [
        (ValueError("bad"), (ValueError,)),
        (ValueError("bad"), ValueError),
        (ValueError("bad"), (OSError, Exception)),
        (TrainingError("bad"), (ArithmeticError,)),
        (ValueError("bad"), (WorkerFailedError,)),
        (SystemExit(3), (SystemExit,)),
    ],
)
def test_what_main_raises_is_tried_again_if_that_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException, restart_on: Any
) -> None:
    runner = HorovodRunner(np=-1, max_restarts=3, restart_on=restart_on)
    assert runner.run(raise_until, directory=str(tmp_path), error=error, until=3) == 3
    assert attempts_of(tmp_path) == [1, 2, 3]
    assert len(announcements(capsys)) == 2


def test_an_exception_of_another_type_is_not_tried_again(tmp_path: Path) -> None:
    runner = HorovodRunner(np=-1, max_restarts=3, restart_on=(LookupError, TrainingError))
    with pytest.raises(WorkerFailedError, match="ArithmeticError: bad"):
        runner.run(raise_until, directory=str(tmp_path), error=ArithmeticError("bad"), until=2)
    assert attempts_of(tmp_path) == [1]


def test_an_exception_of_the_notebooks_own_counts(tmp_path: Path) -> None:
    """Its class travels to the worker and back by value."""

    class DataServerError(Exception):
        pass

    def main(directory: str) -> int:
        return raise_until(directory, DataServerError("gone"), until=2)

    runner = HorovodRunner(np=-2, max_restarts=1, restart_on=(DataServerError,))
    assert runner.run(main, directory=str(tmp_path)) == 2


class TwoArgumentsError(TrainingError):
    def __init__(self, batch: int, loss: float) -> None:
        super().__init__(f"batch {batch}: {loss}")


class LockedError(TrainingError):
    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = threading.Lock()


class LargeError(TrainingError):
    def __init__(self) -> None:
        super().__init__(bytes(10_000_000))


class OtherError(TrainingError):
    """Unpickles as something else."""

    def __reduce__(self) -> Any:
        return KeyError, ("other",)


class Outer:
    class TrainingError(Exception):
        """Another one of that name."""


def raise_what(what: str) -> NoReturn:
    if what == "cause":
        try:
            raise TrainingError("first")
        except TrainingError as error:
            raise KeyError("second") from error
    if what == "here":
        raise type("LocalError", (TrainingError,), {})("from here")
    if what == "OSError":
        raise ConnectionResetError("gone")
    if what == "group":
        raise vars(builtins)["BaseExceptionGroup"]("several", [TrainingError("in it")])
    if what == "two":
        raise TwoArgumentsError(3, 0.5)
    raise {"locked": LockedError, "large": LargeError, "other": OtherError}[what]


@pytest.mark.parametrize(
    ("what", "restart_on", "matches"),
    [
        ("two", TwoArgumentsError, True),
        ("two", (KeyError, ArithmeticError), True),
        ("two", (LockedError, Outer.TrainingError), False),
        ("locked", TrainingError, True),
        ("large", LargeError, True),
        ("other", TrainingError, True),
        ("other", KeyError, False),
        ("here", TrainingError, True),
        ("cause", TrainingError, False),
        ("cause", LookupError, True),
        ("OSError", IOError, True),
        ("OSError", TimeoutError, False),
        ("group", TrainingError, False),
        ("group", Exception, True),
    ],
)
def test_what_is_tried_again_is_what_except_would_catch(
    what: str, restart_on: Any, matches: bool
) -> None:
    """Whether or not the exception can be brought here."""
    if what == "group" and sys.version_info < (3, 11):
        pytest.skip("exception groups came with Python 3.11")
    runner = HorovodRunner(np=-1, max_restarts=1, restart_on=restart_on)
    with pytest.raises(WorkerFailedError) as caught:
        runner.run(raise_what, what=what)
    assert len(caught.value.attempts) == (2 if matches else 0)


def test_what_the_notebook_defines_is_tried_again_though_it_does_not_unpickle() -> None:
    class DataServerError(Exception):
        def __init__(self, host: str, port: int) -> None:
            super().__init__(host)

    class GoneError(DataServerError):
        pass

    def main() -> int:
        if checkpoint.attempt == 1:
            raise GoneError("host", 80)
        return checkpoint.attempt

    runner = HorovodRunner(np=-1, max_restarts=1, restart_on=(DataServerError,))
    assert runner.run(main) == 2
    with pytest.raises(WorkerFailedError, match="GoneError: host") as caught:
        HorovodRunner(np=-1, max_restarts=1).run(main)
    assert caught.value.__cause__ is None
    assert caught.value.exception_types[-3:-1] == ("builtins.Exception", "builtins.BaseException")


def test_when_all_attempts_are_used_every_cause_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> NoReturn:
        if mains.rank() != 1:
            mains.wait_for_ever()
        if checkpoint.attempt == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(f"no data in attempt {checkpoint.attempt}\nsecond line")

    runner = HorovodRunner(np=-2, max_restarts=2, restart_on=(OSError,))
    with pytest.raises(WorkerFailedError) as caught:
        runner.run(main)
    error = caught.value
    assert len(error.attempts) == 3
    for cause, word in zip(
        error.attempts,
        ["OSError: no data in attempt 1", "SIGKILL", "OSError: no data in attempt 3"],
        strict=True,
    ):
        assert cause.startswith("rank 1 on ")
        assert word in cause
        assert "\n" not in cause
    text = str(error)
    assert text.startswith(error.attempts[2])
    assert [line for line in text.splitlines() if line.startswith("  attempt ")] == [
        f"  attempt {number}: {cause}" for number, cause in enumerate(error.attempts, 1)
    ]
    assert "All 3 attempts failed" in text
    assert isinstance(error.__cause__, OSError)
    assert len(announcements(capsys)) == 2
    assert pickle.loads(pickle.dumps(error)).attempts == error.attempts


def test_a_later_attempt_that_fails_for_good_ends_it(tmp_path: Path) -> None:
    def main(directory: str) -> NoReturn:
        note_attempt(directory)
        if checkpoint.attempt == 1:
            os._exit(7)
        raise ValueError("for good")

    with pytest.raises(WorkerFailedError, match="ValueError: for good") as caught:
        HorovodRunner(np=-1, max_restarts=5).run(main, directory=str(tmp_path))
    assert attempts_of(tmp_path) == [1, 2]
    assert len(caught.value.attempts) == 2
    assert "exit code 7" in caught.value.attempts[0]


def test_every_attempt_has_processes_and_directories_of_its_own(tmp_path: Path) -> None:
    def main(directory: str) -> list[str]:
        with checkpoint.save(step=checkpoint.attempt) as saving:
            mine = Path(directory, f"attempt-{checkpoint.attempt}")
            mine.write_text(f"{os.getpid()} {saving.parent}")
        if checkpoint.attempt < 3:
            os._exit(1)
        return [path.read_text() for path in sorted(Path(directory).glob("attempt-*"))]

    runner = HorovodRunner(np=-1, max_restarts=2, checkpoint_dir=tmp_path / "kept")
    places = [text.split() for text in runner.run(main, directory=str(tmp_path))]
    assert len({pid for pid, _ in places}) == 3
    assert len({scratch for _, scratch in places}) == 3
    assert not any(Path(scratch).exists() for _, scratch in places)


def test_a_checkpoint_that_cannot_be_stored_may_be_worth_another_attempt(tmp_path: Path) -> None:
    def main() -> int:
        with checkpoint.save(step=checkpoint.attempt) as directory:
            if checkpoint.attempt == 1:
                os.mkfifo(directory / "what cannot be stored")
        if checkpoint.attempt == 1:
            mains.wait_for_ever()
        return checkpoint.attempt

    runner = HorovodRunner(
        np=-1,
        checkpoint_dir=tmp_path / "kept",
        on_checkpoint_error="raise",
        max_restarts=1,
        restart_on=(CheckpointError,),
    )
    assert runner.run(main) == 2
    assert [each.step for each in runner.checkpoints] == [2]


def test_checkpoints_that_cannot_be_listed_do_not_replace_the_error(tmp_path: Path) -> None:
    def main(location: str) -> NoReturn:
        if Path(location).is_dir():
            Path(location).rmdir()
            Path(location).touch()
        os._exit(9)

    kept = tmp_path / "kept"
    runner = HorovodRunner(np=-1, checkpoint_dir=kept, max_restarts=1)
    with pytest.raises(WorkerFailedError, match="exit code 9") as caught:
        runner.run(main, location=str(kept))
    assert len(caught.value.attempts) == 2


def test_the_result_of_an_attempt_that_failed_is_never_used() -> None:
    def main() -> Any:
        if os.environ["RANK"] == "1":
            time.sleep(0.5)
            if checkpoint.attempt == 1:
                os._exit(9)
            return None
        if checkpoint.attempt == 1:
            return numpy.full(1_000_000, 1)
        return None

    assert HorovodRunner(np=-2, max_restarts=1).run(main) is None


WORKER_ONLY = """
class Model:
    def __init__(self, weights):
        self.weights = weights

class Layer:
    pass
"""


def worker_only_module(tmp_path: Path) -> str:
    directory = tmp_path / "only_in_the_worker"
    directory.mkdir()
    (directory / "worker_only_models.py").write_text(WORKER_ONLY)
    return str(directory)


def payload_error(main: Any, directory: str) -> tuple[str, Path]:
    """Run, and give the error's text and the file it names."""
    with pytest.raises(PayloadError) as caught:
        HorovodRunner(np=-1, max_restarts=2).run(main, directory=directory)
    text = str(caught.value)
    named = re.search(r"kept in (\S+?): ", text)
    assert named, text
    return text, Path(named[1])


def test_a_result_whose_class_is_missing_here_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(directory: str) -> Any:
        sys.path.append(directory)
        worker_only_models = importlib.import_module("worker_only_models")

        return {"model": worker_only_models.Model([1.0, 2.0])}

    directory = worker_only_module(tmp_path)
    text, kept = payload_error(main, directory)
    try:
        assert "ModuleNotFoundError: No module named 'worker_only_models'" in text
        assert "It needs worker_only_models.Model, which cannot be imported here" in text
        assert announcements(capsys) == []
        monkeypatch.syspath_prepend(directory)
        assert pickle.loads(kept.read_bytes())["model"].weights == [1.0, 2.0]
    finally:
        kept.unlink()
        sys.modules.pop("worker_only_models", None)


def test_only_classes_that_are_missing_here_are_named(tmp_path: Path) -> None:
    def main(directory: str) -> Any:
        sys.path.append(directory)
        worker_only_models = importlib.import_module("worker_only_models")

        return [
            collections.OrderedDict(a=1),
            collections.Counter("ab"),
            worker_only_models.Model(numpy.zeros(3)),
            worker_only_models.Layer(),
        ]

    text, kept = payload_error(main, worker_only_module(tmp_path))
    kept.unlink()
    assert "It needs worker_only_models.Model, which cannot be imported here" in text
