"""GPUs that Spark gives to tasks: simulated ones, in the two sessions of one driver.

Who sees which of them is tested on data (tests/unit/test_topology.py): shared ones, several for a
task, ones that an executor does not see.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import stat
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import processes

pytestmark = [pytest.mark.spark, pytest.mark.timeout(600)]

needs_profiles = pytest.mark.skipif(
    importlib.metadata.version("pyspark").startswith("3."),
    reason="before pyspark 4.0 a DataFrame's stage cannot have resources of its own",
)
CUDAS_DRIVER = """
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
SCRIPT = """
    import json, os, sys
    from contextlib import contextmanager
    from pathlib import Path
    from pyspark import SparkContext
    from pyspark.sql import SparkSession
    from horovodrunner import HorovodRunner
    from horovodrunner.pickling import payload
    from horovodrunner.flows.call.early_imports import early_imports

    discovery, directory, calls = sys.argv[1:]

    @contextmanager
    def session(master, confs):
        builder = SparkSession.builder.master(master)
        quiet = {"spark.ui.enabled": "false", "spark.log.level": "ERROR"}
        for name, value in {**confs, **quiet}.items():
            builder = builder.config(name, value)
        spark = builder.getOrCreate()
        yield
        spark.stop()

    def gpus(per_executor, per_task=None):
        confs = {
            "spark.worker.resource.gpu.amount": "4",
            "spark.worker.resource.gpu.discoveryScript": discovery,
            "spark.executor.resource.gpu.amount": per_executor,
        }
        return confs if per_task is None else {**confs, "spark.task.resource.gpu.amount": per_task}

    def leave(name, facts):
        Path(directory, f"{name}.json").write_text(json.dumps(facts))

    def main(section):
        names = ["RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"]
        leave(f"{section}-{os.environ['RANK']}", {name: os.environ.get(name) for name in names})

    def attempt(section, np, resources=None, **options):
        try:
            HorovodRunner(np=np, resources=resources, **options).run(main, section=section)
        except Exception as error:
            leave(section, f"{type(error).__name__} {error}")

    def touch_cuda(calls):
        import ctypes
        import horovod.torch as hvd
        import tensorflow
        import torch

        touched = Path(calls).exists()
        hvd.init()
        torch.cuda.is_available(), tensorflow.config.list_physical_devices()
        getattr(ctypes, "C" + "DLL")("libcuda.so.1").cuInit(0)  # else nothing is early
        return touched

    def devices(batches):
        import pyarrow as pa
        from horovodrunner.inference.devices import current_device

        list(batches)
        device = current_device()
        yield pa.RecordBatch.from_pylist([{"gpu": device.gpu, "cores": device.cores}])

    def attempt_scoring(section):
        tasks = SparkSession.active().range(0, 2, 1, 2)
        rows = tasks.mapInArrow(devices, "gpu long, cores long", barrier=True).collect()
        leave(section, sorted((row.gpu, row.cores) for row in rows))

    # A JVM that the first session started would keep its confs for the second.
    SparkContext._ensure_initialized()

    # Only a master that is a cluster gives the driver resources.
    two_executors = {
        "spark.executor.cores": "2",
        "spark.executor.memory": "512m",
        "spark.executorEnv.OMP_NUM_THREADS": "3",
        "spark.driver.resource.gpu.amount": "2",
        "spark.driver.resource.gpu.discoveryScript": discovery,
    }
    with session("local-cluster[1,4,2048]", {**gpus("2", "1"), **two_executors}):
        attempt("two executors", 3)
        attempt_scoring("scoring")
        attempt("driver", -2)
        early = early_imports(touch_cuda, payload.dump_call(touch_cuda, {}))
        leave("early imports", early)
        leave("touched", HorovodRunner(np=1).run(touch_cuda, calls=calls))

    # The session's own tasks take no GPU.
    seen = {"spark.executorEnv.CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    with session("local-cluster[1,4,1024]", {**gpus("4"), **seen}):
        attempt("own resources", 2, {"cpus": 2, "gpu": 2})
        attempt("too many", 3, {"cpus": 2, "gpu": 1})
        attempt("all of a task", 4, {"cpus": 2, "gpu": 2}, ranks_per_task="gpu")
        attempt("none to count", 4, {"cpus": 2}, ranks_per_task="gpu")
"""


@dataclass
class Report:
    """What the driver left: of some runs what each rank saw, of the others an error."""

    directory: Path

    def of(self, section: str) -> Any:
        """Return one fact, or one run's error."""
        return json.loads((self.directory / f"{section}.json").read_text())

    def ranks(self, section: str) -> list[dict[str, Any]]:
        """Return what the ranks of one run saw, in their order."""
        assert not (self.directory / f"{section}.json").exists(), self.of(section)
        paths = sorted(self.directory.glob(f"{section}-*.json"))
        return [json.loads(path.read_text()) for path in paths]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the simulated CUDA driver notes who calls it."""
    return tmp_path_factory.mktemp("calls") / "calls"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, calls: Path) -> Report:
    """Run in several sessions, with a script that finds four GPUs and a simulated CUDA driver."""
    tools, directory = (tmp_path_factory.mktemp(name) for name in ("tools", "report"))
    script = tools / "find_gpus"
    addresses = json.dumps({"name": "gpu", "addresses": ["0", "1", "2", "3"]})
    script.write_text(f"#!/bin/sh\necho '{addresses}'\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    compiler = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tools / "libcuda.so.1")]
    processes.run(compiler, input=CUDAS_DRIVER, check=True)
    done = processes.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(script), str(directory), str(calls)],
        capture_output=True,
        env={
            **os.environ,
            "PYSPARK_PYTHON": sys.executable,
            "LD_LIBRARY_PATH": str(tools),
            "HOROVOD_CALLS_OF_CUINIT": str(calls),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Report(directory)


def own_gpus(seen: list[dict[str, Any]]) -> list[str]:
    """What torch.cuda.set_device(hvd.local_rank()) picks on each rank."""
    return [rank["CUDA_VISIBLE_DEVICES"].split(",")[int(rank["LOCAL_RANK"])] for rank in seen]


def test_two_executors_on_one_host_have_a_gpu_for_each_rank(report: Report) -> None:
    seen = report.ranks("two executors")
    assert [rank["LOCAL_RANK"] for rank in seen] == ["0", "1", "2"]
    assert len({rank["CUDA_VISIBLE_DEVICES"] for rank in seen}) == 1
    assert len(set(own_gpus(seen))) == 3


def test_a_model_is_applied_on_the_gpu_of_the_task(report: Report) -> None:
    (gpu, cores), (other_gpu, other_cores) = report.of("scoring")
    assert 0 <= gpu < other_gpu < 4
    assert cores == other_cores == 1


def test_a_negative_np_uses_the_drivers_gpus_and_shares_the_cores(report: Report) -> None:
    seen = report.ranks("driver")
    assert own_gpus(seen) == ["0", "1"]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [rank["OMP_NUM_THREADS"] for rank in seen] == [str(threads)] * 2


@needs_profiles
def test_a_run_with_resources_of_its_own_has_them_and_the_threads(report: Report) -> None:
    """Spark's numbers, 0 to 3, count within what the executor sees: 4 to 7."""
    seen = report.ranks("own resources")
    devices = [rank["CUDA_VISIBLE_DEVICES"].split(",") for rank in seen]
    assert devices[0] == devices[1]
    # each one's own first, then those of its peers
    assert {frozenset(devices[0][i::2]) for i in (0, 1)} == {
        frozenset(("4", "5")),
        frozenset(("6", "7")),
    }
    assert [rank["OMP_NUM_THREADS"] for rank in seen] == ["2", "2"]


@needs_profiles
def test_resources_are_counted_before_anything_is_launched(report: Report) -> None:
    error = report.of("too many")
    assert "np=3 needs 3 task slots, and the cluster has 2" in error
    assert "1 executor with 4 cores and 4 GPUs: 2 slots; a task takes resources=" in error


@needs_profiles
def test_a_task_runs_a_rank_on_each_of_its_gpus(report: Report) -> None:
    seen = report.ranks("all of a task")
    assert [rank["LOCAL_RANK"] for rank in seen] == ["0", "1", "2", "3"]
    assert sorted(own_gpus(seen)) == ["4", "5", "6", "7"]
    assert len({rank["CUDA_VISIBLE_DEVICES"] for rank in seen}) == 1
    assert [rank["OMP_NUM_THREADS"] for rank in seen] == ["1"] * 4  # of the task's two cores
    error = report.of("none to count")
    assert error.startswith('ConfigurationError ranks_per_task="gpu": a task owns no GPU here')


def test_threads_that_the_user_chose_are_kept(report: Report) -> None:
    assert [rank["OMP_NUM_THREADS"] for rank in report.ranks("two executors")] == ["3"] * 3


def test_cuda_is_not_touched_before_the_slot_is_known(report: Report, calls: Path) -> None:
    """CUDA reads CUDA_VISIBLE_DEVICES once, in cuInit; frameworks are imported before it is set."""
    # imported before the slot is known
    assert report.of("early imports") == ["torch", "horovod.torch", "tensorflow"]
    assert report.of("touched") is False
    [devices] = set(calls.read_text().split())  # whoever called it
    assert re.fullmatch(r"[0-3]", devices)
