"""The parts of a run's record: what is hidden, written, read again and drawn."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import ConfigurationError, HorovodRunner, WorkerFailedError
from horovodrunner.__main__ import main as command
from horovodrunner.flows.checkpoints.retention import Best
from horovodrunner.flows.checkpoints.saved import SavedCheckpoint
from horovodrunner.flows.metrics.records import Bar, Point
from horovodrunner.flows.observer import RunFacts
from horovodrunner.flows.rundir import driver, layout, steps, upload, writer
from horovodrunner.flows.rundir.charts import Line, line_chart, ticks
from horovodrunner.flows.rundir.driver import RunDirectory
from horovodrunner.flows.rundir.masking import Mask
from horovodrunner.flows.rundir.reading import Rank, read_run
from horovodrunner.flows.rundir.report import render, slowest_ranks, write_report
from horovodrunner.flows.rundir.steps import StepClock
from horovodrunner.flows.rundir.writer import RecordWriter
from horovodrunner.wire.events import Lines, Message, Note, Placed, Profile, Usage
from tests.waiting import wait_until

FACTS = {"run_id": "ab12", "main": "train", "np": -2, "began": 1000.0}


def make_writer(directory: Path, *, size: int = 2, mask: Mask | None = None) -> RecordWriter:
    record = RecordWriter(directory, FACTS, size, mask or Mask())
    record.begin(1)
    return record


def report(record: RecordWriter, rank: int, step: int, **values: float) -> None:
    record.records(rank, [Point(step, values, rank, record.attempt, 5.0 + step, rank == 0)])


def history(directory: Path) -> list[dict[str, Any]]:
    return list(layout.read_lines(directory / layout.HISTORY))


def directory_of(
    location: str | Path,
    *,
    checkpoints: Any = (),
    artifacts: Path | None = None,
    best: Best | None = None,
    **facts: Any,
) -> RunDirectory:
    fields = {"run_id": "ab12", "np": -1, "main": "train", "began": 1000.0, **facts}
    given = {"arguments": {}, "options": {}, **fields}
    return RunDirectory(
        os.fspath(location),
        RunFacts(**given),
        records_of=lambda event: [],
        phases=lambda: (),
        checkpoints=lambda: checkpoints,
        artifacts=lambda: artifacts,
        best=best,
    )


def send(record: RunDirectory, *events: Any) -> None:
    for event in events:
        record.handlers[type(event)](event)


class TestMask:
    @pytest.mark.parametrize(
        "text",
        [
            "s3://me:hunter2@host/x",
            "log in with tok-12345",
            "the password is hunter",
            b"\xff tok-12345 \xff".decode("latin-1"),
        ],
    )
    def test_secrets_are_hidden_wherever_they_stand(self, text: str) -> None:
        mask = Mask({"API_TOKEN": "tok-12345"}, {"config": [{"db": {"password": "hunter"}}]})
        shown = mask.text(text)
        assert "(not shown)" in shown
        assert "hunter" not in shown
        assert "tok-12345" not in shown

    @pytest.mark.parametrize(
        ("name", "value"),
        [("PWD", "/home/me"), ("AUTH", "default"), ("KEY", "abc"), ("HOME", "secret-home")],
    )
    def test_what_is_no_secret_stays(self, name: str, value: str) -> None:
        assert Mask({name: value}).text(f"it is {value}") == f"it is {value}"

    def test_other_bytes_stay_as_they_are(self) -> None:
        everything = bytes(range(256)) + b"http://host:80/x?y=a@b"
        assert Mask({"TOKEN": "tok-12345"}).hide(everything) == everything


class TestStepClock:
    def test_steps_are_the_time_between_reports(self) -> None:
        clock = StepClock()
        for step, at in [(0, 10.0), (1, 11.0), (3, 13.0), (4, 18.0)]:
            clock.take(Point(step, {}, time=at))
        summary = clock.summary()
        assert (summary["median"], summary["p95"], summary["steps"]) == (1.0, 5.0, 3)
        assert summary["last_step"] == 4

    def test_the_time_between_attempts_is_no_step(self) -> None:
        clock = StepClock()
        for attempt in (0.0, 1000.0):
            clock.begin()
            for step in range(3):
                clock.take(Point(step, {}, time=attempt + step))
        assert clock.summary()["p95"] == 1.0

    def test_bars_count_where_nothing_is_reported(self) -> None:
        clock = StepClock()
        for number, done, at in [(1, 0, 0.0), (1, 4, 2.0), (2, 0, 50.0), (2, 1, 50.5)]:
            clock.take(Bar(number, 0.0, at, "", done, None))
        assert clock.summary()["median"] == 0.5

    def test_of_many_steps_some_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(steps, "MAX_KEPT", 10)
        clock = StepClock()
        for step in range(1000):
            clock.take(Point(step, {}, time=float(step)))
        assert clock.summary()["steps"] == 999
        assert len(clock._points.kept) <= 11


class TestWriter:
    def test_points_of_rank_0_and_the_range_of_all(self, tmp_path: Path) -> None:
        record = make_writer(tmp_path)
        report(record, 0, 1, loss=1.0)
        report(record, 1, 1, loss=3.0)
        first, both = history(tmp_path)
        assert (first["step"], first["rank"], first["values"]) == (1, 0, {"loss": 1.0})
        assert (both["step"], both["ranks"]) == (1, 2)
        assert (both["mean"]["loss"], both["min"]["loss"], both["max"]["loss"]) == (2.0, 1.0, 3.0)

    def test_what_is_not_finite_survives(self, tmp_path: Path) -> None:
        record = make_writer(tmp_path, size=1)
        report(record, 0, 1, a=math.nan, b=math.inf, c=-math.inf)
        values = history(tmp_path)[0]["values"]
        assert math.isnan(values["a"])
        assert (values["b"], values["c"]) == (math.inf, -math.inf)

    def test_a_step_that_not_all_ranks_reported_is_there_at_the_end(self, tmp_path: Path) -> None:
        record = make_writer(tmp_path)
        report(record, 0, 1, loss=1.0)
        record.end({"status": "succeeded"}, [])
        assert [each.get("ranks") for each in history(tmp_path)] == [None, 1]

    def test_steps_wait_for_slow_ranks_in_bounded_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writer, "MAX_OPEN_STEPS", 3)
        record = make_writer(tmp_path)
        for step in range(10):
            report(record, 1, step, loss=1.0)
        assert len(history(tmp_path)) == 7

    def test_files_of_numbers_grow_more_and_more_slowly(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writer, "MAX_LINES", 10)
        record = make_writer(tmp_path, size=1)
        for step in range(1000):
            report(record, 0, step, loss=1.0)
        written = [each["step"] for each in history(tmp_path)]
        assert written[:10] == list(range(10))
        assert 40 < len(written) < 90

    def test_output_is_kept_up_to_its_limit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writer, "MAX_LOG_BYTES", 100)
        record = make_writer(tmp_path, mask=Mask({"PASSWORD": "hunter2"}))
        for number in range(20):
            record.lines(Lines(1, "stdout", b"line %d hunter2\n" % number))
        record.message(Message(1, "the end"))
        now, before = (tmp_path / f"output/rank-1{each}.log" for each in ("", ".before"))
        assert now.read_text().endswith("the end\n")
        assert 0 < len(now.read_text()) + len(before.read_text()) < 250
        assert "hunter2" not in now.read_text() + before.read_text()

    def test_of_nested_bars_the_outer_one_says_how_far_a_rank_is(self, tmp_path: Path) -> None:
        record = make_writer(tmp_path)
        outer, inner = Bar(1, 0.0, 1.0, "epoch", 3, 10), Bar(2, 0.0, 2.0, "batch", 5, 99)
        record.records(0, [outer, inner])
        record.flush()
        assert read_run(tmp_path).ranks[0].bar == ("epoch", 3, 10)
        record.records(0, [replace(outer, done=10, has_ended=True), replace(inner, number=3)])
        record.flush()
        assert read_run(tmp_path).ranks[0].bar == ("batch", 5, 99)

    def test_a_checkpoint_that_is_gone_was_there(self, tmp_path: Path) -> None:
        record = make_writer(tmp_path)
        one, two = ({"step": n, "path": f"p{n}", "size": 1, "time": float(n)} for n in (1, 2))
        record.checkpoints([one])
        record.checkpoints([two])
        facts = layout.read_json(tmp_path / layout.RUN)
        assert [(each["step"], each["is_kept"]) for each in facts["checkpoints"]] == [
            (1, False),
            (2, True),
        ]

    def test_a_file_of_horovods_is_in_it(self, tmp_path: Path) -> None:
        timeline = tmp_path / "timeline.json"
        record = make_writer(tmp_path / "run")
        record.keep_file(timeline)
        assert not (tmp_path / "run/horovod").exists()
        timeline.write_text("[]")
        record.keep_file(timeline)
        assert (tmp_path / "run/horovod/timeline.json").read_text() == "[]"

    def test_profiles_of_all_attempts(self, tmp_path: Path) -> None:
        record = make_writer(tmp_path)
        stacks = b'{"frames": [["step", "/x/train.py", 9]], "stacks": [[[0], 2.0]]}'
        record.profile(Profile(1, 3.0, {"allreduce": 1.0}, {}, stacks))
        record.begin(2)
        record.profile(Profile(1, 4.0, {"allreduce": 2.0}, {}, stacks))
        record.profile(Profile(0, 4.0, {}, {}, b"rubbish"))
        record.flush()
        file = layout.read_json(tmp_path / layout.stacks_of(1))
        assert [each["name"] for each in file["profiles"]] == [
            "rank 1, attempt 1",
            "rank 1, attempt 2",
        ]
        rank = read_run(tmp_path).ranks[1]
        assert (rank.seconds, rank.waited) == (7.0, {"allreduce": 3.0})
        assert rank.hot == [("step (/x/train.py:9)", 2.0)]
        assert not (tmp_path / layout.stacks_of(0)).exists()


class TestReading:
    def test_a_directory_that_is_no_record(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"has no run\.json: name the directory"):
            read_run(tmp_path)

    def test_torn_files_and_rubbish_are_left_out(self, tmp_path: Path) -> None:
        record = make_writer(tmp_path)
        report(record, 0, 1, loss=1.0)
        for name in (layout.HISTORY, layout.USAGE):
            with (tmp_path / name).open("ab") as file:
                file.write(b'[]\nnull\n{"rank": 0, "step": "x", "values": 3}\n{"rank": 0, "st')
        (tmp_path / layout.RANKS).write_text('{"x": 1, "0": [], "1": {"bar": [1], "waited": 3}}')
        (tmp_path / layout.stacks_of(0)).write_text('{"profiles": []}')
        run = read_run(tmp_path)
        assert run.metrics["loss"].last == 1.0
        assert "train" in render(run)

    def test_a_run_that_goes_on(self, tmp_path: Path) -> None:
        record = make_writer(tmp_path)
        record.know(outcome={"status": "running"}, driver={"host": "elsewhere", "pid": 1})
        assert read_run(tmp_path).status == "running"
        os.utime(tmp_path / layout.RUN, (1000, 1000))
        for path in (tmp_path / layout.OUTPUT, tmp_path / layout.RUN):
            os.utime(path, (1000, 1000))
        assert read_run(tmp_path).status == "lost"


class TestSlowestRanks:
    def ranks(self, *waited: float, steps: tuple[float, ...] = ()) -> list[Rank]:
        ranks = [Rank(n, seconds=100.0, waited={"allreduce": w}) for n, w in enumerate(waited)]
        for rank, step in zip(ranks, steps, strict=False):
            rank.step_seconds = step
        return ranks

    def test_the_one_that_waits_least_is_slow(self) -> None:
        slow, text = slowest_ranks(self.ranks(40.0, 41.0, 2.0, 39.0))
        assert slow == [2]
        assert text.startswith("Rank 2 is slowest: the others waited for about 40 s in collectives")

    def test_without_waiting_the_one_with_long_steps_is(self) -> None:
        slow, text = slowest_ranks(self.ranks(0.0, 0.0, 0.0, steps=(1.0, 1.0, 1.5)))
        assert slow == [2]
        assert "1.5 s, where the median is 1 s" in text

    def test_equal_ones(self) -> None:
        assert slowest_ranks(self.ranks(10.0, 11.0))[0] == []
        assert slowest_ranks(self.ranks(10.0)) == ([], "")


class TestCharts:
    def chart(self, *points: tuple[float, float], **options: Any) -> str:
        line = Line("loss", points)
        return line_chart([line], title="t", x_text=str, y_text=str, **options)

    def test_what_is_not_finite_is_a_gap(self) -> None:
        chart = self.chart((0, 1.0), (1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0), (5, 2.0))
        path = re.findall(r'class="line c0" d="([^"]*)"', chart)[0]
        assert path.count("M") == 2
        assert "nan" not in chart
        assert "inf" not in chart

    def test_large_ranges_are_logarithmic(self) -> None:
        assert ">0.0001<" in self.chart((0, 1.0), (1, 0.00001), (2, 10.0))

    def test_a_step_back_begins_another_line(self) -> None:
        chart = self.chart((0, 1.0), (1, 2.0), (0, 3.0), (1, 4.0))
        assert re.findall(r'class="line c0" d="([^"]*)"', chart)[0].count("M") == 2

    def test_one_point_is_a_dot(self) -> None:
        assert "<circle" in self.chart((3, 0.0))
        assert self.chart((3, math.nan)) == ""

    @pytest.mark.parametrize(("low", "high"), [(0, 1e-9), (-5, 5), (1e9, 1.1e9), (0, 7)])
    def test_ticks_are_few_and_within(self, low: float, high: float) -> None:
        found = ticks(low, high, 4)
        assert 3 <= len(found) <= 7
        assert all(low <= each <= high * 1.0000001 for each in found)


class TestReport:
    def test_the_least_that_there_is(self, tmp_path: Path) -> None:
        (tmp_path / layout.RUN).write_text("{}")
        assert "Driver lost" in write_report(tmp_path).read_text()

    def test_nothing_of_the_users_is_taken_for_html(self, tmp_path: Path) -> None:
        evil = "<script>alert(1)</script>\"'&"
        record = RecordWriter(
            tmp_path,
            {**FACTS, "main": evil, "arguments": {evil: evil}, "cluster": {evil: evil}},
            2,
            Mask(),
        )
        record.begin(1)
        record.placed(Placed(((0, 0, evil), (1, 1, evil))))
        record.lines(Lines(0, "stdout", evil.encode()))
        record.note(Note(evil))
        report(record, 0, 1, **{evil: 1.0})
        record.records(0, [Bar(1, 4.0, 5.0, evil, 1, 2)])
        record.usage(Usage(0, evil, 5.0, 1.0, 1, 1.0, 1, 1, ((0, 5.0, 1, 2),)))
        record.profile(Profile(0, 1.0, {evil: 1.0}, {evil: 1.0}, _stacks(evil)))
        record.checkpoints([{"step": 1, "path": evil, "size": 1, "time": 5.0}])
        (tmp_path / evil.replace("/", "")).touch()
        told = {"type": evil, "text": evil, "traceback": evil, "last_lines": evil}
        record.end({"status": "failed", "ended": 6.0, "error": told}, [[evil, 1.0, 2.0, None]])
        page = write_report(tmp_path).read_text()
        assert "<script" not in page
        assert page.count("&lt;script&gt;") > 15

    def test_many_ranks_are_summed_up(self, tmp_path: Path) -> None:
        record = make_writer(tmp_path, size=100)
        for rank in range(100):
            for at in (10.0, 20.0):
                record.usage(Usage(rank, f"h{rank % 3}", at, 50.0, 2**30, 5.0, 1, 2))
            record.profile(Profile(rank, 9.0, {"allreduce": 0.0 if rank == 77 else 5.0}, {}, b""))
        record.flush()
        page = write_report(tmp_path).read_text()
        assert "mean and range of 100" in page
        assert "Rank 77 is slowest" in page
        assert "<tr class=slow><td>77</td>" in page
        assert page.count("<td>h0</td>") < 64
        assert len(page) < 200_000

    def test_it_needs_no_network(self, tmp_path: Path) -> None:
        make_writer(tmp_path)
        page = write_report(tmp_path).read_text()
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)

    def test_the_command_writes_it_again(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_writer(tmp_path)
        assert command(["report", str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
        assert command(["report", str(tmp_path / "nothing")]) == 1
        assert "has no run.json" in capsys.readouterr().err


def _stacks(name: str) -> bytes:
    return json.dumps({"frames": [[name, name, 1]], "stacks": [[[0], 1.0]]}).encode()


class TestRunDirectory:
    def test_it_is_named_by_time_and_id(self, tmp_path: Path) -> None:
        record = directory_of(tmp_path)
        assert record.location == str(tmp_path / "19700101-001640-ab12")
        assert record.artifacts == tmp_path / "19700101-001640-ab12" / "artifacts"
        record.end(None)

    def test_a_run_that_was_refused_has_one(self, tmp_path: Path) -> None:
        record = directory_of(tmp_path)
        record.end(ConfigurationError("too few slots"))
        run = read_run(record.directory)
        assert run.status == "failed"
        assert "too few slots" in (record.directory / "report.html").read_text()

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (None, "succeeded"),
            (KeyboardInterrupt("the run was stopped"), "interrupted"),
            (WorkerFailedError("ValueError: x", 1, "node-7", traceback="File t.py"), "failed"),
        ],
    )
    def test_outcomes(self, tmp_path: Path, error: BaseException | None, status: str) -> None:
        record = directory_of(tmp_path)
        record.begin(1)
        record.end(error)
        assert read_run(record.directory).status == status

    def test_checkpoints_of_earlier_runs_are_not_this_runs(self, tmp_path: Path) -> None:
        saved = [
            SavedCheckpoint(n, f"p{n}", 1, datetime.fromtimestamp(at, timezone.utc))
            for n, at in ((1, 500.0), (2, 1500.0))
        ]
        record = directory_of(tmp_path, checkpoints=saved)
        record.end(None)
        listed = read_run(record.directory).facts["checkpoints"]
        assert [each["step"] for each in listed] == [2]

    def test_checkpoints_have_their_numbers_and_the_best_is_marked(self, tmp_path: Path) -> None:
        many = {f"m{n}": 1.0 for n in range(30)}
        saved = [
            SavedCheckpoint(n, f"p{n}", 1, datetime.fromtimestamp(1500 + n, timezone.utc), metrics)
            for n, metrics in enumerate(
                [{"a<b": math.nan, "loss": 0.25}, {**many, "loss": 0.125}, {"loss": 0.5}, {}]
            )
        ]
        record = directory_of(tmp_path, checkpoints=saved, best=Best("loss", "min"))
        record._list_checkpoints()
        del saved[1]
        record.end(None)
        listed = read_run(record.directory).facts["checkpoints"]
        assert [each["is_best"] for each in listed] == [True, False, False, False]
        assert [len(each["metrics"]) for each in listed] == [2, 20, 1, 0]
        assert next(iter(listed[1]["metrics"])) == "loss"
        page = (record.directory / "report.html").read_text()
        assert "<b>best:</b> loss 0.2500, a&lt;b nan" in page
        assert "loss 0.1250, m0 1.0000, m1 1.0000, " in page
        assert "m6 1.0000 and 12 more" in page
        assert page.count("<b>best:</b>") == 1

    def test_a_disk_that_fails_is_told_where_the_next_event_is_taken(self, tmp_path: Path) -> None:
        record = directory_of(tmp_path)
        shutil.rmtree(record.directory)
        record.begin(1)
        wait_until(lambda: record._error is not None)
        with pytest.raises(FileNotFoundError):
            send(record, Lines(0, "stdout", b"x\n"))
        with pytest.raises(FileNotFoundError):
            record.end(None)

    def test_a_disk_that_is_slow_costs_output_and_no_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(driver, "MAX_WAITING_BYTES", 10)
        record = directory_of(tmp_path)
        for number in range(5):
            send(record, Lines(0, "stdout", b"line %d\n" % number))
        record.end(None)
        output = (record.directory / "output/rank-0.log").read_text().splitlines()
        assert output[:2] == ["line 0", "line 1"]
        assert "HorovodRunner: 3 lines are missing here" in output[2]

    def test_a_place_that_cannot_be_written_to_is_refused_before_the_launch(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        launched = tmp_path / "launched"
        runner = HorovodRunner(np=-1, run_dir=tmp_path / "file")
        with pytest.raises(ConfigurationError, match=r"run_dir=.*cannot be written to"):
            runner.run(launched.touch)
        assert not launched.exists()

    @pytest.mark.parametrize("run_dir", [3, ""])
    def test_what_is_no_path_is_refused(self, run_dir: Any) -> None:
        with pytest.raises(ConfigurationError, match="run_dir="):
            HorovodRunner(np=-1, run_dir=run_dir)


class TestUpload:
    def files(self, url: str) -> dict[str, bytes]:
        fsspec = pytest.importorskip("fsspec")
        fs = fsspec.filesystem("memory")
        root = url.removeprefix("memory://")
        return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}

    def test_it_is_behind_the_url_and_nowhere_else(self, tmp_path: Path) -> None:
        record = directory_of(f"memory://{tmp_path}")
        assert record.location == f"memory://{tmp_path}/19700101-001640-ab12"
        record.begin(1)
        send(record, Lines(0, "stdout", b"hello\n"))
        record.end(None)
        files = self.files(record.location)
        assert files["output/rank-0.log"] == b"hello\n"
        assert b"Succeeded" in files["report.html"]
        assert (record.directory / "report.html").exists()
        record.discard()
        assert not record.directory.exists()

    def test_the_ranks_files_are_there_and_here(self, tmp_path: Path) -> None:
        left = tmp_path / "left/rank-1/trace.json"
        left.parent.mkdir(parents=True)
        left.write_text("[]")
        record = directory_of(f"memory://{tmp_path}", artifacts=tmp_path / "left")
        assert record.artifacts is None
        record.end(None)
        assert self.files(record.location)["artifacts/rank-1/trace.json"] == b"[]"
        assert left.exists()

    def test_it_grows_while_the_run_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(upload, "PAUSE_SECONDS", 0.01)
        record = directory_of(f"memory://{tmp_path}")
        record.begin(1)
        for text in (b"one\n", b"two\n"):
            send(record, Lines(0, "stdout", text))

            def is_there(wanted: bytes = text) -> bool:
                return wanted in self.files(record.location).get("output/rank-0.log", b"")

            wait_until(is_there)
        record.end(None)

    def test_what_cannot_be_uploaded_stays_here(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = directory_of(f"memory://{tmp_path}")

        def refuse(path: str) -> Any:
            raise OSError(f"no room for {path}")

        assert record._upload is not None
        monkeypatch.setattr(record._upload._storage, "create", refuse)
        record.begin(1)
        with pytest.raises(OSError, match=f"all of it is in {record.directory} on the driver"):
            record.end(None)
        record.discard()
        assert (record.directory / "report.html").exists()

    def test_a_scheme_that_nobody_knows_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="nosuch"):
            directory_of("nosuch://bucket/runs")
