"""Metrics of real ranks: what of them is in the history, however the run ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from horovodrunner import ArgumentTypeError, HorovodRunner, WorkerFailedError, metrics
from horovodrunner.flows.metrics.driver import MetricsRecorder
from horovodrunner.flows.metrics.records import Bar


def rank() -> int:
    return int(os.environ["RANK"])


def test_a_run_has_a_history() -> None:
    def main(epochs: int) -> None:
        for epoch in metrics.progress(range(epochs), desc="epoch"):
            metrics.report(step=epoch, loss=1 / (epoch + 1) + rank(), acc=np.float32(0.5))

    runner = HorovodRunner(np=-2)
    assert len(runner.history) == 0
    runner.run(main, epochs=3)
    assert runner.history["loss"] == {0: 1.0, 1: 1 / 2, 2: 1 / 3}
    assert runner.history["acc"] == dict.fromkeys(range(3), 0.5)
    assert list(runner.history.to_pandas()["loss.max"]) == [2.0, 1.5, 1 / 3 + 1]
    runner.run(main, epochs=1)
    assert len(runner.history) == 1


@pytest.mark.parametrize("how", ["exception", "kill", "exit"])
def test_it_reaches_up_to_the_failure(how: str) -> None:
    def main() -> NoReturn:
        for step in range(50):
            metrics.report(step=step, loss=float(step))
        if how == "exception":
            raise ValueError("diverged")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)

    runner = HorovodRunner(np=-1)
    with pytest.raises(WorkerFailedError):
        runner.run(main)
    assert runner.history["loss"] == {step: float(step) for step in range(50)}


def test_it_knows_the_attempts(tmp_path: Path) -> None:
    def main() -> None:
        metrics.report(loss=1.0)
        metrics.report(loss=2.0)
        if not (tmp_path / "was here").exists():
            (tmp_path / "was here").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    runner = HorovodRunner(np=-1, max_restarts=1)
    runner.run(main)
    assert [(point.attempt, point.step) for point in runner.history] == [
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]


def test_no_framework_is_imported_for_it() -> None:
    def main() -> list[str]:
        import sys

        class Tensor:
            shape = ()

            def item(self) -> float:
                return 0.25

        metrics.report(loss=Tensor())
        return [name for name in ("torch", "tensorflow", "numpy", "tqdm") if name in sys.modules]

    runner = HorovodRunner(np=-1)
    assert runner.run(main) == []
    assert runner.history["loss"] == {0: 0.25}


def test_a_tensor_on_a_gpu_is_told_of_once(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        class Tensor:
            is_cuda = True

            def item(self) -> float:
                return 0.5

        for _ in range(3):
            metrics.report(loss=Tensor())

    runner = HorovodRunner(np=-2)
    runner.run(main)
    assert capfd.readouterr().out.count("waits for the GPU") == 1
    assert len(runner.history) == 3


def test_a_value_that_is_no_number_ends_main_with_its_name() -> None:
    def main() -> None:
        metrics.report(step=1, loss="nan")

    with pytest.raises(WorkerFailedError, match="ArgumentTypeError: loss='nan'") as caught:
        HorovodRunner(np=-1).run(main)
    assert isinstance(caught.value.__cause__, ArgumentTypeError)


def test_processes_of_main_report_nothing() -> None:
    def main() -> int:
        child = os.fork()  # noqa: TID251 - a rank's
        if child == 0:
            metrics.report(loss=7.0)
            os._exit(0)
        os.waitpid(child, 0)
        metrics.report(loss=1.0)
        return child

    runner = HorovodRunner(np=-1)
    runner.run(main)
    assert runner.history["loss"] == {0: 1.0}


def test_main_may_close_what_it_did_not_open() -> None:
    def main() -> None:
        os.closerange(3, 3000)
        metrics.report(loss=1.0)

    runner = HorovodRunner(np=-1)
    runner.run(main)
    assert runner.history["loss"] == {0: 1.0}


def bars_of(runner: HorovodRunner, monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    """Collect what the driver hears of the bars of a runner's next run."""
    heard: list[Bar] = []

    def draw(recorder: MetricsRecorder, rank: int, bar: Bar) -> None:
        heard.append(bar)

    monkeypatch.setattr(MetricsRecorder, "_draw", draw)
    return heard


def test_progress_takes_what_loops_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        started = 0

        def __iter__(self) -> Iterator[int]:
            Stream.started += 1
            return iter((1, 2))

        def __len__(self) -> int:
            raise NotImplementedError

    def main() -> int:
        for _ in metrics.progress(np.arange(3), desc="array"):
            pass
        list(metrics.progress(Stream(), desc=Path("stream"), leave=False))  # type: ignore[arg-type]
        bar: Any
        with metrics.progress(desc="counts", total=4.5, initial=1) as bar:
            bar.update(np.int64(2))
            bar.update(np.float32(0.5))
            bar.set_postfix({"loss": 1.0}, refresh=False)
            bar.refresh()
        bar.update(10)
        metrics.progress(desc="off", total=1, disable=True).close()
        metrics.progress(desc="back", total=3).update(-2)
        again = metrics.progress(range(2), desc="again")
        list(again), list(again)
        return Stream.started

    runner = HorovodRunner(np=-1)
    bars = bars_of(runner, monkeypatch)
    assert runner.run(main) == 1
    last = {bar.number: bar for bar in bars}
    assert all(bar.has_ended for bar in last.values())
    assert [(bar.description, bar.done, bar.total) for bar in last.values()] == [
        ("array", 3, 3),
        ("stream", 2, None),
        ("counts", 3, 5),
        ("back", 0, 3),
        ("again", 2, 2),
        ("again", 2, 2),
    ]
    assert last[3].postfix == "loss 1.0000"


def test_a_bar_moves_after_its_postfix_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BAR_SECONDS", 1e9)

    def main() -> None:
        bar: Any = metrics.progress(total=10)
        bar.set_postfix(loss=1.0)
        bar.update(7)
        os._exit(0)  # in the middle of a long evaluation

    runner = HorovodRunner(np=-1)
    bars = bars_of(runner, monkeypatch)
    with pytest.raises(WorkerFailedError):
        runner.run(main)
    assert bars[-1].done == 7


def test_main_may_replace_clocks_and_functions() -> None:
    def main() -> None:
        import json
        import sys
        import time

        real = {id(time.time), id(time.monotonic)}
        for module in list(sys.modules.values()):  # as freezegun does
            for name, value in list(vars(module).items()):
                if id(value) in real:
                    setattr(module, name, lambda: 1e9)
        json.dumps = json.loads = os.write = None  # type: ignore[assignment]
        for step in metrics.progress(range(3)):
            metrics.report(step=step, loss=1.0)

    runner = HorovodRunner(np=-1)
    runner.run(main)
    assert [point.step for point in runner.history] == [0, 1, 2]
    assert all(point.time > 1.5e9 for point in runner.history)


@pytest.mark.heavy
def test_a_flood_holds_nobody_up_and_nothing_of_it_is_lost() -> None:
    def main(reports: int) -> int:
        for step in range(reports):
            metrics.report(step=step, loss=1.0, acc=2.0, lr=3.0)
        return metrics.__name__.count("metrics")

    runner = HorovodRunner(np=-1)
    assert runner.run(main, reports=100_000) == 1
    assert len(runner.history) == 100_000
    last: Any = runner.history.last
    assert last.step == 99_999
