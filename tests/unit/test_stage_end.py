"""Spark's own words about the end of a stage: texts of PySpark 3.5 and 4.1, shortened."""

from __future__ import annotations

import pytest

from horovodrunner.processes.driver.stage_end import data_problem, stage_end

BARRIER = (
    "An error occurred while calling o65.getResult.\n"
    ": org.apache.spark.SparkException: Exception thrown in awaitResult: \n"
    "\tat org.apache.spark.util.SparkThreadUtils$.awaitResult(SparkThreadUtils.scala:53)\n"
    "Caused by: org.apache.spark.SparkException: Job aborted due to stage failure: Could not "
    "recover from a failed barrier ResultStage. Most recent failure reason: Stage failed because "
    "barrier task ResultTask(0, 1) finished unsuccessfully.\n"
)
AFTERWARDS = "\n\tat org.apache.spark.api.python.BasePythonRunner.compute(PythonRunner.scala:309)\n"
TRACEBACK = (
    "org.apache.spark.api.python.PythonException: Traceback (most recent call last):\n"
    '  File "/opt/spark/python/lib/pyspark.zip/pyspark/worker.py", line 3305, in main\n'
    "    check_python_version(infile)\n"
)
PLACEMENT = [(0, 0, "node-3"), (1, 1, "node-7")]


@pytest.mark.parametrize(
    "said",
    [
        "[PYTHON_VERSION_MISMATCH] Python in worker has different version (3, 12) than that in "
        "driver 3.11, PySpark cannot run with different minor versions.\nPlease check environment "
        "variables PYSPARK_PYTHON and PYSPARK_DRIVER_PYTHON are correctly set.\n",
        "[PYTHON_VERSION_MISMATCH] Python in worker has different version: 3.12 than that in "
        "driver: 3.11, PySpark cannot run with different minor versions.\nPlease check environment "
        "variables PYSPARK_PYTHON and PYSPARK_DRIVER_PYTHON are correctly set.\n",
    ],
    ids=["3.5", "4.1"],
)
def test_another_minor_version_of_python_is_named_on_both_sides(said: str) -> None:
    error = "pyspark.errors.exceptions.base.PySparkRuntimeError: " + said
    end = stage_end(Exception(BARRIER + TRACEBACK + error + AFTERWARDS), [])
    assert end.text == (
        "the executors run Python 3.12 and the driver runs Python 3.11, and PySpark needs the same "
        "minor version on both: let PYSPARK_PYTHON (for spark-submit also spark.pyspark.python) "
        "name a Python 3.11 of the executors, or start the driver with Python 3.12"
    )
    assert not end.task_was_lost


def test_a_python_that_is_not_there_is_named() -> None:
    said = (
        'java.io.IOException: Cannot run program "./environment/bin/python": error=2, No such file '
        "or directory"
    )
    end = stage_end(Exception(BARRIER + said + AFTERWARDS), [])
    assert end.text.startswith(
        'an executor cannot start its Python: Cannot run program "./environment/bin/python": '
        "error=2, No such file or directory. PYSPARK_PYTHON"
    )
    assert not end.task_was_lost


def test_a_machine_that_cannot_start_any_process_may_recover() -> None:
    said = 'java.io.IOException: Cannot run program "python3": error=12, Cannot allocate memory'
    end = stage_end(Exception(BARRIER + said + AFTERWARDS), PLACEMENT)
    assert said in end.text
    assert end.task_was_lost


def test_a_python_that_pyspark_does_not_support_is_named() -> None:
    said = (
        "org.apache.spark.SparkException: \nError from python worker:\n"
        "  Traceback (most recent call last):\n"
        '    File "/opt/spark/python/lib/pyspark.zip/pyspark/sql/types.py", line 559, in Geo\n'
        "  TypeError: unsupported operand type(s) for |: 'type' and 'type'\n"
        "PYTHONPATH was:\n  /opt/spark/python/lib/pyspark.zip\n"
        "org.apache.spark.SparkException: EOFException occurred while reading the port number"
    )
    end = stage_end(Exception(BARRIER + said + AFTERWARDS), [])
    assert "unsupported operand type(s) for |: 'type' and 'type'. It may be too old" in end.text
    assert not end.task_was_lost


def test_a_missing_package_is_named() -> None:
    error = "ModuleNotFoundError: No module named 'pyarrow'\n"
    end = stage_end(Exception(BARRIER + TRACEBACK + error + AFTERWARDS), [])
    assert "ModuleNotFoundError: No module named 'pyarrow': it lacks the package" in end.text
    assert not end.task_was_lost


def test_another_release_that_lacks_what_the_driver_sends_is_named() -> None:
    error = (
        "AttributeError: Can't get attribute 'barrier_task' on <module "
        "'horovodrunner.processes.task.barrier' from '/opt/env/horovodrunner/barrier.py'>\n"
    )
    end = stage_end(Exception(BARRIER + TRACEBACK + error + AFTERWARDS), [])
    assert "another release of horovodrunner" in end.text
    assert not end.task_was_lost


def test_an_error_of_the_task_itself_is_the_reason_it_was_lost() -> None:
    end = stage_end(Exception(BARRIER + TRACEBACK + "MemoryError: no room" + AFTERWARDS), PLACEMENT)
    assert "Spark lost a task of the run, which ran rank 1 on node-7" in end.text
    assert "finished unsuccessfully. MemoryError: no room The executor's log" in end.text
    assert end.task_was_lost


def test_a_lost_executor_is_named_with_its_ranks() -> None:
    said = (
        "ExecutorLostFailure (executor 1 exited caused by one of the running tasks) Reason: "
        "Command exited with code 137"
    )
    end = stage_end(Exception(BARRIER + said + AFTERWARDS), PLACEMENT)
    assert end.text.startswith("Spark lost executor 1, which ran rank 1 on node-7, and so")
    assert end.task_was_lost


def test_a_cancelled_job_is_named() -> None:
    said = "org.apache.spark.SparkException: Job 3 cancelled killed via the Web UI"
    end = stage_end(Exception(said + AFTERWARDS), PLACEMENT)
    assert end.text == "the run's Spark job was cancelled: Job 3 cancelled killed via the Web UI"
    assert end.was_cancelled
    assert not end.task_was_lost


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (BARRIER, ""),
        ("[OPERATION_CANCELED] Operation has been canceled. SQLSTATE: HY008", ""),
        (TRACEBACK + "ModuleNotFoundError: No module named 'pyarrow'" + AFTERWARDS, ""),
        (
            "Job aborted due to stage failure: Task 0 in stage 3.0 failed 4 times\n"
            + TRACEBACK
            + "PIL.UnidentifiedImageError: cannot identify image file 'a.png'"
            + AFTERWARDS,
            "PIL.UnidentifiedImageError: cannot identify image file 'a.png'",
        ),
        (
            "[DIVIDE_BY_ZERO] Division by zero. SQLSTATE: 22012\n== SQL (line 1) ==\n1/(id-1)",
            "[DIVIDE_BY_ZERO] Division by zero. SQLSTATE: 22012",
        ),
    ],
)
def test_why_rows_could_not_be_computed_is_pulled_out(said: str, cause: str) -> None:
    assert data_problem(RuntimeError(said)) == cause
