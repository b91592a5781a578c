"""Masters other than local-cluster, and no session at all: each driver is a process of its own."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import processes
from tests.spark.standalone import standalone

pytestmark = [pytest.mark.spark, pytest.mark.timeout(500)]

TRAIN = """
import os
from horovodrunner import HorovodRunner

def helper(rank):
    return f"rank {rank} of {os.environ['WORLD_SIZE']}"

def train(prefix):
    print("training")
    return prefix + helper(os.environ["RANK"])
"""

QUIET = """
from pyspark.sql import SparkSession
builder = (
    SparkSession.builder
    .config("spark.ui.enabled", "false")
    .config("spark.ui.showConsoleProgress", "false")
    .config("spark.log.level", "ERROR")
)
"""


def drive(script: str, tmp_path: Path, **environment: str) -> str:
    """Run a script as a driver; return what it printed, after it has ended well."""
    path = tmp_path / "driver.py"
    path.write_text(TRAIN + QUIET + textwrap.dedent(script))
    done = processes.run(
        [sys.executable, str(path)],
        capture_output=True,
        env={**os.environ, **environment},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_a_session_one_is_created_that_uses_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYSPARK_PYTHON")
    script = """
        HorovodRunner(np=1).run(train, prefix="")
        print(HorovodRunner(np=2, driver_log_verbosity="all").run(train, prefix="I am "))
        SparkSession.getActiveSession().stop()
    """
    first, second, *shown = drive(script, tmp_path, PATH="/usr/bin:/bin").splitlines()
    assert first == "HorovodRunner: there is no SparkSession yet: creating one"
    assert "so is all output of the ranks, on standard error" in second
    assert shown[-1] == "I am rank 0 of 2"
    assert {"[0]<stdout>:training", "[1]<stdout>:training"} <= set(shown)


@pytest.fixture(scope="module")
def of_local_threads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one driver shows of three sessions, one after the other."""
    directory = tmp_path_factory.mktemp("threads")
    bare = directory / "bare"
    processes.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    script = f"""
        from horovodrunner import (
            BarrierStageError, ClusterCapacityError, ConfigurationError, WorkerFailedError
        )
        spark = builder.master("local[2]").getOrCreate()
        print(HorovodRunner(np=2).run(train, prefix=""))
        print(HorovodRunner(np=1).run(train, prefix=""))
        try:
            HorovodRunner(np=3).run(train, prefix="")
        except ClusterCapacityError as error:
            print(error)
        try:
            HorovodRunner(np=2).run(lambda: 1 / 0)
        except WorkerFailedError as error:
            print(repr(error.__cause__))
        try:
            HorovodRunner(np=2, resources={{"cpus": 2}}).run(train, prefix="")
        except ConfigurationError as error:
            print(error)
        print(spark.range(5).count())
        spark.stop()

        print("SECTION another python")
        os.environ["PYSPARK_PYTHON"] = "{bare / "bin/python"}"
        spark = builder.master("local[2]").getOrCreate()
        try:
            HorovodRunner(np=2).run(train, prefix="")
        except BarrierStageError as error:
            print(error)
        spark.stop()

        print("SECTION dynamic allocation")
        spark = builder.master("local[2]").config("spark.dynamicAllocation.enabled", "true")
        spark = spark.config("spark.dynamicAllocation.shuffleTracking.enabled", "true")
        spark = spark.getOrCreate()
        try:
            HorovodRunner(np=2).run(train, prefix="")
        except ConfigurationError as error:
            print(error)
        spark.stop()
    """
    first, *others = drive(script, directory, PYSPARK_PYTHON=sys.executable).split("SECTION ")
    named = [section.partition("\n") for section in others]
    return {"plain": first, **{name: text for name, _, text in named}}


def test_local_threads_behave_like_a_cluster(of_local_threads: dict[str, str]) -> None:
    shown = of_local_threads["plain"]
    assert "rank 0 of 2\n" in shown
    assert "rank 0 of 1\n" in shown
    assert "np=3 needs 3 task slots, and the cluster has 2 (local[2]; " in shown
    assert "1 executor with 2 cores: 2 slots; " in shown
    assert "ZeroDivisionError('division by zero')" in shown
    assert "resources={'cpus': 2} asks for other resources than the session's" in shown
    assert "start the session with spark.task.cpus=2\n" in shown
    assert shown.endswith("\n5\n")
    assert shown.count("so is all output of the ranks, on standard error") == 5
    assert "only log_to_driver messages" not in shown


def test_dynamic_allocation_is_refused_before_launch(of_local_threads: dict[str, str]) -> None:
    shown = of_local_threads["dynamic allocation"]
    assert "spark.dynamicAllocation.enabled=false" in shown


def test_an_executor_python_without_the_package_is_named(
    of_local_threads: dict[str, str],
) -> None:
    shown = of_local_threads["another python"]
    assert "ModuleNotFoundError" in shown
    assert "PYSPARK_PYTHON" in shown


@pytest.fixture
def standalone_master(tmp_path: Path) -> Iterator[str]:
    with standalone(tmp_path, os.environ) as url:
        yield url


def test_a_standalone_cluster_without_any_slot_and_with_two_executors(
    standalone_master: str, tmp_path: Path
) -> None:
    """The worker has two cores, so that no executor of four ever starts."""
    script = f"""
        import warnings
        from horovodrunner import ClusterCapacityError, WorkerFailedError
        from horovodrunner.processes.driver import slots
        quiet_seconds, slots.QUIET_SECONDS = slots.QUIET_SECONDS, 1.0
        warnings.simplefilter("ignore", DeprecationWarning)
        builder = builder.master("{standalone_master}")
        spark = builder.config("spark.executor.cores", "4").getOrCreate()
        for np in (0, 1):
            try:
                HorovodRunner(np=np).run(train, prefix="")
            except ClusterCapacityError as error:
                print(error)
        spark.stop()

        slots.QUIET_SECONDS = quiet_seconds
        spark = (
            builder.config("spark.executor.cores", "1")
            .config("spark.executor.memory", "512m")
            .getOrCreate()
        )
        print(HorovodRunner(np=2, driver_log_verbosity="all").run(train, prefix=""))
        try:
            HorovodRunner(np=2).run(lambda: 1 / 0)
        except WorkerFailedError as error:
            print(repr(error.__cause__))
        spark.stop()
    """
    shown = drive(script, tmp_path)
    assert "np=0 (all slots) needs at least 1 task slot, and the cluster has 0 (spark://" in shown
    assert "spark.executor.cores=4; a task takes" in shown
    assert "np=1 needs 1 task slot, and" in shown
    assert "rank 0 of 2\n" in shown
    assert "[1]<stdout>:training" in shown
    assert "ZeroDivisionError" in shown


def test_executors_that_end_before_they_register_are_told_with_their_last_words(
    tmp_path: Path,
) -> None:
    script = """
        from horovodrunner import StartTimeoutError
        from horovodrunner.processes.driver import slots
        slots.NOTE_SECONDS = 1.0
        builder = builder.config("spark.executor.extraJavaOptions", "-javaagent:/nope.jar")
        spark = builder.master("local-cluster[1,1,1024]").getOrCreate()
        try:
            HorovodRunner(np=1, start_timeout=10).run(train, prefix="")
        except StartTimeoutError as error:
            print(error)
        spark.stop()
    """
    shown = drive(script, tmp_path)
    ended = r"\d+ executors? ha(s|ve) ended, the last one with: .*/nope.jar; .* why: work/app"
    assert re.search(rf"waiting for 1 slots, 0 have registered so far; {ended}", shown)
    assert re.search(rf"after 10 s there are 0: {ended}.* raise start_timeout", shown)
