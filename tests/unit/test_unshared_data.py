"""Rows that travel with the run: dealing them out, taking them in, equal steps."""

from __future__ import annotations

import itertools
import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyspark
import pytest

from horovodrunner import StartTimeoutError, data
from horovodrunner.data.columns import Column
from horovodrunner.data.distribution import (
    CONTROL,
    Distribution,
    distribute_rows,
    first_target,
    rows_per_target,
)
from horovodrunner.data.steps import OwnRowsSteps, Remainder
from horovodrunner.data.unshared import UnsharedDataSet
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError, DataError
from horovodrunner.flows.artifacts.driver import BroughtFiles
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.going import GoingRun
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.results.driver import ResultStore
from horovodrunner.flows.rows.task import TaskRows, Travelling
from horovodrunner.pickling import payload
from horovodrunner.pickling.buffers import loads
from horovodrunner.placement.environment import DATA_DIRECTORY
from horovodrunner.processes.driver import cluster
from horovodrunner.processes.driver.resources import TaskRequest

COLUMNS = (
    Column(("x",), "number", "int64"),
    Column(("pair",), "number", "float32", (None,)),
    Column(("tags",), "string", dims=(None,)),
)
IDENTITY = "f00d"
PLACES = (40, 20, 70)


@pytest.mark.parametrize("targets", [1, 2, 3, 7])
@pytest.mark.parametrize("every", [1, 2, 3, 7, 14])
def test_a_row_in_every_nth_part_is_dealt_out_evenly(targets: int, every: int) -> None:
    totals = [0] * targets
    for part in range(0, every * targets * 10, every):
        for target, count in enumerate(rows_per_target(first_target(part, targets), 1, targets)):
            totals[target] += count
    assert sum(totals) == targets * 10
    assert max(totals) - min(totals) <= targets


def test_batches_of_one_part_are_dealt_out_to_a_row() -> None:
    totals, first = [0] * 5, 3
    for rows in (1, 7, 0, 12, 3, 3):
        totals = [a + b for a, b in zip(totals, rows_per_target(first, rows, 5), strict=True)]
        first = (first + rows) % 5
    assert totals == rows_per_target(3, 26, 5) == [5, 5, 5, 6, 5]


ROWS_PER_RANK = [(5, 5), (7, 5), (4, 9, 6), (10,), (3, 3, 1)]


@pytest.mark.parametrize("rows_per_rank", ROWS_PER_RANK)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("remainder", ["drop", "pad", "split", "uneven"])
@pytest.mark.parametrize("start", [0, 2, 6])
def test_all_ranks_have_the_same_number_of_batches_of_their_own_rows(
    rows_per_rank: tuple[int, ...], batch_size: int, remainder: Remainder, start: int
) -> None:
    if remainder == "drop" and min(rows_per_rank) < batch_size:
        return
    lengths = []
    for rows in rows_per_rank:
        steps = OwnRowsSteps(rows, batch_size, 0, 1, remainder, start, rows_per_rank)
        lengths.append(len(steps))
        taken = [at for step in range(len(steps)) for at in range(*steps.positions(step))]
        if remainder == "split":
            assert taken[: max(0, rows - start)] == list(range(start, rows))
            assert all(end > first for first, end in map(steps.positions, range(len(steps))))
            continue
        assert taken == list(range(start, start + len(taken)))
        if remainder == "drop":
            assert len(taken) == len(steps) * batch_size <= max(0, min(rows_per_rank) - start)
            assert min(rows_per_rank) - start - len(taken) < batch_size
        elif remainder == "uneven":
            assert len(taken) == max(0, rows - start)
            assert steps.whole == max(0, rows - start) // batch_size
        else:
            assert len(taken) == len(steps) * batch_size >= max(rows_per_rank) - start
            assert len(taken) - max(0, max(rows_per_rank) - start) < batch_size
        assert steps.position_after(1) == min(max(rows_per_rank), start + batch_size)
    assert remainder == "uneven" or len(set(lengths)) == 1


def test_a_rank_without_rows_or_without_a_whole_batch_is_named() -> None:
    with pytest.raises(DataError, match=r"rank 1 has no rows: the 3 rows .* as 2, 0, 1"):
        OwnRowsSteps(2, 1, 0, 1, "pad", rows_per_rank=(2, 0, 1))
    with pytest.raises(DataError, match="rank 1 has 3 rows of its own, fewer than batch_size=4"):
        OwnRowsSteps(9, 4, 0, 1, "drop", rows_per_rank=(9, 3))


@pytest.mark.parametrize(
    ("remainder", "words"),
    [
        ("drop", "2 batches a rank and epoch; 4 rows are left out of each epoch"),
        ("pad", "4 batches a rank and epoch; 4 rows come twice"),
        ("uneven", "3 to 4 batches a rank and epoch; a rank's last one may be shorter"),
    ],
)
def test_the_log_tells_what_each_rank_has(remainder: Remainder, words: str) -> None:
    steps = OwnRowsSteps(7, 2, 0, 1, remainder, rows_per_rank=(7, 5))
    first = "12 rows, 5 to 7 of them on each of 2 ranks, in batches of 2: "
    assert steps.summary() == first + words


def table(start: int, rows: int) -> pa.Table:
    x = list(range(start, start + rows))
    # One row of all has three tags: it is on one rank, and every rank has to know it.
    tags = [["a", str(i)] + ["c"] * (i == 60) for i in x]
    pairs = pa.array([[i, -i] for i in x], pa.list_(pa.float32()))
    return pa.table({"x": x, "pair": pairs, "tags": tags})


def dealt_out(
    tables: list[pa.Table], monkeypatch: pytest.MonkeyPatch, job: Distribution
) -> list[Iterator[pa.RecordBatch]]:
    """Do what Spark does: give every target its pieces, in order, in batches of 7 rows."""
    found = []
    for part, rows in enumerate(tables):
        context = type("Context", (), {"partitionId": lambda self, part=part: part})()
        monkeypatch.setattr(pyspark.TaskContext, "get", lambda context=context: context)
        found += list(distribute_rows(job, iter(rows.to_batches(max_chunksize=10))))
    pieces = pa.Table.from_batches(found)
    of_targets = []
    for target, place in enumerate(PLACES):
        control = {
            "place": [place],
            "dataset": [CONTROL],
            "part": [target],
            "number": [0],
            "rows": [0],
            "data": [json.dumps({"target": target}).encode()],
        }
        mine = pieces.filter(pa.compute.equal(pieces["place"], place))
        mine = pa.concat_tables([mine, pa.table(control, pieces.schema)])
        order = [("dataset", "ascending"), ("part", "ascending"), ("number", "ascending")]
        of_targets.append(iter(mine.sort_by(order).combine_chunks().to_batches(max_chunksize=7)))
    return of_targets


@pytest.mark.parametrize("piece_bytes", [100, 10**6])
def test_every_row_comes_to_one_rank_and_lengths_are_those_of_all(
    piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Distribution(0, COLUMNS, PLACES, piece_bytes)
    tables = [table(0, 25), table(25, 0), table(25, 1), table(26, 74)]
    tasks = [
        TaskRows([Travelling(IDENTITY, COLUMNS)], [target], batches)
        for target, batches in enumerate(dealt_out(tables, monkeypatch, job))
    ]
    told = [task.take(tmp_path / str(target))[0] for target, task in enumerate(tasks)]
    handle = pickle.loads(pickle.dumps(UnsharedDataSet(IDENTITY, COLUMNS)))
    seen: list[list[int]] = []
    for task in tasks:
        monkeypatch.setenv(DATA_DIRECTORY, str(task.finish(told)[0]))
        mine = pickle.loads(pickle.dumps(handle))
        assert len(mine) == 100
        kinds = {field.name: str(field.type) for field in mine.schema}
        assert kinds["pair"] == "fixed_size_list<item: float>[2]"
        assert kinds["tags"].startswith("list<")
        batches = list(mine.arrow(batch_size=8, remainder="uneven"))
        seen.append([x for batch in batches for x in batch["x"].to_pylist()])
        assert [t for b in batches for t in b["tags"].to_pylist()] == [
            ["a", str(x)] + ["c"] * (x == 60) for x in seen[-1]
        ]
        assert [p for b in batches for p in b["pair"].to_pylist()] == [[x, -x] for x in seen[-1]]
        assert len(mine.numpy(batch_size=8)) == 4
        assert len(mine.numpy(batch_size=8, remainder="pad")) == 5
        shared = [len(batch["x"]) for batch in mine.numpy(batch_size=33, remainder="split")]
        assert shared == [33, max(1, len(seen[-1]) - 33)]
        padded = [x for batch in mine.numpy(8, remainder="pad", shuffle=True) for x in batch["x"]]
        assert len(padded) == 40
        assert set(padded) == set(seen[-1])
    assert sorted(itertools.chain(*seen)) == list(range(100))
    assert sorted(map(len, seen)) in ([33, 33, 34], [32, 34, 34])
    assert all(mine == sorted(mine) for mine in seen)  # parts and blocks are in their order


def test_a_state_fits_the_same_number_of_ranks_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_targets = dealt_out([table(0, 40)], monkeypatch, Distribution(0, COLUMNS, PLACES, 1000))
    task = TaskRows([Travelling(IDENTITY, COLUMNS)], [0], of_targets[0])
    told = json.dumps([{"rows": 13, "lengths": [[], [[2, 2]], [[2, 3]]]}])
    monkeypatch.setenv(DATA_DIRECTORY, str(task.finish([*task.take(tmp_path), told, told])[0]))
    handle = UnsharedDataSet(IDENTITY, COLUMNS)
    batches = handle.numpy(batch_size=3, shuffle=True, seed=4)
    begun = list(itertools.islice(iter(batches), 2))
    state = batches.state_dict()
    assert state == {"epoch": 0, "position": 6, "ranks": 3}
    again = handle.numpy(batch_size=3, shuffle=True, seed=4)
    again.load_state_dict(state)
    rest = list(again)
    assert len(rest) == 2
    whole = [x for batch in batches for x in batch["x"]]
    assert [x for batch in begun + rest for x in batch["x"]] == whole
    for other in ({**state, "ranks": 4}, {"epoch": 0, "position": 6}):
        with pytest.raises(ArgumentValueError, match="here they are dealt out to 3 ranks"):
            again.load_state_dict(other)
    with (
        data.from_arrow(table(0, 40), tmp_path) as shared,
        pytest.raises(ArgumentValueError, match="of rows that were dealt out to 3 ranks, and"),
    ):
        shared.numpy(batch_size=3).load_state_dict(state)
    with pytest.raises(ArgumentValueError, match=r"rank=0, size=1: .* rows of its own"):
        handle.numpy(batch_size=3, rank=0, size=1)
    with pytest.raises(ArgumentValueError, match="no column 'z'"):
        handle.numpy(batch_size=3, columns=["z"])


def test_what_cannot_be_stored_travels_as_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nulls = table(0, 5).set_column(0, "x", [[0, None, 2, None, 4]])
    of_targets = dealt_out([nulls], monkeypatch, Distribution(0, COLUMNS, PLACES, 1000))
    first, *others = [
        TaskRows([Travelling(IDENTITY, COLUMNS)], [target], batches)
        for target, batches in enumerate(of_targets)
    ]
    with pytest.raises(DataError, match=r"column 'x' has 1 nulls among 2 rows. Say what"):
        first.take(tmp_path / "0")
    for number, task in enumerate(others, 1):
        assert json.loads(task.take(tmp_path / str(number))[0])[0]["rows"] == 0


def test_rows_of_another_task_and_a_full_disk_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_targets = dealt_out([table(0, 9)], monkeypatch, Distribution(0, COLUMNS, PLACES, 1000))
    with pytest.raises(DataError, match=r"the rows of ranks \[1\] to a task whose own are \[0\]"):
        TaskRows([Travelling(IDENTITY, COLUMNS)], [0], of_targets[1]).take(tmp_path)
    tmp_path.joinpath("file").touch()
    with pytest.raises(DataError, match=r"cannot write its ranks' rows to .*file: .*Not a dir"):
        TaskRows([Travelling(IDENTITY, COLUMNS)], [0], of_targets[0]).take(tmp_path / "file")


def test_the_handle_comes_along_with_the_call_and_is_of_no_use_elsewhere() -> None:
    handles = [UnsharedDataSet(name, COLUMNS, source=object()) for name in ("a", "b")]

    def main(valid: Any) -> Any:
        return handles[0], valid

    with payload.attachments() as found:
        call = payload.dump_call(main, {"valid": handles[1]})
    assert list(found.values()) == [handles[1], handles[0]] or list(found.values()) == handles
    function, kwargs = loads(call)
    assert kwargs["valid"].source is None
    payload.dump_call(main, {"valid": None})  # nobody collects: nothing happens
    for use in (lambda: function(**kwargs)[0].numpy(batch_size=1), lambda: len(handles[0])):
        with pytest.raises(DataError, match="only in the run that they travel with"):
            use()
    assert handles[0]
    handles[0].delete()
    with pytest.raises(ArgumentTypeError):
        data.from_dataframe([1], shared=False)


class _Job:
    """A Spark job whose data sets are being computed at first."""

    computing = 3

    def running_tasks(self) -> int:
        return 0

    def computing_tasks(self) -> int:
        return self.computing


def test_the_start_timeout_begins_when_the_data_sets_are_computed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = _Job()
    monkeypatch.setattr(cluster, "spark_job", lambda *_: job)
    monkeypatch.setattr(cluster, "slot_holders", lambda *_: None)
    monkeypatch.setattr(cluster, "FIRST_LOOK_SECONDS", 0)
    console = Console()
    run = cluster.BarrierRun(
        None,
        JobSpec("r1", 2, b"", b""),
        TaskRequest(1, 0, ""),
        console,
        BroughtFiles({}),
        run=GoingRun("r1"),
        results=ResultStore(),
        start_timeout=1000,
        waiting_since=time.monotonic() - 2000,
        data=(UnsharedDataSet(IDENTITY, COLUMNS),),
    )
    run._look_whether_it_starts()
    console.show(0)
    assert "computing the data sets that travel with the run: 3 tasks" in capsys.readouterr().out
    job.computing = 0
    run._look_whether_it_starts()  # has 1000 seconds from now on
    run._start_by -= 1000
    with pytest.raises(StartTimeoutError):
        run._look_whether_it_starts()
