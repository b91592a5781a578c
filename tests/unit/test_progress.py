"""What is shown of a run that goes on, made from states instead of runs."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.metrics.driver import MetricsRecorder
from horovodrunner.flows.metrics.history import History
from horovodrunner.flows.metrics.records import Bar, Point
from horovodrunner.flows.outcome.outcome import Failure, FailureKind, Outcome
from horovodrunner.flows.progress.driver import ProgressView
from horovodrunner.flows.progress.html import in_html
from horovodrunner.flows.progress.screens import LogScreen, NotebookScreen, find_screen
from horovodrunner.flows.progress.view import RunState, in_words
from horovodrunner.wire.events import CheckpointStored, Event, Failed, Placed, RankStates


def history_of(*values: float) -> History:
    history = History()
    for step, value in enumerate(values):
        history._add(Point(step, {"loss": value}))
    return history


def state(**changes: Any) -> RunState:
    facts: dict[str, Any] = {
        "state": "running",
        "seconds": 65.0,
        "bars": (Bar(1, 0.0, 10.0, "epoch", 5, 20),),
        "ranks": ("training", "waiting in allreduce"),
        "hosts": 2,
        "history": history_of(1.0, 0.5),
    }
    return RunState(**{**facts, **changes})


class TestWords:
    def test_all_of_it_is_told(self) -> None:
        head, bar, metrics = in_words(state(checkpoint=40, attempt=2, attempts=3)).splitlines()
        assert head == (
            "running, 01:05; 2 ranks on 2 hosts: 1 training, 1 waiting in allreduce; "
            "attempt 2 of 3; checkpoint of step 40"
        )
        assert bar.startswith("epoch:  25%|")
        assert "5/20 [00:10<00:30,  2.00s/it]" in bar
        assert metrics == "step 1: loss 0.5000"

    def test_a_run_that_reports_nothing(self) -> None:
        run = state(bars=(), history=History(), ranks=("training",), hosts=1)
        assert in_words(run) == "running, 01:05; 1 rank training"
        assert not run.has_news


class TestHtml:
    def test_bars_ranks_and_metrics(self) -> None:
        text = in_html(state())
        assert "width:25.0%" in text
        assert "5/20 (25%), 2.00 s each, 00:30 left" in text
        assert "rank 1: waiting in allreduce" in text
        assert text.count("<svg") == 1

    def test_the_end_leaves_no_time_left(self) -> None:
        text = in_html(state(state="failed", cause="rank 1 failed: <b>"))
        assert "left" not in text.replace("text-align:left", "")
        assert "rank 1 failed: &lt;b&gt;" in text

    def test_the_users_texts_are_escaped(self) -> None:
        text = in_html(state(bars=(Bar(1, 0.0, 0.0, "<script>", 0, None, "<i>"),)))
        assert "<script>" not in text
        assert "<i>" not in text

    def test_what_is_much_is_bounded(self) -> None:
        history = History()
        history._add(Point(0, {f"metric {n}": 1.0 for n in range(1000)}))
        assert len(in_html(state(history=history, ranks=("training",) * 10_000))) < 100_000


class Recorded:
    """A screen that remembers."""

    pause_seconds = 0.0

    def __init__(self) -> None:
        self.drawn: list[RunState] = []

    def draw(self, run: RunState, *, is_final: bool) -> None:
        self.drawn.append(run)

    def beside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


def view_of(screen: Any) -> ProgressView:
    history = History()
    return ProgressView(screen, MetricsRecorder(history), history, attempts=1)


def failed(rank: int, kind: FailureKind) -> Failed:
    return Failed(Outcome(failure=Failure(rank, "host", "it", kind=kind)).to_bytes())


class TestView:
    @pytest.mark.parametrize(
        ("events", "ranks", "checkpoint"),
        [
            ([], ("starting", "starting"), None),
            ([RankStates(("training", "ended"))], ("training", "ended"), None),
            ([CheckpointStored(3)], ("starting", "starting"), 3),
            ([failed(1, FailureKind.LOST)], ("starting", "lost"), None),
            ([failed(1, FailureKind.EXCEPTION)], ("starting", "failed"), None),
            ([failed(9, FailureKind.EXCEPTION)], ("starting", "starting"), None),
        ],
    )
    def test_events_change_what_is_drawn(
        self, events: list[Event], ranks: tuple[str, ...], checkpoint: int | None
    ) -> None:
        screen = Recorded()
        view = view_of(screen)
        for event in [Placed(((0, 0, "a"), (1, 1, "b"))), *events]:
            view.handlers[type(event)](event)
            assert view.is_due()
        view.draw()
        assert not view.is_due()
        drawn = screen.drawn[-1]
        assert (drawn.ranks, drawn.hosts, drawn.checkpoint) == (ranks, 2, checkpoint)

    @pytest.mark.parametrize(
        ("error", "word", "ranks"),
        [
            (None, "succeeded", ("ended", "ended")),
            (ValueError("one\ntwo"), "failed", ("stopped", "ended")),
            (KeyboardInterrupt(), "stopped", ("stopped", "ended")),
        ],
    )
    def test_the_end_is_drawn(
        self, error: BaseException | None, word: str, ranks: tuple[str, ...]
    ) -> None:
        screen = Recorded()
        view = view_of(screen)
        view.handlers[RankStates](RankStates(("training", "ended")))
        view.end(error)
        assert (screen.drawn[-1].state, screen.drawn[-1].ranks) == (word, ranks)
        assert "\n" not in screen.drawn[-1].cause
        view.handlers[CheckpointStored](CheckpointStored(1))
        assert not view.is_due()  # what comes late is not drawn over it


def test_a_screen_that_fails_is_left_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Recorded):
        def draw(self, run: RunState, *, is_final: bool) -> None:
            raise OSError("no terminal")

    console = Console(drawing=view_of(Broken()))
    for _ in range(3):
        console.note("hello")
        console.show(0)
    out = capsys.readouterr().out
    assert out.count("no longer shown: OSError: no terminal") == 1
    assert out.count("hello") == 3


def test_a_log_has_a_line_for_what_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    screen = LogScreen()
    for run in [state(bars=(), history=History()), state(), state(seconds=99.0)]:
        screen.draw(run, is_final=False)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("HorovodRunner: epoch:  25%|")
    assert line.endswith("step 1: loss 0.5000")


def test_a_process_without_a_terminal_is_a_log() -> None:
    assert isinstance(find_screen(), LogScreen)
    assert NotebookScreen.pause_seconds >= 0.5
