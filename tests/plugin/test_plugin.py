"""What the plugin does to suites that use it, and to those that do not."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.plugin.conftest import Suite, outcomes

TRAIN = """
import os, sys
import numpy as np
import pytest
from horovodrunner import WorkerFailedError, checkpoint, log_to_driver, metrics
from horovodrunner.testing import *

def train(steps=5, scale=1.0):
    latest = checkpoint.latest()
    start = 0 if latest is None else latest.step + 1
    weights = np.zeros(4) if latest is None else np.load(latest / "weights.npy")
    for step in range(start, steps):
        metrics.report(step=step, loss=1.0 / (step + 1))
        weights = weights * 0.5 + step * scale
        with checkpoint.save(step=step) as directory:
            np.save(directory / "weights.npy", weights)
    print(f"rank {os.environ['RANK']} from {start}")
    return weights
"""


def test_a_suite_that_does_not_use_it_imports_nothing_of_it(suite: Suite) -> None:
    done = suite("""
import sys

def test_it():
    ours = {name for name in sys.modules if name.startswith("horovodrunner.")}
    assert ours <= {
        f"horovodrunner.{name}" for name in ("errors", "testing", "testing.plugin")
    }
    for heavy in ("numpy", "pyspark", "psutil", "cloudpickle", "torch", "horovod"):
        assert heavy not in sys.modules
""")
    assert outcomes(done) == {"passed": 1}, done.stdout


def test_ranks_faults_and_comparisons(suite: Suite) -> None:
    done = suite(
        TRAIN
        + """
def test_all_ranks_have_the_same(run_ranks):
    assert_same_weights(run_ranks(3)(train))

def test_a_killed_rank_is_told(horovod_runner, faults, checkpoint_dir):
    faults.kill(rank=1, at_step=3)
    with pytest.raises(WorkerFailedError, match="rank 1 .*SIGKILL"):
        horovod_runner(checkpoint_dir=checkpoint_dir).run(train)

def test_what_is_raised_is_the_cause(run_ranks, faults):
    faults.raise_in(0, ValueError("no luck"), at_step=2)
    with pytest.raises(WorkerFailedError) as caught:
        run_ranks(2)(train)
    assert isinstance(caught.value.__cause__, ValueError)

def test_nothing_of_it_is_left_for_the_next_test(run_ranks):
    assert "HOROVODRUNNER_FAULTS" not in os.environ
    assert len(run_ranks(2)(train)) == 2

def test_a_slow_rank(horovod_runner, faults):
    faults.slow(rank=1, seconds_per_step=0.05)
    runner = horovod_runner()
    runner.run(train)
    assert runner.history.last is not None

def test_files_cannot_grow(horovod_runner, faults, checkpoint_dir):
    faults.fill_disk(rank=0, at_step=2)
    runner = horovod_runner(checkpoint_dir=checkpoint_dir)
    with pytest.raises(WorkerFailedError, match="File too large"):
        runner.run(train)
    assert [each.step for each in runner.checkpoints][:1] == [0]

def test_a_later_attempt_and_each(horovod_runner, faults, checkpoint_dir):
    faults.kill(rank=0, at_step=1)
    faults.kill(rank=1, at_step=2, attempt=2)
    horovod_runner(checkpoint_dir=checkpoint_dir, max_restarts=2).run(train)
    faults.kill(rank=1, at_step=0, attempt=0)
    with pytest.raises(WorkerFailedError) as caught:
        horovod_runner(max_restarts=1).run(train)
    assert len(caught.value.attempts) == 2

def test_it_resumes():
    assert_resumes(train, at_step=3, rank=1)
""",
    )
    assert outcomes(done) == {"passed": 8}, done.stdout


def test_comparisons_that_fail_say_what_differs(suite: Suite) -> None:
    done = suite(
        TRAIN
        + """
def differs(epochs=1):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return {"layer": {"w": np.full(3, 1.0 + rank), "b": np.zeros(2)}}

def wrong_alone():
    return np.full(2, float(os.environ["WORLD_SIZE"]), "float32")

def forgets(steps=4):
    latest = checkpoint.latest()
    for step in range(0 if latest is None else latest.step + 1, steps):
        with checkpoint.save(step=step) as directory:
            (directory / "f").write_text("x")
    return np.arange(2.0) + (0 if latest is None else 1)

def test_ranks(run_ranks):
    assert_same_weights(run_ranks(2)(differs))

def test_single():
    assert_equal_to_single_process(wrong_alone)

def test_resumes():
    assert_resumes(forgets, at_step=2)

def test_never_there():
    assert_resumes(train, at_step=100)
""",
    )
    assert outcomes(done) == {"failed": 4}, done.stdout
    said = re.sub(r"\s+", " ", done.stdout)
    assert "rank 1 and rank 0 have different weights. Do they begin with the same ones" in said
    assert "layer.w: 3 of 3 numbers differ, by 1 at most" in said
    assert "2 ranks do not train to what one process does" in said
    assert "ends with other weights than an undisturbed one" in said
    assert "never got to step 100" in said


def test_a_failing_run_shows_all_ranks_and_a_passing_one_nothing(suite: Suite) -> None:
    done = suite(
        TRAIN
        + """
def fails():
    print("I am rank", os.environ["RANK"])
    raise ValueError("no luck")

def test_fails(horovod_runner):
    horovod_runner().run(fails)

def test_passes(horovod_runner):
    horovod_runner().run(train)
"""
    )
    assert outcomes(done) == {"passed": 1, "failed": 1}
    assert re.search(r"\[[01]\]<stdout>:I am rank [01]", done.stdout)
    assert "from 0" not in done.stdout


LEAKING = """
import os, subprocess, sys, tempfile, threading, pytest
from horovodrunner.testing import leaks

leaks.LEAVING_SECONDS = 0.5  # what a test leaves here would stay for ever

def test_process():
    global child
    child = subprocess.Popen(["sleep", "600"])

def test_process_is_gone():
    assert child.wait() == -9

def test_file():
    tempfile.mkdtemp(prefix="horovodrunner-left-")

def test_port():
    import socket
    global listening
    listening = socket.create_server(("127.0.0.1", 0))

def test_nothing(horovod_runner):
    horovod_runner(np=-1).run(os.getpid)

def serve():
    subprocess.Popen(["sleep", "600"], start_new_session=True)

def test_server_of_a_rank(horovod_runner):
    horovod_runner(np=-1).run(serve)

def test_daemon():
    subprocess.run(["setsid", "--fork", "sleep", "600"], check=True)

def test_other_sessions_have_files_there():
    code = "import tempfile; tempfile.mkdtemp(prefix='horovodrunner-theirs-')"
    subprocess.run([sys.executable, "-c", code], check=True)

def test_fixtures_clean_up(request, faults):
    child = subprocess.Popen(["sleep", "600"])
    request.addfinalizer(lambda: (child.kill(), child.wait()))
    faults.cut_driver()

def test_fails_for_another_reason(request):
    if request.config.getoption("horovodrunner_leaks"):
        tempfile.mkdtemp(prefix="horovodrunner-late-")
        raise ValueError("its own reason")
"""


def test_leaks_fail_where_that_is_wanted(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("theirs")))
    quiet = LEAKING.replace('"600"', '"0.1"').replace("== -9", "in (0, -9)")
    assert outcomes(suite(quiet, "-W", "ignore")) == {"passed": 10}
    done = suite(LEAKING, "--horovodrunner-leaks", "-W", "ignore")
    assert outcomes(done) == {"passed": 9, "failed": 1, "errors": 6}, done.stdout
    assert "ValueError: its own reason" in done.stdout
    assert "horovodrunner-late-" in done.stdout
    assert len(re.findall("^left behind: process", done.stdout, re.MULTILINE)) == 3
    for what in ("left behind: file", "left behind: port"):
        assert what in done.stdout


def test_it_works_beside_xdist_and_a_timeout(suite: Suite) -> None:
    done = suite(
        TRAIN
        + """
@pytest.mark.parametrize("rank", [0, 1])
def test_kill(rank, run_ranks, faults):
    faults.kill(rank, at_step=1)
    with pytest.raises(WorkerFailedError, match=f"rank {rank} .*SIGKILL"):
        run_ranks(2)(train)

def test_slow(run_ranks, faults):
    faults.slow(1, 600)
    run_ranks(2)(train)
""",
        *("-n", "2", "--timeout", "20", "--horovodrunner-leaks"),
    )
    assert outcomes(done) == {"passed": 2, "failed": 1}, done.stdout
    assert "Timeout" in done.stdout
    assert "left behind" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packages", "ini"),
    [
        (("pytest==8.0.2", "pytest-asyncio<0.24"), ""),
        (("pytest>=9", "pytest-asyncio>=1"), "asyncio_default_fixture_loop_scope = function\n"),
    ],
)
def test_it_works_with_these_versions(
    packages: tuple[str, ...],
    ini: str,
    suite: Suite,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(directory)]
    processes.run([*pip, *packages], check=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(directory), *sys.path]))
    done = suite(
        TRAIN
        + """
import asyncio

@pytest.mark.asyncio
async def test_in_a_loop(horovod_runner):
    assert (await asyncio.to_thread(horovod_runner().run, train)).shape == (4,)
    assert horovod_runner().run(train).shape == (4,)

def test_resumes():
    assert_resumes(train, at_step=2)
""",
        ini=ini,
    )
    assert outcomes(done) == {"passed": 2}, done.stdout


def test_a_cluster_may_have_a_wider_scope(suite: Suite) -> None:
    text = """
import pytest
from horovodrunner.testing.clusters import Clusters

Clusters.session = lambda self, shape: shape  # no JVM is needed to see who may ask for one

@pytest.fixture(scope="module")
def table(spark_cluster):
    return spark_cluster.executors

def test_it(table):
    assert table == 3
"""
    count = "spark_cluster_executors = 3\n"
    assert outcomes(suite(text, ini=count)) == {"error": 1}
    done = suite(text, ini=f"{count}spark_cluster_scope = session\n")
    assert outcomes(done) == {"passed": 1}, done.stdout
    done = suite(text, ini="spark_cluster_scope = suite\n")
    assert "spark_cluster_scope = suite: it is one of function, class" in done.stdout + done.stderr


def test_markers_and_options_are_told_and_checked(suite: Suite) -> None:
    help_text = processes.run(
        [sys.executable, "-m", "pytest", "--help", "-p", "horovodrunner.testing.plugin"],
        capture_output=True,
    ).stdout
    assert "--horovodrunner-leaks" in help_text
    done = suite(
        """
import pytest

@pytest.mark.spark_cluster(executor=2)
def test_name(spark_cluster): ...

@pytest.mark.spark_cluster(2)
def test_place(spark_cluster): ...

@pytest.mark.spark_cluster(cores=0)
def test_number(spark_cluster): ...
"""
    )
    assert outcomes(done) == {"errors": 3}, done.stdout
    said = re.sub(r"\s+", " ", done.stdout)
    assert "spark_cluster(executor=...): it takes executors, cores" in said
    assert "give names, spark_cluster(executors=2, cores=1)" in said
    assert "cores=0" in said


def test_faults_that_cannot_happen_are_refused(suite: Suite) -> None:
    done = suite(
        TRAIN
        + """
from horovodrunner import ArgumentTypeError, ArgumentValueError, ConfigurationError

class Odd(Exception):
    def __init__(self, what, why):
        super().__init__(what)

def test_an_exception_that_cannot_travel(faults):
    with pytest.raises(ArgumentTypeError, match="cannot travel to the rank .TypeError"):
        faults.raise_in(1, Odd("a", "b"))
    with pytest.raises(ArgumentValueError, match="faults have 2.* characters"):
        faults.raise_in(1, ValueError("x" * 100_000))
    with pytest.raises(ArgumentValueError, match="seconds_per_step=inf"):
        faults.slow(1, float("inf"))
    assert "HOROVODRUNNER_FAULTS" not in os.environ

def test_only_within_a_block():
    with Faults() as faults:
        pass
    for each in Faults(), faults:
        with pytest.raises(ConfigurationError, match="within a block"):
            each.kill(1)
    assert "HOROVODRUNNER_FAULTS" not in os.environ

def test_those_of_a_block_around(horovod_runner, faults):
    faults.kill(1)
    with Faults() as inner:
        inner.slow(0, 0.001)
        with pytest.raises(WorkerFailedError, match="rank 1 .*SIGKILL"):
            horovod_runner().run(train)

def test_there_is_no_connection_to_cut(horovod_runner, faults):
    faults.cut_driver(rank=1, at_step=1)
    with pytest.raises(WorkerFailedError, match="no connection to its driver. It needs np > 0"):
        horovod_runner().run(train)
"""
    )
    assert outcomes(done) == {"passed": 4}, done.stdout


def test_what_no_restart_shows(suite: Suite) -> None:
    done = suite(
        TRAIN
        + """
def begins_anew(steps=4):
    for step in range(steps):
        with checkpoint.save(step=step):
            pass
    return np.ones(2)

def saves_nothing(steps=4):
    for step in range(steps):
        metrics.report(step=step)
    return np.ones(2)

def is_random(steps=4):
    return train(steps) + np.random.default_rng().normal()

def each_its_own(steps=6):
    rank, latest = int(os.environ["RANK"]), checkpoint.latest()
    weights, start = np.zeros(2), 0
    if latest is not None:
        weights = np.load(latest / "w.npy") if rank == 0 else np.ones(2)
        start = latest.step + 1
    for step in range(start, steps):
        weights = weights / 2 + rank * step
        with checkpoint.save(step=step, ranks="all") as directory:
            np.save(directory / "w.npy", weights)
    return weights

@pytest.mark.parametrize(("main", "told"), [
    (begins_anew, "train began anew"),
    (saves_nothing, "train saved no checkpoint"),
    (is_random, "two undisturbed runs end with different weights"),
    (each_its_own, "rank 1: 2 of 2 numbers differ"),
])
def test_it(main, told):
    with pytest.raises(AssertionError, match=told):
        assert_resumes(main, at_step=3)
"""
    )
    assert outcomes(done) == {"passed": 4}, done.stdout


def test_runners_and_data_are_what_was_asked_for(suite: Suite) -> None:
    done = suite("""
import pytest
from horovodrunner import ArgumentTypeError, ArgumentValueError

def test_data(training_data):
    pandas, pa = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    columns = {"x": [1.0, 2.0]}
    for table in columns, pa.table(columns), pandas.DataFrame(columns):
        assert len(training_data(table)) == 2

def test_numbers(run_ranks, simulated_gpus):
    with pytest.raises(ArgumentTypeError, match="number='2'"):
        run_ranks("2")
    with pytest.raises(ArgumentValueError, match="number=0"):
        run_ranks(0)
    with pytest.raises(ArgumentValueError, match="number=-1"):
        simulated_gpus(-1)
""")
    assert outcomes(done) == {"passed": 2}, done.stdout
