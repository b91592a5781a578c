"""Variables on executors, and where Spark could show a secret: settings, event log, commands."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import ConfigurationError, HorovodRunner
from horovodrunner.processes.driver import resources
from horovodrunner.processes.driver.resources import TaskRequest
from tests import processes

pytestmark = pytest.mark.spark

SECRET = "q7-marker-of-a-secret"

DRIVER = """
    import os
    import sys
    from pathlib import Path

    from pyspark.sql import SparkSession

    from horovodrunner import HorovodRunner

    def main(directory):
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and (process / "cmdline").exists():
                with (directory / f"commands-{os.environ['RANK']}").open("ab") as file:
                    file.write((process / "cmdline").read_bytes())
        names = ("NAMED", "HARMLESS_NAME", "OF_EXECUTOR", "OMP_NUM_THREADS")
        return {name: os.environ.get(name) for name in names}, sys.flags.optimize

    directory = Path.cwd()
    builder = SparkSession.builder.master("local-cluster[2,1,1024]")
    settings = {
        "ui.enabled": "false", "ui.showConsoleProgress": "false", "log.level": "INFO",
        "eventLog.enabled": "true", "eventLog.dir": f"file://{directory}/events",
        "eventLog.compress": "false",
        "executorEnv.OF_EXECUTOR": "1", "executorEnv.OMP_NUM_THREADS": "7",
        "deploy.appIdPattern": f"app-%s-%04d-{os.getpid()}",
    }
    (directory / "events").mkdir()
    for name, value in settings.items():
        builder = builder.config(f"spark.{name}", value)
    spark = builder.getOrCreate()
    environment = {
        "NAMED": "yes", "API_KEY": os.environ["HARMLESS_NAME"] + "-2", "PYTHONOPTIMIZE": "1",
        "OF_EXECUTOR": None, "OMP_NUM_THREADS": None,
    }
    runner = HorovodRunner(
        np=2, environment=environment, forward=["HARMLESS_*"], run_dir=directory / "runs"
    )
    found = runner.run(main, directory=directory)
    import json
    (directory / "found.json").write_text(json.dumps(
        [found, spark.sparkContext.applicationId, spark.sparkContext.getConf().getAll()]
    ).replace(os.environ["HARMLESS_NAME"], "THE SECRET"))
    spark.stop()
"""


@pytest.mark.heavy
def test_variables_reach_executors_and_spark_shows_no_secret(tmp_path: Path) -> None:
    import pyspark

    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    variables = {**os.environ, "HARMLESS_NAME": SECRET}
    variables["HOROVODRUNNER_LOG"] = "debug"
    command = [sys.executable, str(script)]
    done = processes.run(command, env=variables, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (found, optimize), application, settings = json.loads((tmp_path / "found.json").read_text())
    assert found == {
        "NAMED": "yes",
        "HARMLESS_NAME": "THE SECRET",
        "OF_EXECUTOR": None,
        "OMP_NUM_THREADS": "1",  # its task has one core
    }
    assert optimize == 1
    assert "THE SECRET" not in json.dumps(settings)
    logs = Path(pyspark.__file__).parent / "work" / application
    places = {"events": "SparkListenerJobEnd", "runs": "(not shown)", "commands-0": "java"}
    texts = {name: text_of(tmp_path / name) for name in places} | {
        "executors' logs": text_of(logs),
        "driver": done.stdout + done.stderr,
    }
    shutil.rmtree(logs)
    for name, expected in {
        **places,
        "executors' logs": "is rank 1",  # HOROVODRUNNER_LOG is in force there
        "driver": "horovodrunner.processes.driver",
    }.items():
        assert expected in texts[name], name
        assert SECRET not in texts[name], name


def text_of(place: Path) -> str:
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    return "".join(path.read_bytes().decode(errors="replace") for path in files)


@pytest.mark.parametrize("devices", ["0", "", None])
def test_where_tasks_own_gpus_spark_decides_which(
    spark: Any, monkeypatch: pytest.MonkeyPatch, devices: str | None
) -> None:
    request = TaskRequest(1, 1.0, "spark.task.resource.gpu.amount=1")
    monkeypatch.setattr(resources, "task_request", lambda *_: request)
    runner = HorovodRunner(np=2, environment={"CUDA_VISIBLE_DEVICES": devices})
    with pytest.raises(ConfigurationError, match=r"Spark decides which .*gpu.amount=1"):
        runner.run(lambda: None)


def test_without_gpus_of_tasks_devices_can_be_hidden(spark: Any) -> None:
    runner = HorovodRunner(np=2, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert runner.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"]) == ""
