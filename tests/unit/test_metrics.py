"""Records of metrics, and the history that they make, without a run."""

from __future__ import annotations

import fractions
import html.parser
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from horovodrunner import ArgumentTypeError, ArgumentValueError, metrics
from horovodrunner.flows.metrics import series
from horovodrunner.flows.metrics.driver import MetricsRecorder
from horovodrunner.flows.metrics.history import History
from horovodrunner.flows.metrics.records import (
    Bar,
    Point,
    decode_records,
    encode_bar,
    encode_point,
)
from horovodrunner.flows.metrics.worker import MetricsPipe
from horovodrunner.wire.events import Points


def history_of(*points: Point, size: int = 1) -> History:
    history = History(size)
    for point in points:
        history._add(point)
    return history


def losses(*values: float, rank: int = 0, attempt: int = 1) -> list[Point]:
    return [Point(step, {"loss": value}, rank, attempt) for step, value in enumerate(values)]


class TestReport:
    @pytest.mark.parametrize(
        "value",
        [
            1,
            0.5,
            True,
            10**400 // 10**390,
            math.nan,
            -math.inf,
            np.float32(0.5),
            np.int64(3),
            np.array(2.0),
            np.array([2.0]),
            fractions.Fraction(1, 2),
        ],
        ids=repr,
    )
    def test_takes_numbers_of_any_library(self, value: Any) -> None:
        metrics.report(step=1, it=value)

    @pytest.mark.parametrize(
        ("value", "word"),
        [
            ("0.5", "text to"),
            (None, "NoneType"),
            ([1.0], "list"),
            (np.zeros(2), r"shape \(2,\)"),
            (1j, "complex"),
            (np.array(1j), "one number"),
            (np.str_("1"), "str_"),
        ],
    )
    def test_refuses_others_by_name(self, value: Any, word: str) -> None:
        with pytest.raises(ArgumentTypeError, match=f"^it=.*{word}"):
            metrics.report(step=1, it=value)

    @pytest.mark.parametrize("step", [1.5, "1", True])
    def test_refuses_a_step_that_is_none(self, step: Any) -> None:
        with pytest.raises(ArgumentTypeError, match=r"^step="):
            metrics.report(step=step, loss=1)

    def test_refuses_a_step_that_no_column_holds(self) -> None:
        with pytest.raises(ArgumentValueError, match=r"2\*\*53"):
            metrics.report(step=2**60, loss=1)

    def test_refuses_unknown_ranks(self) -> None:
        with pytest.raises(ArgumentValueError, match=r"ranks='none'"):
            metrics.report(step=1, ranks="none", loss=1)

    def test_progress_outside_a_run_is_tqdms(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert list(metrics.progress(range(3), desc="epoch")) == [0, 1, 2]
        assert "epoch" in capsys.readouterr().err

    def test_progress_refuses_what_is_no_iterable(self) -> None:
        with pytest.raises(ArgumentTypeError, match=r"^progress\(3\)"):
            metrics.progress(3)  # type: ignore[arg-type]


class TestRecords:
    def test_a_point_comes_back(self) -> None:
        values = {"loss": math.inf, "a b/ä": -0.0, "n": 1.0}
        line = encode_point(7, 1.5, values, is_kept=True)
        assert list(decode_records(line, 2, 3)) == [Point(7, values, 2, 3, 1.5)]

    def test_a_bar_comes_back(self) -> None:
        bar = Bar(1, 0.5, 2.5, "epoch\n", 3, None, "loss 1", has_ended=True)
        assert list(decode_records(encode_bar(bar), 0, 1)) == [bar]

    @pytest.mark.parametrize(
        "line",
        [
            b"",
            b"\xff",
            b"[]",
            b"{}",
            b"3",
            b'["point"]',
            b'["point", 1, 2, 3, 4]',
            b'["point",',
            b'["point", 1e999, 0, 1, {}]',
            b'["bar", 1, 2, "x", null, 1, "", false]',
            b"[" * 100_000,
        ],
    )
    def test_what_is_no_record_is_left_out(self, line: bytes) -> None:
        good = encode_point(1, 2.0, {"loss": 3.0}, is_kept=True)
        assert [p.step for p in decode_records(line + b"\n" + good, 0, 1)] == [1]  # type: ignore[union-attr]


class TestHistory:
    def test_a_metric_by_step(self) -> None:
        history = history_of(*losses(3.0, 2.0), Point(1, {"acc": 0.5}))
        assert history["loss"] == {0: 3.0, 1: 2.0}
        assert history["acc"] == {1: 0.5}
        assert history.metrics == ("loss", "acc")
        assert [point.values for point in history] == [{"loss": 3.0}, {"loss": 2.0}, {"acc": 0.5}]

    def test_a_step_that_ran_again_has_its_last_value(self) -> None:
        history = history_of(*losses(3.0, 2.0), *losses(1.0, attempt=2))
        assert history["loss"] == {0: 1.0, 1: 2.0}
        assert list(history.to_pandas()["attempt"]) == [1, 1, 2]

    def test_the_best_is_no_nan(self) -> None:
        history = history_of(*losses(math.nan, 2.0, 1.0, 1.0, math.inf))
        assert history.best("loss").step == 2
        assert history.best("loss", "max").step == 4

    def test_the_best_of_what_was_not_reported_names_what_was(self) -> None:
        with pytest.raises(ArgumentValueError, match=r"'acc' was not reported.*'loss'"):
            history_of(*losses(1.0)).best("acc")
        with pytest.raises(ArgumentValueError, match="never a number"):
            history_of(*losses(math.nan)).best("loss")
        with pytest.raises(ArgumentValueError, match="mode='largest'"):
            history_of(*losses(1.0)).best("loss", "largest")
        with pytest.raises(KeyError, match="'acc' was not reported"):
            history_of()["acc"]

    def test_ranks_are_summed_up_by_step(self) -> None:
        history = history_of(
            *losses(1.0, 2.0), *losses(3.0, math.nan, rank=1), *losses(5.0, rank=2), size=3
        )
        frame = history.to_pandas()
        assert list(frame["loss"]) == [1.0, 2.0]
        assert frame["loss.mean"][0] == 3.0
        assert math.isnan(frame["loss.mean"][1])
        assert list(frame["loss.min"]) == [1.0, 2.0]
        assert list(frame["loss.max"]) == [5.0, 2.0]

    def test_all_points_of_other_ranks_are_kept_on_request(self) -> None:
        kept = Point(0, {"loss": 2.0}, rank=1, time=5.0)
        summed = Point(1, {"loss": 9.0}, rank=1, time=6.0, is_kept=False)
        frame = history_of(*losses(1.0), kept, summed, size=2).to_pandas(ranks="all")
        assert list(frame["rank"]) == [0, 1]
        assert str(frame["time"][1]) == "1970-01-01 00:00:05+00:00"

    def test_an_empty_one_has_the_columns(self) -> None:
        frame = History().to_pandas()
        assert list(frame.columns) == ["step", "time", "rank", "attempt"]
        assert repr(History()) == "<History: nothing was reported>"
        assert History()._repr_html_()
        with pytest.raises(ArgumentValueError, match="nothing was reported"):
            History().plot()

    def test_it_says_what_it_has(self) -> None:
        history = history_of(*losses(1.0, 0.5))
        assert repr(history) == "<History: 2 points up to step 1: loss 0.5000>"

    def test_its_html_is_well_formed(self) -> None:
        text = history_of(Point(0, {"<b>": 1.0, "x": math.nan}))._repr_html_()
        html.parser.HTMLParser().feed(text)
        assert "&lt;b&gt;" in text
        assert text.count("<tr>") == 3

    def test_it_is_drawn(self, tmp_path: Path) -> None:
        history = history_of(*losses(1.0, math.nan, 0.5), *losses(2.0, rank=1), size=2)
        figure = history.plot("loss")
        figure.savefig(tmp_path / "loss.png")
        assert [axes.get_ylabel() for axes in figure.axes] == ["loss"]
        with pytest.raises(ArgumentValueError, match="'acc' was not reported"):
            history.plot("acc")


class TestThinning:
    def test_points_beyond_the_most_are_thinned_evenly(self) -> None:
        table = series.PointTable(most=8)
        for step in range(100):
            table.add(Point(step, {"loss": -float(step)} if step % 3 else {}))
        assert len(table) <= 8
        assert [point.step for point in table] == list(range(0, 100, table.every))
        assert list(table.series("loss")) == [
            (step, -float(step)) for step in range(0, 100, table.every) if step % 3
        ]
        assert table.seen == 100
        assert table.last is not None
        assert table.last.step == 99
        extremes = table.extremes("loss")
        assert extremes is not None
        assert extremes[0].step == 98

    def test_ranks_are_thinned_alike(self) -> None:
        summary = series.RankSummary(most=8)
        for rank in range(3):
            for step in range(50):
                summary.add(Point(step, {"loss": float(rank)}, rank))
        for step in range(50):
            assert len(summary.at(1, step)) == (step % summary.every == 0)
        assert summary.at(1, 0)["loss"].count == 3


class TestPipe:
    def test_a_pipe_that_nobody_reads_holds_nobody_up(self) -> None:
        read, write = os.pipe()
        pipe = MetricsPipe(write)
        lines = [f"{number}\n".encode() for number in range(30_000)]
        for line in lines:
            pipe.send(line)
        os.set_blocking(read, False)
        got = b""
        while len(got) < sum(map(len, lines)):
            got += os.read(read, 1 << 20)
            pipe.send(b"")
        assert got.splitlines(keepends=True) == lines
        os.close(read)
        os.close(write)

    def test_a_file_in_its_place_is_not_written_to(self, tmp_path: Path) -> None:
        read, write = os.pipe()
        pipe = MetricsPipe(write)
        with (tmp_path / "of main").open("wb") as file:
            os.dup2(file.fileno(), write)
            pipe.send(b"a point\n")
            pipe.finish()
        assert (tmp_path / "of main").read_bytes() == b""
        os.close(read)
        os.close(write)
        pipe.send(b"after it is closed\n")

    def test_what_was_dropped_is_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("horovodrunner.flows.metrics.worker.MAX_WAITING_RECORDS", 3)
        monkeypatch.setattr("horovodrunner.flows.metrics.worker.FINISH_SECONDS", 0.0)
        read, write = os.pipe()
        pipe = MetricsPipe(write)
        for _ in range(10):
            pipe.send(b"x" * 50_000)
        pipe.finish()
        assert pipe.dropped > 3
        os.close(read)
        os.close(write)


def test_bars_that_have_ended_make_room_for_others() -> None:
    recorder = MetricsRecorder(History())
    states = [Bar(1, 0.0, 0.0, "epoch", 0, 2), Bar(2, 0.0, 0.0, "batch", 5, 5, has_ended=True)]
    for bar in [*states, Bar(3, 0.0, 1.0, "batch", 1, 5)]:
        recorder.handlers[Points](Points(0, encode_bar(bar)))
    assert [bar.number for bar in recorder.bars[0].values()] == [1, 3]
