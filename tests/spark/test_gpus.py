"""GPUs that Spark gives to tasks: pretended ones, in sessions of their own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.spark

needs_profiles = pytest.mark.skipif(
    importlib.metadata.version("pyspark").startswith("3."),
    reason="before pyspark 4.0 a DataFrame's stage cannot have resources of its own",
)

DRIVER = """
    import json, os, sys
    from pathlib import Path
    from pyspark.sql import SparkSession
    from horovodrunner import HorovodRunner

    def main(directory):
        names = ["RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"]
        seen = {name: os.environ.get(name) for name in names}
        Path(directory, os.environ["RANK"]).write_text(json.dumps(seen))

    master, confs, np, directory, resources = sys.argv[1:]
    builder = SparkSession.builder.master(master)
    for name, value in json.loads(confs).items():
        builder = builder.config(name, value)
    quiet = {"spark.ui.enabled": "false", "spark.log.level": "ERROR"}
    for name, value in quiet.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    try:
        runner = HorovodRunner(np=int(np), resources=json.loads(resources))
        runner.run(main, directory=directory)
    except Exception as error:
        print(type(error).__name__, error)
    spark.stop()
"""


@pytest.fixture
def found(tmp_path: Path) -> str:
    """A discovery script that finds four GPUs."""
    script = tmp_path / "find_gpus"
    addresses = json.dumps({"name": "gpu", "addresses": ["0", "1", "2", "3"]})
    script.write_text(f"#!/bin/sh\necho '{addresses}'\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def ranks(
    master: str,
    confs: dict[str, str],
    np: int,
    tmp_path: Path,
    resources: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Run on a cluster with these settings; gives what each rank saw."""
    directory = tmp_path / "ranks"
    directory.mkdir()
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), master, json.dumps(confs)]
    done = subprocess.run(
        [*command, str(np), str(directory), json.dumps(resources)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        env={**os.environ, "PYSPARK_PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    paths = sorted(directory.iterdir(), key=lambda path: int(path.name))
    return [json.loads(path.read_text()) for path in paths] or [{"shown": done.stdout}]


def cluster(found: str, per_task: str, per_executor: str, **more: str) -> dict[str, str]:
    return {
        "spark.worker.resource.gpu.amount": "4",
        "spark.worker.resource.gpu.discoveryScript": found,
        "spark.executor.resource.gpu.amount": per_executor,
        "spark.task.resource.gpu.amount": per_task,
        **more,
    }


def own_gpus(seen: list[dict[str, Any]]) -> list[str]:
    """What torch.cuda.set_device(hvd.local_rank()) picks on each rank."""
    return [rank["CUDA_VISIBLE_DEVICES"].split(",")[int(rank["LOCAL_RANK"])] for rank in seen]


def test_two_executors_on_one_host_have_a_gpu_for_each_rank(found: str, tmp_path: Path) -> None:
    small = {"spark.executor.cores": "2", "spark.executor.memory": "512m"}
    seen = ranks("local-cluster[1,4,2048]", cluster(found, "1", "2", **small), 3, tmp_path)
    assert [rank["LOCAL_RANK"] for rank in seen] == ["0", "1", "2"]
    assert len({rank["CUDA_VISIBLE_DEVICES"] for rank in seen}) == 1
    assert len(set(own_gpus(seen))) == 3


def test_a_task_with_two_gpus_sees_those_of_its_peers_after_its_own(
    found: str, tmp_path: Path
) -> None:
    seen = ranks("local-cluster[1,2,1024]", cluster(found, "2", "4"), 2, tmp_path)
    devices = [rank["CUDA_VISIBLE_DEVICES"].split(",") for rank in seen]
    assert devices[0] == devices[1]
    assert sorted(devices[0]) == ["0", "1", "2", "3"]
    assert {frozenset(devices[0][i::2]) for i in (0, 1)} == {
        frozenset(("0", "1")),
        frozenset(("2", "3")),
    }


def test_tasks_that_share_a_gpu_see_it_alone(found: str, tmp_path: Path) -> None:
    seen = ranks("local-cluster[1,2,1024]", cluster(found, "0.5", "1"), 2, tmp_path)
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in seen] == ["0", "0"]


def test_what_the_executor_sees_is_composed_with_sparks_numbers(found: str, tmp_path: Path) -> None:
    confs = cluster(found, "1", "2", **{"spark.executorEnv.CUDA_VISIBLE_DEVICES": "6,7"})
    seen = ranks("local-cluster[1,2,1024]", confs, 2, tmp_path)
    assert sorted(own_gpus(seen)) == ["6", "7"]


def test_a_gpu_that_the_executor_does_not_see_is_refused(found: str, tmp_path: Path) -> None:
    confs = cluster(found, "1", "2", **{"spark.executorEnv.CUDA_VISIBLE_DEVICES": "6"})
    [outcome] = ranks("local-cluster[1,2,1024]", confs, 2, tmp_path)
    assert "ConfigurationError Spark gave this task GPU 1, and the executor sees 1" in str(outcome)


def test_a_negative_np_uses_the_drivers_gpus_and_shares_the_cores(
    found: str, tmp_path: Path
) -> None:
    confs = {
        "spark.driver.resource.gpu.amount": "2",
        "spark.driver.resource.gpu.discoveryScript": found,
    }
    # Only a master that is a cluster gives the driver resources.
    seen = ranks("local-cluster[1,1,1024]", confs, -2, tmp_path)
    assert own_gpus(seen) == ["0", "1"]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [rank["OMP_NUM_THREADS"] for rank in seen] == [str(threads)] * 2


@needs_profiles
def test_a_run_with_resources_of_its_own_has_them_and_the_threads(
    found: str, tmp_path: Path
) -> None:
    confs = cluster(found, "1", "4")
    del confs["spark.task.resource.gpu.amount"]  # the session's own tasks take no GPU
    seen = ranks("local-cluster[1,4,1024]", confs, 2, tmp_path, {"cpus": 2, "gpu": 2})
    assert [len(rank["CUDA_VISIBLE_DEVICES"].split(",")) for rank in seen] == [4, 4]
    assert len(set(own_gpus(seen))) == 2
    assert [rank["OMP_NUM_THREADS"] for rank in seen] == ["2", "2"]


@needs_profiles
def test_resources_are_counted_before_anything_is_launched(found: str, tmp_path: Path) -> None:
    confs = cluster(found, "1", "4")
    [outcome] = ranks("local-cluster[1,4,1024]", confs, 3, tmp_path, {"cpus": 2, "gpu": 1})
    assert "np=3 needs 3 task slots, and the cluster has 2" in str(outcome)
    assert "1 executor with 4 cores and 4 GPUs: 2 slots; a task takes resources=" in str(outcome)


def test_resources_that_spark_cannot_give_are_refused_with_the_confs(tmp_path: Path) -> None:
    [outcome] = ranks("local[4]", {}, 2, tmp_path, {"cpus": 2})
    assert "ConfigurationError resources=" in str(outcome)
    assert "start the session with spark.task.cpus=2" in str(outcome)


def test_threads_that_the_user_chose_are_kept(tmp_path: Path) -> None:
    chosen = {"spark.executorEnv.OMP_NUM_THREADS": "3"}
    seen = ranks("local-cluster[1,2,1024]", chosen, 2, tmp_path)
    assert [rank["OMP_NUM_THREADS"] for rank in seen] == ["3", "3"]


CUDA_DRIVER = """
    #include <stdio.h>
    #include <stdlib.h>

    int cuInit(unsigned flags) {
        const char *devices = getenv("CUDA_VISIBLE_DEVICES");
        FILE *calls = fopen(getenv("HOROVOD_CALLS_OF_CUINIT"), "a");
        fprintf(calls, "%s\\n", devices == NULL ? "none" : devices);
        fclose(calls);
        return 100; /* no device */
    }
"""


def test_cuda_is_not_touched_before_the_slot_is_known(found: str, tmp_path: Path) -> None:
    """CUDA reads CUDA_VISIBLE_DEVICES once, in cuInit; frameworks are imported before it is set."""
    library = tmp_path / "libcuda.so.1"
    compiler = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(compiler, input=CUDA_DRIVER, text=True, check=True)
    script = """
        import sys
        from pathlib import Path
        from pyspark.sql import SparkSession
        from horovodrunner import HorovodRunner
        from horovodrunner.core import payload

        def main(calls):
            import ctypes
            import horovod.torch as hvd
            import tensorflow
            import torch

            touched = Path(calls).exists()
            hvd.init()
            torch.cuda.is_available(), tensorflow.config.list_physical_devices()
            ctypes.CDLL("libcuda.so.1").cuInit(0)
            return touched

        discovery, calls = sys.argv[1:]
        spark = (
            SparkSession.builder.master("local-cluster[1,1,1024]")
            .config("spark.ui.enabled", "false")
            .config("spark.worker.resource.gpu.amount", "4")
            .config("spark.worker.resource.gpu.discoveryScript", discovery)
            .config("spark.executor.resource.gpu.amount", "4")
            .config("spark.task.resource.gpu.amount", "2")
            .getOrCreate()
        )
        print("early:", *payload.early_imports(main, payload.dump_call(main, {})))
        print("touched:", HorovodRunner(np=1).run(main, calls=calls))
        spark.stop()
    """
    calls = tmp_path / "calls"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), found, str(calls)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        env={
            **os.environ,
            "PYSPARK_PYTHON": sys.executable,
            "LD_LIBRARY_PATH": str(tmp_path),
            "HOROVOD_CALLS_OF_CUINIT": str(calls),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shown = done.stdout.splitlines()
    assert "early: torch horovod.torch tensorflow" in shown  # imported before the slot is known
    assert "touched: False" in shown
    [devices] = set(calls.read_text().split())  # whoever called it
    assert re.fullmatch(r"[0-3],[0-3]", devices)
