"""Records of metrics, and the history that they make, without a run."""

from __future__ import annotations

import copy
import fractions
import html.parser
import inspect
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tqdm

from horovodrunner import ArgumentTypeError, ArgumentValueError, metrics
from horovodrunner.flows.metrics import series
from horovodrunner.flows.metrics.driver import MetricsRecorder
from horovodrunner.flows.metrics.history import History, sparkline
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

    @pytest.mark.parametrize("value", [10**400, 10**5000], ids=["float", "digits"])
    def test_refuses_a_number_that_no_column_holds(self, value: int) -> None:
        with pytest.raises(ArgumentValueError, match=r"^it=.*too large.*logarithm"):
            metrics.report(step=1, it=value)

    def test_refuses_a_step_that_no_column_holds(self) -> None:
        with pytest.raises(ArgumentValueError, match=r"2\*\*53"):
            metrics.report(step=2**60, loss=1)

    def test_refuses_unknown_ranks(self) -> None:
        with pytest.raises(ArgumentValueError, match=r"ranks='none'"):
            metrics.report(step=1, ranks="none", loss=1)

    def test_progress_outside_a_run_is_tqdms(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert list(metrics.progress(range(3), desc="epoch")) == [0, 1, 2]
        assert "epoch" in capsys.readouterr().err

    def test_progress_outside_a_run_takes_all_that_tqdm_does(self) -> None:
        found = metrics.progress(range(3), leave=False, unit="batch", total=2.5)
        found.set_postfix({"loss": 1})
        assert list(found) == [0, 1, 2]
        assert not metrics.TQDM_OPTIONS - inspect.signature(tqdm.tqdm.__init__).parameters.keys()
        with pytest.raises(ArgumentTypeError, match="no option 'leaf'"):
            metrics.progress(range(3), leaf=False)

    def test_progress_refuses_what_is_no_iterable(self) -> None:
        with pytest.raises(ArgumentTypeError, match=r"^progress\(3\)"):
            metrics.progress(3)  # type: ignore[arg-type]


class TestRecords:
    def test_halves_of_characters_are_replaced(self) -> None:
        line = encode_point(1, 0.0, {"a\udc80": 1.0}, is_kept=True)
        (point,) = decode_records(line, 0, 1)
        assert isinstance(point, Point)
        assert point.values == {"a?": 1.0}

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

    def test_metrics_called_as_columns_keep_apart_from_them(self) -> None:
        point = Point(5, {"time": 1.5, "rank": 7.0, "step": 9.0, "loss.mean": 3.0, "loss": 2.0})
        row = history_of(point, size=2).to_pandas().iloc[0]
        assert (row["step"], row["rank"], row["step_"], row["rank_"]) == (5, 0, 9.0, 7.0)
        assert (row["time_"], row["loss.mean"], row["loss.mean_"]) == (1.5, 3.0, 2.0)
        assert str(row["time"]) == "1970-01-01 00:00:00+00:00"

    def test_it_knows_what_it_has(self) -> None:
        assert "loss" in history_of(*losses(1.0))
        assert "acc" not in history_of(*losses(1.0))

    @pytest.mark.parametrize(
        "copied",
        [copy.copy, copy.deepcopy, lambda history: pickle.loads(pickle.dumps(history))],
        ids=["copy", "deepcopy", "pickle"],
    )
    def test_a_copy_stays_as_it_is(self, copied: Callable[[History], History]) -> None:
        history = history_of(*losses(1.0, 2.0), *losses(3.0, rank=1), size=2)
        twin = copied(history)
        history._add(Point(2, {"loss": 0.5, "acc": 1.0}))
        assert twin["loss"] == {0: 1.0, 1: 2.0}
        assert list(twin.to_pandas()["loss.max"]) == [3.0, 2.0]
        assert twin.best("loss").step == 0
        twin._add(Point(3, {"acc": 1.0}))
        assert history["acc"] == {2: 1.0}

    def test_many_metrics_are_shown_in_few_words(self) -> None:
        history = history_of(Point(0, {f"metric {number}": 1.0 for number in range(3000)}))
        assert len(repr(history)) < 400
        assert repr(history).endswith("and 2988 more>")
        assert history._repr_html_().endswith("and 2900 more</td></tr></tbody></table>")
        with pytest.raises(KeyError) as caught:
            history["loss"]
        assert len(str(caught.value)) < 700

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

    def test_steps_that_go_back_are_drawn_in_their_order(self, tmp_path: Path) -> None:
        points = [Point(step, {"$x^$\n": float(step)}) for step in (100, 200, -5, 0)]
        figure = history_of(*points).plot()
        figure.savefig(tmp_path / "x.png")
        assert np.asarray(figure.axes[0].lines[0].get_xdata()).tolist() == [-5, 0, 100, 200]


class TestSparkline:
    @pytest.mark.parametrize(
        "series",
        [
            [(100, 1.0), (200, 2.0), (0, 3.0), (50, 2.0)],
            [(0, 1e308), (1, -1e308), (2, 5.0)],
            [(0, math.nan), (1, math.inf), (2, 1e-308), (2, 1e-308)],
            [(-(2**53), 1.0), (2**53, 1.0)],
        ],
    )
    def test_stays_within_its_box(self, series: list[tuple[int, float]]) -> None:
        path = re.search(r' d="([^"]*)"', sparkline(series, 160, 28))
        assert path
        points = [pair.split(",") for pair in re.findall(r"[\d.naif-]+,[\d.naif-]+", path[1])]
        assert len(points) == sum(math.isfinite(value) for _, value in series)
        assert all(0 <= float(x) <= 160 and 0 <= float(y) <= 28 for x, y in points)


class TestThinning:
    def test_points_beyond_the_most_are_thinned_evenly(self) -> None:
        table = series.PointTable(most=8)
        for step in range(100):
            table.add(Point(step, {"loss": -float(step)} if step % 3 else {}))
        assert len(table) <= 8
        steps = [point.step for point in table]
        # the last block may not have come to the one that was chosen of it
        assert [step // table.every for step in steps] == list(range(len(steps)))
        assert len(steps) >= 100 // table.every
        assert list(table.series("loss")) == [(step, -float(step)) for step in steps if step % 3]
        assert table.samples("loss", 2)[-1] == (98, -98.0)
        assert table.seen == 100
        assert table.last is not None
        assert table.last.step == 99
        extremes = table.extremes("loss")
        assert extremes is not None
        assert extremes[0].step == 98

    def test_what_alternates_is_thinned_alike(self) -> None:
        table = series.PointTable(most=1000)
        for step in range(20_000):
            table.add(Point(step, {"train": 1.0} if step % 2 else {"val": 2.0}, rank=step % 2))
        kept = {name: len(list(table.series(name))) for name in table.names}
        assert min(kept.values()) > sum(kept.values()) / 3

    @pytest.mark.parametrize("first", [0, 1])
    def test_steps_are_thinned_whatever_lies_between_them(self, first: int) -> None:
        summary = series.RankSummary(most=100)
        steps = range(first, 1000 * 50, 50)
        for step in steps:
            summary.add(Point(step, {"loss": 1.0}))
        assert 20 < sum(bool(summary.at(1, step)) for step in steps) <= 100

    def test_ranks_are_thinned_alike(self) -> None:
        summary = series.RankSummary(most=8)
        for rank in range(3):
            for step in range(50):
                summary.add(Point(step, {"loss": float(rank)}, rank))
        for step in range(50):
            assert {it.count for it in summary.at(1, step).values()} <= {3}
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
        monkeypatch.setattr("horovodrunner.flows.metrics.worker.MAX_WAITING_BYTES", 200_000)
        monkeypatch.setattr("horovodrunner.flows.metrics.worker.FINISH_SECONDS", 0.0)
        read, write = os.pipe()
        pipe = MetricsPipe(write)
        for _ in range(10):
            pipe.send(b"x" * 50_000)
        pipe.finish()
        assert pipe.dropped > 3
        os.close(read)
        os.close(write)

    def test_a_report_during_a_report_is_not_left_behind(self) -> None:
        """As of a thread that came while this one was just writing, or of a signal's handler."""
        read, write = os.pipe()
        pipe = MetricsPipe(write)

        def write_slowly(fd: int, record: bytes) -> int:
            if record == b"first\n":
                pipe.send(b"second\n")
            return os.write(fd, record)

        pipe._os_write = write_slowly  # type: ignore[assignment]
        pipe.send(b"first\n")
        assert os.read(read, 100) == b"first\nsecond\n"
        os.close(read)
        os.close(write)


def test_bars_that_nobody_ends_are_forgotten() -> None:
    recorder = MetricsRecorder(History())
    for number in range(1, 100):
        recorder.handlers[Points](Points(0, encode_bar(Bar(number, 0.0, 0.0, "", 0, 2))))
    assert [*recorder.bars[0]] == [1, *range(91, 100)]


def test_bars_that_have_ended_make_room_for_others() -> None:
    recorder = MetricsRecorder(History())
    states = [Bar(1, 0.0, 0.0, "epoch", 0, 2), Bar(2, 0.0, 0.0, "batch", 5, 5, has_ended=True)]
    for bar in [*states, Bar(3, 0.0, 1.0, "batch", 1, 5)]:
        recorder.handlers[Points](Points(0, encode_bar(bar)))
    assert [bar.number for bar in recorder.bars[0].values()] == [1, 3]
