"""Errors of Spark's reach the user with a sentence of ours and the cause in front."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import functions

from horovodrunner import DataError, HorovodRunner, data
from horovodrunner.compat.petastorm.spark import make_spark_converter
from horovodrunner.inference import predict
from tests.waiting import wait_until

pytestmark = pytest.mark.spark


def null_vector(spark: Any, path: Path) -> Any:
    from pyspark.ml.linalg import Vectors, VectorUDT
    from pyspark.sql.types import LongType, StructField, StructType

    schema = StructType([StructField("i", LongType()), StructField("v.w", VectorUDT())])
    rows = [(1, Vectors.dense(1.0, 2.0)), (2, None), (3, Vectors.sparse(4, [1], [2.0]))]
    return spark.createDataFrame(rows, schema)


def failing_udf(spark: Any, path: Path) -> Any:
    def fail(number):  # type: ignore[no-untyped-def]  # PySpark warns of annotations
        raise ValueError(f"the row is\nnot {number}")

    return spark.range(2).select(functions.udf(fail, "long")("id").alias("x"))


def leaving_udf(spark: Any, path: Path) -> Any:
    return spark.range(2).select(functions.udf(lambda _: os._exit(3), "long")("id").alias("x"))


def deleted_files(spark: Any, path: Path) -> Any:
    spark.range(3).write.parquet(str(path / "rows"))
    found = spark.read.parquet(str(path / "rows"))
    shutil.rmtree(path / "rows")
    return found


def sql(text: str) -> Callable[[Any, Path], Any]:
    return lambda spark, _: spark.sql(text)


AFTER = r"\. Any action on it"
FAILING: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "null vector": (null_vector, r"column 'v\.w' has 1 nulls .*dropna\(subset=\['`v\.w`'\]\)"),
    "division": (sql("SELECT 1 / (id - 1) AS x FROM range(3)"), r".*computed: \[DIVIDE_BY_ZERO\]"),
    "constant": (sql("SELECT 2147483647 * 2 AS x"), r".*computed: \[ARITHMETIC_OVERFLOW\]"),
    "cast": (sql("SELECT cast('x' || id AS int) AS x FROM range(2)"), r".*\[CAST_INVALID_INPUT\]"),
    "udf": (failing_udf, r".*computed: ValueError: the row is not \d" + AFTER),
    "crash": (leaving_udf, r".*computed: Python worker exited .*spark\.executor\.pyspark\.memory"),
    "files": (deleted_files, r".*computed: \[FAILED_READ_FILE\.FILE_NOT_EXIST\].*rows/part-"),
}


def count(train: data.DataSet) -> int:
    return len(train)


@pytest.mark.parametrize("what", FAILING)
def test_rows_that_cannot_be_computed(spark: Any, tmp_path: Path, what: str) -> None:
    make, text = FAILING[what]
    frame = make(spark, tmp_path)
    with pytest.raises(DataError, match=f"^{text}") as caught:
        data.from_dataframe(frame, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("what", ["null vector", "udf", "files"])
def test_rows_that_were_to_travel_with_the_run(spark: Any, tmp_path: Path, what: str) -> None:
    make, text = FAILING[what]
    train = data.from_dataframe(make(spark, tmp_path), shared=False)
    with pytest.raises(DataError, match=f"^{text.removesuffix(AFTER)}") as caught:
        HorovodRunner(np=2).run(count, train=train)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_to_be_read(spark: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^df='.*/none' cannot be read .*\[PATH_NOT_FOUND\]"):
        make_spark_converter(str(tmp_path / "none"))


def test_predict_tells_of_what_cannot_be_analyzed(spark: Any, tmp_path: Path) -> None:
    class Broken:
        """What a session of Spark Connect gives: it fails when it is asked, not before."""

        mapInArrow = isStreaming = None  # noqa: N815 -- names of Spark's

        def __getattr__(self, name: str) -> Any:
            return spark.table("not_there")

    with pytest.raises(DataError, match=r"^predict cannot use .*\[TABLE_OR_VIEW_NOT_FOUND\]"):
        predict(
            Broken(),
            lambda: lambda x: x,
            inputs="x",
            return_type="double",
            batch_size=2,
        )


@contextlib.contextmanager
def acting_while_rows_are_stored(spark: Any, act: Callable[[], object]) -> Iterator[Any]:
    """Lend a DataFrame that is never computed; act from another thread when Spark begins to."""
    stages = spark.sparkContext.statusTracker().getActiveStageIds
    wait_until(lambda: not stages())  # of the test before

    def wait_and_act() -> None:
        wait_until(stages)
        act()

    acting = threading.Thread(target=wait_and_act)
    acting.start()
    yield spark.range(2).select(functions.udf(lambda _: time.sleep(600), "long")("id").alias("x"))
    acting.join()


def test_a_cancelled_job_is_told_as_that(spark: Any) -> None:
    cancel = spark.sparkContext.cancelAllJobs
    with acting_while_rows_are_stored(spark, cancel) as df, pytest.raises(DataError) as caught:
        data.from_dataframe(df)
    assert "the Spark job was cancelled" in str(caught.value)
    assert "correct what" not in str(caught.value)
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames == ["test_a_cancelled_job_is_told_as_that", "checked_call"]


def test_an_interrupt_says_that_no_rows_are_kept_and_leaves_the_session_as_it_was(
    spark: Any,
) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    text = "^the rows were being stored: none of them is kept$"
    with (
        acting_while_rows_are_stored(spark, interrupt) as df,
        pytest.raises(KeyboardInterrupt, match=text),
    ):
        data.from_dataframe(df)
    assert [spark.range(n).count() for n in range(20)] == [*range(20)]
    wait_until(lambda: not spark.sparkContext.statusTracker().getActiveStageIds())
