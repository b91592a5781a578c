"""Masters other than local-cluster, and no session at all: a driver is a process of its own."""

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

HEAD = """
    import os, sys, threading, time, warnings
    from contextlib import contextmanager

    from pyspark.sql import SparkSession

    from horovodrunner import HorovodRunner, HorovodRunnerError
    from horovodrunner.processes.driver import queue, slots

    warnings.simplefilter("ignore", DeprecationWarning)

    def helper(rank):
        return f"rank {rank} of {os.environ['WORLD_SIZE']}"

    def train():
        print("training")
        return "I am " + helper(os.environ["RANK"])

    @contextmanager
    def session(master, **settings):
        quiet = {"ui_enabled": "false", "ui_showConsoleProgress": "false", "log_level": "ERROR"}
        builder = SparkSession.builder.master(master)
        for name, value in {**quiet, **settings}.items():
            builder = builder.config("spark." + name.replace("_", "."), value)
        spark = builder.getOrCreate()
        yield spark
        spark.stop()

    def attempt(np, main=train, **options):
        try:
            print(HorovodRunner(np=np, **options).run(main))
        except HorovodRunnerError as error:
            print(error, repr(error.__cause__))
"""


def drive(script: str, directory: Path, **environment: str) -> str:
    """Run a script as a driver; return what it printed, after it has ended well."""
    path = directory / "driver.py"
    path.write_text(textwrap.dedent(HEAD) + textwrap.dedent(script))
    done = processes.run(
        [sys.executable, str(path)],
        capture_output=True,
        env={**os.environ, **environment},
        cwd=directory,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one driver shows of its sessions, one after the other in one JVM."""
    directory = tmp_path_factory.mktemp("sessions")
    bare = directory / "bare"
    processes.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    script = f"""
        print("SECTION no session")
        os.environ.pop("PYSPARK_PYTHON", None)
        attempt(1)
        attempt(2, driver_log_verbosity="all")
        SparkSession.getActiveSession().stop()

        print("SECTION threads")
        os.environ["PYSPARK_PYTHON"] = sys.executable
        with session("local[2]") as spark:
            for np in (2, 1, 3):
                attempt(np)
            attempt(2, lambda: 1 / 0)
            attempt(2, resources={{"cpus": 2}})
            print(spark.range(5).count(), "rows")

        print("SECTION an end")
        with session("local[1]"):
            runs = [
                threading.Thread(target=attempt, args=(1, main), kwargs={{"name": name}})
                for name, main in (("first", lambda: time.sleep(60)), ("second", train))
            ]
            for run in runs:
                run.start()
                while not (line := sum(queue._queues.values(), [])) or not line[0].has_started:
                    time.sleep(0.02)
            while len(sum(queue._queues.values(), [])) < 2:
                time.sleep(0.02)
        for run in runs:
            run.join()

        print("SECTION another python")
        os.environ["PYSPARK_PYTHON"] = "{bare / "bin/python"}"
        with session("local[2]"):
            attempt(2)

        print("SECTION large executors")
        os.environ["PYSPARK_PYTHON"] = sys.executable
        with session("local-cluster[1,2,1024]", executor_cores="4"):
            for np in (0, 1):
                attempt(np)

        print("SECTION executors that end")
        slots.NOTE_SECONDS = 1.0
        agent = {{"executor_extraJavaOptions": "-javaagent:/nope.jar"}}
        with session("local-cluster[1,1,1024]", **agent):
            attempt(1, start_timeout=15)

        print("SECTION dynamic allocation")
        tracking = {{"dynamicAllocation_shuffleTracking_enabled": "true"}}
        with session("local[2]", dynamicAllocation_enabled="true", **tracking):
            attempt(2)
    """
    shown = drive(script, directory, PATH="/usr/bin:/bin").split("SECTION ")
    return {name: text for name, _, text in (section.partition("\n") for section in shown)}


def test_without_a_session_one_is_created_that_uses_this_python(sections: dict[str, str]) -> None:
    first, second, *shown = sections["no session"].splitlines()
    assert first == "HorovodRunner: there is no SparkSession yet: creating one"
    assert "so is all output of the ranks, on standard error" in second
    assert shown[-1] == "I am rank 0 of 2"
    assert {"[0]<stdout>:training", "[1]<stdout>:training"} <= set(shown)


def test_local_threads_behave_like_a_cluster(sections: dict[str, str]) -> None:
    shown = sections["threads"]
    assert "rank 0 of 2\n" in shown
    assert "rank 0 of 1\n" in shown
    assert "np=3 needs 3 task slots, and the cluster has 2 (local[2]; " in shown
    assert "1 executor with 2 cores: 2 slots; " in shown
    assert "ZeroDivisionError('division by zero')" in shown
    assert "resources={'cpus': 2} asks for other resources than the session's" in shown
    assert "start the session with spark.task.cpus=2 " in shown
    assert shown.endswith("\n5 rows\n")
    assert shown.count("so is all output of the ranks, on standard error") == 5
    assert "only log_to_driver messages" not in shown


def test_runs_end_with_their_session_also_in_the_line(sections: dict[str, str]) -> None:
    shown = sections["an end"]
    assert "the Spark session was stopped while the run was going on: start the run again" in shown
    assert "the Spark session was stopped while the run waited for its slots: start" in shown


def test_dynamic_allocation_is_refused_before_launch(sections: dict[str, str]) -> None:
    assert "spark.dynamicAllocation.enabled=false" in sections["dynamic allocation"]


def test_an_executor_python_without_the_package_is_named(sections: dict[str, str]) -> None:
    shown = sections["another python"]
    assert "ModuleNotFoundError" in shown
    assert "PYSPARK_PYTHON" in shown


def test_a_cluster_without_any_slot_is_told_with_what_an_executor_asks_for(
    sections: dict[str, str],
) -> None:
    """The worker has two cores, so that no executor of four ever starts."""
    shown = sections["large executors"]
    assert "np=0 (all slots) needs at least 1 task slot, and the cluster has 0 (local-" in shown
    assert "spark.executor.cores=4; a task takes" in shown
    assert "np=1 needs 1 task slot, and" in shown


def test_executors_that_end_before_they_register_are_told_with_their_last_words(
    sections: dict[str, str],
) -> None:
    shown = sections["executors that end"]
    ended = r"\d+ executors? ha(s|ve) ended, the last one with: .*/nope.jar; .* why: work/app"
    assert re.search(rf"waiting for 1 slots, 0 have registered so far; {ended}", shown)
    assert re.search(rf"after 15 s there are 0: {ended}.* raise start_timeout", shown)


@pytest.fixture
def standalone_master(tmp_path: Path) -> Iterator[str]:
    with standalone(tmp_path, os.environ) as url:
        yield url


@pytest.mark.slow
def test_a_standalone_cluster_without_any_slot_and_with_two_executors(
    standalone_master: str, tmp_path: Path
) -> None:
    script = f"""
        quiet_seconds, slots.QUIET_SECONDS = slots.QUIET_SECONDS, 1.0
        with session("{standalone_master}", executor_cores="4"):
            for np in (0, 1):
                attempt(np)
        slots.QUIET_SECONDS = quiet_seconds
        with session("{standalone_master}", executor_cores="1", executor_memory="512m"):
            attempt(2, driver_log_verbosity="all")
            attempt(2, lambda: 1 / 0)
    """
    shown = drive(script, tmp_path)
    assert "np=0 (all slots) needs at least 1 task slot, and the cluster has 0 (spark://" in shown
    assert "spark.executor.cores=4; a task takes" in shown
    assert "np=1 needs 1 task slot, and" in shown
    assert "rank 0 of 2\n" in shown
    assert "[1]<stdout>:training" in shown
    assert "ZeroDivisionError" in shown
