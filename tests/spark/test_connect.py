"""Spark Connect: a server with two executors, and drivers that have no SparkContext."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import processes
from tests.conftest import marked_processes, workers_left
from tests.waiting import wait_for_line

pytestmark = [
    pytest.mark.spark,
    pytest.mark.skipif(
        importlib.util.find_spec("grpc_status") is None,
        reason="a Connect client needs grpcio-status: pip install 'pyspark[connect]'",
    ),
]

HEAD = """
    import os, signal, sys, threading, time
    from pathlib import Path
    from pyspark.sql import SparkSession
    from horovodrunner import *
    from horovodrunner.processes.driver import cluster

    address, directory = sys.argv[1:]
    spark = SparkSession.builder.remote(address).getOrCreate()

    def train(prefix):
        from horovodrunner import checkpoint, log_to_driver
        print("training")
        log_to_driver(f"message of rank {os.environ['RANK']}")
        with checkpoint.save(step=1) as files:
            (files / "weights").write_text("1 2 3")
        return prefix + os.environ["WORLD_SIZE"]

    def run_for_ever():
        Path(directory, os.environ["RANK"]).touch()
        while True:
            time.sleep(1)

    def when_all_run(act):
        def wait_and_act():
            while len(os.listdir(directory)) < 2:
                time.sleep(0.02)
            act()
        threading.Thread(target=wait_and_act).start()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Connect server of its own on two executors; return its address."""
    import pyspark

    home = Path(pyspark.__file__).parent
    if not list((home / "jars").glob("spark-connect_*.jar")):
        pytest.skip(f"pip's pyspark {pyspark.__version__} comes without Spark Connect's server")
    log = tmp_path_factory.mktemp("connect") / "server.log"
    confs = {
        "spark.ui.enabled": "false",
        "spark.log.level": "INFO",  # tells the port and the application's name
        "spark.connect.grpc.binding.port": "0",
        "spark.deploy.appIdPattern": f"app-%s-%04d-{os.getpid()}-connect",
        "spark.connect.execute.reattachable.senderMaxStreamDuration": "2s",
        "spark.connect.execute.manager.detachedTimeout": "2s",
        "spark.connect.execute.manager.maintenanceInterval": "1s",
    }
    command = [str(home / "bin" / "spark-submit"), "--master", "local-cluster[2,1,1024]"]
    command += ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer"]
    command += [part for name, value in confs.items() for part in ("--conf", f"{name}={value}")]
    with (
        log.open("wb") as output,
        processes.started(
            [*command, "spark-internal"],
            stdout=output,
            stderr=processes.STDOUT,
            env={**os.environ, "PYSPARK_PYTHON": sys.executable},
        ) as process,
    ):
        port = wait_for_line(r"Connect server started at: .*:(\d+)", log)[1]
        yield f"sc://localhost:{port}"
        process.terminate()  # lets it stop its executors
        process.wait()
    if application := re.search(r"app-\d+-\d+-\d+-connect", log.read_text()):
        shutil.rmtree(home / "work" / application[0], ignore_errors=True)


def client(server: str, script: str, directory: Path) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(HEAD) + textwrap.dedent(script), server,
            str(directory)]  # fmt: skip


def drive(server: str, script: str, tmp_path: Path) -> str:
    """Run a script as a client; return what it printed, after it has ended well."""
    directory = tmp_path / "ranks"
    directory.mkdir()
    done = processes.run(
        client(server, script, directory),
        capture_output=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SECTIONS = """
    print("SECTION value")
    runner = HorovodRunner(np=2, driver_log_verbosity="all", checkpoint_dir="saved")
    print("value:", runner.run(train, prefix="ranks: "))
    print("weights:", Path(runner.checkpoints[0].path, "weights").read_text())
    print("with resources:", HorovodRunner(np=2, resources={"cpus": 1}).run(train, prefix=""))

    def wait_to_save():
        from horovodrunner import checkpoint
        while not checkpoint.should_save_now():
            time.sleep(0.01)
        return "saved"

    def ask():
        while not runner.request_checkpoint():
            time.sleep(0.01)

    threading.Thread(target=ask).start()
    print("asked:", runner.run(wait_to_save))

    print("SECTION errors")
    for np, main in ((2, lambda: 1 / 0), (3, lambda: 1), (0, lambda: os.environ["WORLD_SIZE"])):
        try:
            print(HorovodRunner(np=np).run(main), "ranks")
        except HorovodRunnerError as error:
            print(type(error).__name__, repr(error.__cause__), error)
    try:
        HorovodRunner(np=2, resources={"gpu": 1}).run(lambda: 1)
    except ConfigurationError as error:
        print(error)
    df = spark.range(3)
    for thing in (spark, df, df.groupBy()):
        try:
            HorovodRunner(np=2).run(lambda: thing)
        except PayloadError as error:
            print(error)

    print("SECTION not reached")
    spark.conf.set("spark.horovodrunner.driver.host", "nowhere.invalid")
    runner = HorovodRunner(np=2, driver_log_verbosity="all", checkpoint_dir="not saved")
    print("value:", runner.run(train, prefix=""))
    try:
        HorovodRunner(np=2).run(lambda: 1 / 0)
    except WorkerFailedError as error:
        print(repr(error.__cause__))
    spark.conf.unset("spark.horovodrunner.driver.host")

    print("SECTION rows")
    from horovodrunner import data

    def table():
        return spark.range(101).selectExpr("id", "array(id, -id) AS features")

    with data.from_dataframe(table(), directory) as rows:
        print("reused:", data.from_dataframe(table(), directory) is rows)

        def main():
            (batch,) = rows.numpy(batch_size=50)
            return batch["id"].tolist(), batch["features"].shape

        ids, shape = HorovodRunner(np=2).run(main)
        print("read:", ids == list(range(50)), shape)
    print("left:", os.listdir(directory))

    print("SECTION model")
    import torch
    from horovodrunner.inference import Model, predict, predict_udf
    from horovodrunner.inference.loading import load

    def sums(batches):
        import numpy as np
        import pyarrow as pa
        from pyspark import BarrierTaskContext
        BarrierTaskContext.get().barrier()
        found = load(handle)(np.ones((1, 300), np.float32))
        maps = [line.split() for line in open("/proc/self/maps") if "horovodrunner-m" in line]
        list(batches)
        row = {"sum": float(found.sum()), "process": os.getpid(), "file": maps[0][4]}
        yield pa.RecordBatch.from_pylist([row])

    net = torch.nn.Linear(300, 300)
    with Model.from_torch(net) as model:
        handle = model.handle(spark)
        rows = spark.range(0, 2, 1, 2).mapInArrow(
            sums, "sum double, process long, file string", barrier=True).collect()
        ones = spark.range(0, 9, 1, 2).selectExpr("id", "array_repeat(float(1), 300) AS x")
        options = {"return_type": "array<float>", "batch_size": 4}
        column = predict_udf(model, **options)("x").alias("prediction")
        scored = [
            *predict(ones, model, inputs="x", keep_columns=["id"], **options).collect(),
            *ones.select("id", column).collect(),
        ]
    print("scored:", len(scored))
    print("processes:", len({row["process"] for row in rows}))
    print("files:", len({row["file"] for row in rows}))
    expected = net(torch.ones(1, 300)).sum().item()
    print("right:", all(abs(row["sum"] - expected) < 1e-4 for row in rows))
    print("also:", all(abs(sum(row["prediction"]) - expected) < 1e-3 for row in scored))
"""


@pytest.fixture(scope="module")
def sections(server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one client shows of one thing after the other."""
    shown = drive(server, SECTIONS, tmp_path_factory.mktemp("client")).split("SECTION ")
    return {name: text for name, _, text in (section.partition("\n") for section in shown)}


def test_value_output_and_checkpoints_arrive(sections: dict[str, str]) -> None:
    shown = sections["value"].splitlines()
    assert "value: ranks: 2" in shown
    assert "weights: 1 2 3" in shown
    assert {"[0]<stdout>:training", "[1]<stdout>:training"} <= set(shown)
    assert shown.count("message of rank 1") == 2
    assert "with resources: 2" in shown
    assert "asked: saved" in shown


def test_errors_are_those_of_any_cluster(sections: dict[str, str]) -> None:
    shown = sections["errors"]
    for kind, reason in [
        ("session.SparkSession", "Spark is on the driver only"),
        ("dataframe.DataFrame", "a Spark DataFrame is on the driver only"),
        ("group.GroupedData", "Spark's objects are on the driver only"),
    ]:
        assert re.search(rf"^the global 'thing' used by .*{kind}\) cannot .*{reason}", shown, re.M)
    assert "WorkerFailedError ZeroDivisionError('division by zero') rank" in shown
    assert "np=3 needs 3 task slots, and the cluster has 2 (local-cluster[2,1,1024]; " in shown
    assert "2 ranks" in shown
    assert "resources={'gpu': 1} asks for other resources" in shown
    assert "start the session with spark.task.resource.gpu.amount=1" in shown


def test_a_client_that_cannot_be_reached_gets_the_result_and_is_told(
    sections: dict[str, str],
) -> None:
    shown = sections["not reached"]
    assert "value: 2\n" in shown
    assert "could not reach this process at nowhere.invalid: " in shown
    assert "checkpoints were not kept" in shown
    assert "ZeroDivisionError" in shown


def test_a_dataframe_feeds_the_ranks(sections: dict[str, str]) -> None:
    shown = sections["rows"].splitlines()
    assert {"reused: True", "read: True (50, 2)", "left: []"} <= set(shown)


def test_a_model_is_applied_and_its_weights_are_one_file_for_both_executors(
    sections: dict[str, str],
) -> None:
    shown = sections["model"].splitlines()
    assert {"scored: 18", "processes: 2", "files: 1", "right: True", "also: True"} <= set(shown)


def test_an_interrupt_and_a_cancelled_operation_end_the_workers(
    server: str, tmp_path: Path
) -> None:
    script = """
        runner = HorovodRunner(np=2)
        acts = [
            lambda: os.kill(os.getpid(), signal.SIGINT), spark.interruptAll,
            lambda: runner.stop("enough"),
        ]
        for act in acts:
            for marker in Path(directory).iterdir():
                marker.unlink()
            when_all_run(act)
            try:
                runner.run(run_for_ever)
            except (KeyboardInterrupt, BarrierStageError, RunStoppedError) as error:
                print("ended by", type(error).__name__, error)
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(3) as pool:  # the server does not tell that two do not fit
            runs = [pool.submit(HorovodRunner(np=2).run, lambda n=n: n) for n in range(3)]
            print("values", [run.result() for run in runs])
        print(spark.range(7).count(), "rows")
    """
    shown = drive(server, script, tmp_path)
    assert "ended by KeyboardInterrupt" in shown
    assert "ended by BarrierStageError the run's Spark job was cancelled" in shown
    assert "ended by RunStoppedError enough: the run of 2 ranks was stopped" in shown
    assert "values [0, 1, 2]" in shown
    assert "7 rows" in shown


def test_slots_that_stay_taken_are_a_start_timeout(server: str, tmp_path: Path) -> None:
    script = """
        cluster.FIRST_LOOK_SECONDS = 1.0
        def hold(batches):
            Path(directory, "held").touch()
            time.sleep(15)
            yield from batches
        holder = threading.Thread(
            target=lambda: spark.range(0, 1, 1, 1).mapInArrow(hold, "id long").collect()
        )
        holder.start()
        while not os.listdir(directory):
            time.sleep(0.02)
        try:
            HorovodRunner(np=2, start_timeout=4).run(train, prefix="")
        except StartTimeoutError as error:
            print(error)
        spark.interruptAll()
        holder.join()
    """
    shown = drive(server, script, tmp_path)
    assert "waiting for 2 slots\n" in shown
    assert "2 tasks did not all start within 4 s; other jobs may hold the slots" in shown


def test_the_server_ends_the_run_of_a_client_that_died(server: str, tmp_path: Path) -> None:
    with processes.started(
        client(server, "HorovodRunner(np=2).run(run_for_ever)", tmp_path),
        stdout=processes.DEVNULL,
        stderr=processes.DEVNULL,
    ) as process:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        assert any("horovodrunner.processes.worker" in command for command in marked_processes())
        process.kill()
        process.wait()
    assert workers_left() == []
