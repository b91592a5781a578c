"""A standalone cluster on this machine: a master and one worker with two cores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests import processes
from tests.waiting import wait_for_line

DEPLOY = "org.apache.spark.deploy"


@contextlib.contextmanager
def standalone(directory: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Start a cluster that works below ``directory / "work"``; return the master's URL."""
    import pyspark

    spark_class = str(Path(pyspark.__file__).parent / "bin" / "spark-class")
    environment = {**environment, "SPARK_WORKER_DIR": str(directory / "work")}

    def start(name: str, *arguments: str) -> Path:
        log = directory / f"{name}.log"
        output = blocks.enter_context(log.open("wb"))
        both = {"stdout": output, "stderr": processes.STDOUT}
        command = [spark_class, name, "--host", "127.0.0.1", "--webui-port", "0", *arguments]
        blocks.enter_context(processes.started(command, env=environment, **both))
        return log

    with contextlib.ExitStack() as blocks:
        log = start(f"{DEPLOY}.master.Master", "--port", "0")
        url = wait_for_line(r"spark://[\w.]+:\d+", log)[0]
        log = start(f"{DEPLOY}.worker.Worker", "--cores", "2", "--memory", "2g", url)
        wait_for_line("Successfully registered with master", log)
        yield url
