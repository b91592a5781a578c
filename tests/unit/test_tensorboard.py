"""Event files, as TensorBoard itself reads them."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import ArgumentValueError, ConfigurationError, HorovodRunner, metrics

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")


def scalars_of(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a directory as TensorBoard does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in tags}


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's reader would import it."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)


def test_a_run_has_its_scalars(tmp_path: Path) -> None:
    def main() -> None:
        rank = int(os.environ["RANK"])
        for step in range(3):
            metrics.report(step=step, ranks="all", loss=step + 0.5 * rank, big=1e300)

    runner = HorovodRunner(np=-2, tensorboard_dir=tmp_path / "logs")
    runner.run(main)
    (run,) = (tmp_path / "logs").iterdir()
    found = scalars_of(run)
    assert found["loss"] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert found["loss.max"] == [(0, 0.5), (1, 1.5), (2, 2.5)]
    assert found["big"][0] == (0, float("inf"))  # their numbers have 32 bits
    assert scalars_of(run / "rank-1")["loss"] == [(0, 0.5), (1, 1.5), (2, 2.5)]

    runner.run(main)
    assert len(list((tmp_path / "logs").iterdir())) == 2


def test_wall_times_are_those_of_the_points(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runner = HorovodRunner(np=-1, tensorboard_dir=tmp_path)
    runner.run(lambda: metrics.report(loss=1.0))
    (run,) = tmp_path.iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    last: Any = runner.history.last
    assert [each.wall_time for each in events.Scalars("loss")] == [last.time]


def test_a_restart_has_a_directory_of_its_own(tmp_path: Path) -> None:
    def main() -> None:
        metrics.report(step=0, loss=1.0)
        if not (tmp_path / "was here").exists():
            (tmp_path / "was here").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    HorovodRunner(np=-1, max_restarts=1, tensorboard_dir=tmp_path / "logs").run(main)
    (run,) = (tmp_path / "logs").iterdir()
    assert scalars_of(run / "attempt-2") == {"loss": [(0, 1.0)]}
    assert [each.name for each in run.iterdir() if each.is_dir()] == ["attempt-2"]


def test_urls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentValueError, match=r"^tensorboard_dir='s3://b/x': .*give a path"):
        HorovodRunner(np=-1, tensorboard_dir="s3://b/x")
    HorovodRunner(np=-1, tensorboard_dir=f"file://{tmp_path}")


def test_a_directory_that_cannot_be_made_is_refused_before_launch(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    runner = HorovodRunner(np=-1, tensorboard_dir=tmp_path / "file")
    with pytest.raises(ConfigurationError, match=r"^tensorboard_dir=.*cannot be written to"):
        runner.run(lambda: None)


def test_without_tensorboard_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"needs the package tensorboard.*pip install"):
        HorovodRunner(np=-1, tensorboard_dir="logs")


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        metrics.report(loss=1.0)
        return 7

    runner = HorovodRunner(np=-1, tensorboard_dir=tmp_path)

    class Full(type(Path())):  # type: ignore[misc]
        def open(self, *_: Any, **__: Any) -> Any:
            raise OSError(28, "No space left on device")

    runner._options = replace(runner._options, tensorboard_dir=Full(tmp_path))
    assert runner.run(main) == 7
    assert "writing event files for TensorBoard ends here" in capsys.readouterr().out
