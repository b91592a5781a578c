"""The plugin's clusters and what happens on them, in test suites of their own."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from tests import processes

pytestmark = pytest.mark.spark

HEAD = """
    import os

    import psutil
    import pytest

    from horovodrunner import ConfigurationError, WorkerFailedError

    APPLICATIONS = []

    @pytest.fixture
    def spark_cluster(spark_cluster):
        APPLICATIONS.append(spark_cluster.sparkContext.applicationId)
        with open("applications", "a") as file:
            print(APPLICATIONS[-1], file=file)
        return spark_cluster

    def jvm(cluster):
        return cluster.sparkContext._gateway.proc.pid

    def train():
        from horovodrunner import metrics

        for step in range(4):
            metrics.report(step=step, loss=1.0)
            print(f"step {step}")
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        return int(os.environ["RANK"]), executor().pid, gpus

    def executor():
        return next(each for each in psutil.Process().parents() if each.name() == "java")

    def train_on(horovod_runner, **options):
        runner = horovod_runner(np=2, results="all", **options)
        runner.run(train)
        return list(runner.results)
"""

ONE_JVM = """
    def test_ranks_run_in_executors_of_their_own(spark_cluster, horovod_runner, capsys):
        (_, one, _), (_, other, _) = train_on(horovod_runner)
        assert len({one, other, jvm(spark_cluster)}) == 3
        assert "[1]<stdout>:step 3" in capsys.readouterr().out

    def test_a_killed_rank_is_named_on_the_same_cluster(spark_cluster, horovod_runner, faults):
        assert spark_cluster.sparkContext.applicationId == APPLICATIONS[0]
        faults.kill(rank=1, at_step=2)
        with pytest.raises(WorkerFailedError, match="rank 1 .*SIGKILL"):
            train_on(horovod_runner)

    def test_a_lost_executor_is_replaced(spark_cluster, horovod_runner, faults, capsys):
        faults.lose_executor(rank=1, at_step=2)
        assert [rank for rank, *_ in train_on(horovod_runner, max_restarts=1)] == [0, 1]
        told = capsys.readouterr().out
        assert "attempt 2 of 2, because" in told
        assert "Spark lost executor" in told
        assert told.count("[1]<stdout>:step 1") == 2

    def test_a_run_goes_on_without_its_driver(spark_cluster, horovod_runner, faults, capsys):
        faults.cut_driver(rank=0, at_step=2)
        assert [rank for rank, *_ in train_on(horovod_runner)] == [0, 1]
        told = capsys.readouterr().out
        assert "the connection to rank 0's task at" in told
        assert "is lost; if the run goes on, its output stays in the executor's log" in told
        assert "step 3" not in told

    def test_the_cluster_may_be_stopped(spark_cluster):
        test_the_cluster_may_be_stopped.jvm = jvm(spark_cluster)
        spark_cluster.stop()

    # what a JVM was started with is in all its sessions
    @pytest.mark.spark_cluster(
        executors=1, cores=2, gpus_per_executor=2, confs={"spark.my.word": "of one shape"}
    )
    def test_each_rank_has_a_gpu(spark_cluster, horovod_runner):
        assert jvm(spark_cluster) == test_the_cluster_may_be_stopped.jvm
        assert spark_cluster.conf.get("spark.my.word") == "of one shape"
        ranks = train_on(horovod_runner)
        assert len({executor for _, executor, _ in ranks}) == 1
        assert [gpus for *_, gpus in ranks] == ["0,1", "0,1"]  # each takes that of its local rank

    @pytest.mark.spark_cluster(executors=1)
    def test_another_shape_has_its_own_settings(spark_cluster):
        confs = dict(spark_cluster.sparkContext.getConf().getAll())
        assert confs["spark.of.all"] == "from=the ini file"
        assert "spark.my.word" not in confs
        assert not any("gpu" in name for name in confs)
        assert spark_cluster.range(3).count() == 3

    @pytest.mark.spark_cluster(executors=1)
    def test_a_session_of_somebody_else_is_left_alone(spark_cluster, request):
        from horovodrunner.testing.clusters import Shape
        from pyspark.sql import SparkSession

        clusters = request.getfixturevalue("_spark_clusters")
        spark_cluster.stop()
        other = SparkSession.builder.master("local[1]").getOrCreate()
        for shape in Shape.of(executors=1), Shape.of():
            with pytest.raises(ConfigurationError, match=r"already, on local.*: stop it before"):
                clusters.session(shape)
        with pytest.raises(ConfigurationError, match="already"):
            clusters.connect(Shape.of())
        assert other.range(2).count() == 2
        other.stop()
"""

SEVERAL_JVMS = """
    def test_the_jvm_may_die(spark_cluster):
        test_the_jvm_may_die.jvm = jvm(spark_cluster)
        psutil.Process(jvm(spark_cluster)).kill()

    def test_there_is_another_one_then(spark_cluster):
        assert spark_cluster.range(3).count() == 3
        assert jvm(spark_cluster) != test_the_jvm_may_die.jvm
        test_there_is_another_one_then.jvm = jvm(spark_cluster)

    @pytest.mark.spark_cluster(executors=1, confs={"spark.driver.extraJavaOptions": "-Dmy.word=x"})
    def test_settings_that_a_jvm_takes_at_its_start(spark_cluster):
        assert jvm(spark_cluster) != test_there_is_another_one_then.jvm
        assert spark_cluster.sparkContext._jvm.java.lang.System.getProperty("my.word") == "x"
"""

CONNECT = """
    def count(session):
        from pyspark.sql import functions
        return session.range(3).select(functions.col("id") + 1).count()

    def test_before(spark_cluster):
        assert count(spark_cluster) == 3
        test_before.jvm = psutil.Process(jvm(spark_cluster))

    def test_connect(spark_connect_cluster, horovod_runner):
        assert not test_before.jvm.is_running()
        assert "connect" in type(spark_connect_cluster).__module__
        assert count(spark_connect_cluster) == 3
        assert [rank for rank, *_ in train_on(horovod_runner)] == [0, 1]
        test_connect.session = spark_connect_cluster

    def test_the_server_is_shared(spark_connect_cluster):
        assert spark_connect_cluster is test_connect.session
        spark_connect_cluster.stop()

    def test_after(spark_connect_cluster):
        assert count(spark_connect_cluster) == 3

    @pytest.mark.spark_cluster(executors=1)
    def test_a_classic_session_again(spark_cluster):
        assert "connect" not in type(spark_cluster).__module__
        assert count(spark_cluster) == 3
"""

INI = """
    [pytest]
    spark_cluster_memory = 900
    spark_cluster_confs =
        spark.of.all = from=the ini file
"""


WARNINGS = ["-W", "error", "-W", "ignore:PySpark does not yet fully support pandas:FutureWarning"]


def run_suite(directory: Path, tests: str) -> None:
    """Run tests in a pytest of their own; all pass, and nothing is left of their clusters."""
    import pyspark

    (directory / "test_suite.py").write_text(textwrap.dedent(HEAD) + textwrap.dedent(tests))
    (directory / "pytest.ini").write_text(textwrap.dedent(INI))
    before = set(Path(tempfile.gettempdir()).glob("clusters-of-tests-*"))
    command = [sys.executable, "-m", "pytest", "-p", "horovodrunner.testing.plugin"]
    environment = {name: value for name, value in os.environ.items() if name != "JDK_JAVA_OPTIONS"}
    done = processes.run(
        [*command, "-p", "no:cacheprovider", *WARNINGS],
        cwd=directory,
        env=environment,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert f"{tests.count('def test_')} passed" in done.stdout
    applications = (directory / "applications").read_text().split()
    work = Path(pyspark.__file__).parent / "work"
    assert not [name for name in applications if (work / name).exists()]
    assert set(Path(tempfile.gettempdir()).glob("clusters-of-tests-*")) == before


def test_all_of_a_session_is_in_one_jvm(tmp_path: Path) -> None:
    run_suite(tmp_path, ONE_JVM)


@pytest.mark.heavy
def test_a_jvm_that_is_gone_is_replaced(tmp_path: Path) -> None:
    run_suite(tmp_path, SEVERAL_JVMS)


@pytest.mark.heavy
@pytest.mark.skipif(
    importlib.util.find_spec("grpc_status") is None,
    reason="a Connect client needs grpcio-status: pip install 'pyspark[connect]'",
)
def test_connect_and_classic_sessions_follow_each_other(tmp_path: Path) -> None:
    run_suite(tmp_path, CONNECT)


@pytest.mark.parametrize(
    ("marker", "ini", "told"),
    [
        ("cpus=2", "", "spark_cluster(cpus=...): it takes executors, cores, memory"),
        ("executors=0", "", "executors=0"),
        ("memory=200", "", "memory=200"),
        ("confs=3", "", "spark_cluster(confs=3): give a dict"),
        ("2", "", "spark_cluster(2,): give names, spark_cluster(executors=2"),
        ("", "spark_cluster_cores = two", "spark_cluster_cores = two: give a whole number"),
        ("", "spark_cluster_confs = spark.x", "line 'spark.x': write name=value"),
    ],
)
def test_bad_shapes_are_refused_before_a_jvm_starts(
    tmp_path: Path, marker: str, ini: str, told: str
) -> None:
    suite = f"import pytest\n@pytest.mark.spark_cluster({marker})\ndef test(spark_cluster): pass\n"
    (tmp_path / "test_suite.py").write_text(suite)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
    command = [sys.executable, "-m", "pytest", "-p", "horovodrunner.testing.plugin", "--tb=short"]
    done = processes.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "JAVA_HOME": "/nowhere"},
        capture_output=True,
    )
    assert told in done.stdout, done.stdout
    assert "1 error" in done.stdout
