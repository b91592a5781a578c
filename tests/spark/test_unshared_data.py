"""Data sets that travel with the run, on real executors."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from horovodrunner import HorovodRunner, data
from horovodrunner.data.distribution import CONTROL
from horovodrunner.errors import ArgumentValueError, DataError
from horovodrunner.flows.rows.driver import stage_input

pytestmark = pytest.mark.spark

ROWS = 1003
REMAINDERS = ("drop", "pad", "uneven")


def read(train: data.DataSet, valid: data.DataSet, directory: str) -> int:
    """Read an epoch in each way, and write down what this rank saw."""
    found: dict[str, Any] = {"rows": [len(train), len(valid)]}
    for remainder in REMAINDERS:
        batches = list(train.numpy(batch_size=50, shuffle=True, seed=1, remainder=remainder))  # type: ignore[arg-type]
        found[remainder] = [batch["id"].tolist() for batch in batches]
        for batch in batches:
            assert batch["features"].tolist() == [[i, i + 1] for i in batch["id"]]
            assert batch["text"].tolist() == [f"row {i}" for i in batch["id"]]
    checks = list(valid.numpy(batch_size=1, remainder="uneven"))
    found["valid"] = [batch["id"].tolist() for batch in checks]
    found["nulls"] = [bool(batch["grade_is_null"]) for batch in checks if batch["grade"] == -1]
    found["fixed"] = str(train.schema.field("features").type)
    found["files"] = [str(path) for path in Path(train.location).iterdir()]
    Path(directory, os.environ["RANK"]).write_text(json.dumps(found))
    return len(train)


def told(directory: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((directory / str(rank)).read_text()) for rank in range(ranks)]


def frames(spark: Any) -> tuple[Any, Any]:
    train = spark.range(ROWS).selectExpr(
        "id", "array(cast(id AS float), cast(id + 1 AS float)) AS features", "'row ' || id AS text"
    )
    grades = spark.createDataFrame([(0, 1.5), (1, None), (2, 0.5)], "id int, grade double")
    return train, grades


@pytest.mark.parametrize("np", [2, -2])
def test_every_row_comes_to_one_rank_in_equal_steps_and_nothing_stays(
    np: int, spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_frame, grades = frames(spark)
    train = data.from_dataframe(train_frame, shared=False)
    valid = data.from_dataframe(grades, shared=False, nulls={"grade": data.fill_with_indicator(-1)})
    returned = HorovodRunner(np=np).run(read, train=train, valid=valid, directory=str(tmp_path))
    ranks = told(tmp_path, 2)
    assert returned == ROWS
    assert [each["rows"] for each in ranks] == [[ROWS, 3]] * 2
    assert [each["fixed"] for each in ranks] == ["fixed_size_list<item: float>[2]"] * 2
    seen = {
        name: [list(itertools.chain(*each[name])) for each in ranks]
        for name in (*REMAINDERS, "valid")
    }
    assert sorted(seen["uneven"][0] + seen["uneven"][1]) == list(range(ROWS))
    assert ranks[0]["nulls"] + ranks[1]["nulls"] == [True]
    assert sorted(seen["valid"][0] + seen["valid"][1]) == [0, 1, 2]
    assert set(seen["pad"][0] + seen["pad"][1]) == set(range(ROWS))
    assert len(set(seen["drop"][0] + seen["drop"][1])) == 1000
    assert [len(each["pad"]) for each in ranks] == [11, 11]
    assert [len(each["drop"]) for each in ranks] == [10, 10]
    if np > 0:
        assert all(set(seen["pad"][rank]) == set(seen["uneven"][rank]) for rank in (0, 1))
    assert "1,003 rows" in capsys.readouterr().out
    assert not any(Path(path).exists() for each in ranks for path in each["files"])


def test_each_partition_of_the_stage_has_just_its_rows_even_if_there_are_none(spark: Any) -> None:
    train, _ = frames(spark)
    handles = [
        data.from_dataframe(each, shared=False)
        for each in (train.where("id < 3"), train.limit(0), train.repartition(5))
    ]

    def count(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        rows, targets = [0, 0, 0], []
        for piece in itertools.chain.from_iterable(batch.to_pylist() for batch in batches):
            if piece["dataset"] != CONTROL:
                rows[piece["dataset"]] += piece["rows"]
            elif b"target" in piece["data"]:
                targets.append(json.loads(piece["data"])["target"])
        context = TaskContext.get()
        assert context is not None
        found = json.dumps([context.partitionId(), targets, rows])
        yield pa.RecordBatch.from_pydict({"found": [found]})

    for chosen, total in ((handles, [3, 0, ROWS]), (handles[1:2], [0, 0, 0])):
        rows = stage_input(spark, [1] * 7, chosen).mapInArrow(count, "found string").collect()  # type: ignore[arg-type]
        found = sorted(json.loads(row["found"]) for row in rows)
        assert [each[:2] for each in found] == [[target, [target]] for target in range(7)]
        assert [sum(each[2][number] for each in found) for number in range(3)] == total


def never(train: data.DataSet) -> None:
    raise AssertionError("main was called")


def test_what_the_rows_lack_ends_the_run_before_main(spark: Any) -> None:
    frame, _ = frames(spark)
    with_nulls = frame.selectExpr("nullif(id, 700) AS id", "text")
    with pytest.raises(DataError, match=r"^column 'id' has 1 nulls among \d+ rows. Say what"):
        HorovodRunner(np=2).run(never, train=data.from_dataframe(with_nulls, shared=False))


def test_a_dataframe_that_cannot_be_computed_is_told_with_its_cause(spark: Any) -> None:
    def fail(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield from batches
        raise ValueError("row 12 is not a picture")

    failing = data.from_dataframe(spark.range(20).mapInArrow(fail, "id long"), shared=False)
    with pytest.raises(DataError) as caught:
        HorovodRunner(np=2).run(never, train=failing)
    assert str(caught.value).endswith("computed: ValueError: row 12 is not a picture")
    assert "mapInArrow" in str(caught.value.__cause__) or "Traceback" in str(caught.value.__cause__)


def test_what_cannot_go_together_is_refused_at_once(spark: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentValueError, match=r"cache_dir='.*': with shared=False nothing"):
        data.from_dataframe(spark.range(2), tmp_path, shared=False)
    with pytest.raises(DataError, match="HorovodRunner"):
        data.from_dataframe(spark.range(2), shared=False).numpy(batch_size=1)
