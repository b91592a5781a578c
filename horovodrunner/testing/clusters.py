"""Spark sessions on executors of their own, one at a time, for the tests of a process.

Runs in: the driver.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ConfigurationError
from horovodrunner.prerequisites import INSTALL_SPARK

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["Clusters", "Shape"]

SERVER_SECONDS = 120.0
"""How long Spark Connect's server may take to start."""

_QUICK_JVM = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""JVMs of tests live for seconds: to compile everything well would take half of their time."""


@dataclass(frozen=True)
class Shape:
    """What a cluster has; two tests that want the same share one."""

    executors: int = 2
    cores: int = 1
    memory: int = 1024
    """Of each executor, in MiB."""
    gpus_per_executor: int = 0
    """Simulated ones."""
    confs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, **given: Any) -> Shape:
        """Check what a marker or an ini file says."""
        confs = given.pop("confs", {})
        if unknown := given.keys() - cls.__annotations__.keys():
            raise ArgumentTypeError(
                f"spark_cluster({', '.join(sorted(unknown))}=...): it takes executors, cores, "
                "memory (MiB), gpus_per_executor and confs"
            )
        if not isinstance(confs, Mapping):
            raise ArgumentTypeError(
                f"spark_cluster(confs={checked.shown(confs)}): give a dict of Spark's settings"
            )
        least = {"gpus_per_executor": 0}
        numbers = {
            name: checked.integer(name, value, at_least=least.get(name, 1))
            for name, value in given.items()
        }
        texts = tuple(sorted((str(name), str(value)) for name, value in confs.items()))
        return cls(**numbers, confs=texts)

    @property
    def master(self) -> str:
        """Spark's name for it."""
        return f"local-cluster[{self.executors},{self.cores},{self.memory}]"

    def settings(self, directory: Path) -> dict[str, str]:
        """Return Spark's settings; a script that finds GPUs is written into the directory."""
        settings = {
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.log.level": "ERROR",
            # logs of executors lie below this name, and other processes have theirs there, too
            "spark.deploy.appIdPattern": f"app-%s-%04d-{os.getpid()}",
        }
        if self.gpus_per_executor:
            addresses = [str(number) for number in range(self.gpus_per_executor)]
            text = json.dumps({"name": "gpu", "addresses": addresses})
            script = directory / f"find-{self.gpus_per_executor}-gpus.sh"
            script.write_text(f"#!/bin/sh\necho '{text}'\n")
            script.chmod(0o755)
            settings["spark.worker.resource.gpu.discoveryScript"] = str(script)
            settings["spark.worker.resource.gpu.amount"] = str(self.gpus_per_executor)
            settings["spark.executor.resource.gpu.amount"] = str(self.gpus_per_executor)
            settings["spark.task.resource.gpu.amount"] = "1"
        return {**settings, **dict(self.confs)}


class Clusters:
    """The cluster that the tests of this process use at the moment."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="clusters-of-tests-"))
        self._kind: tuple[Shape, bool] | None = None
        self._session: Any = None
        self._server: subprocess.Popen[bytes] | None = None

    def session(self, shape: Shape) -> SparkSession:
        """Return a session on such a cluster; one on another cluster is stopped."""
        if self._kind != (shape, False) or self._has_ended():
            self.stop()
            self._refuse_foreign_session()
            self._session = self._build(shape)
            self._kind = shape, False
        return self._session

    def connect(self, shape: Shape) -> SparkSession:
        """Return a Spark Connect session on such a cluster."""
        if self._kind != (shape, True):
            self.stop()
            self._refuse_foreign_session()
            address = self._start_server(shape)
            from pyspark.sql import SparkSession

            self._session = SparkSession.builder.remote(address).create()
            self._kind = shape, True
        return self._session

    def stop(self) -> None:
        """Stop the session, and what was started for it."""
        session, self._session, kind, self._kind = self._session, None, self._kind, None
        if session is not None:
            logs = None
            if kind is not None and not kind[1]:
                with contextlib.suppress(Exception):  # it may have ended
                    logs = _logs_of(session)
            with contextlib.suppress(Exception):
                session.stop()
            if logs is not None:
                shutil.rmtree(logs, ignore_errors=True)
        if self._server is not None:
            self._server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(10)
            self._server.kill()
            self._server.wait()
            self._server = None

    def close(self) -> None:
        """Stop everything, for good."""
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _has_ended(self) -> bool:
        try:
            return bool(self._session.sparkContext._jsc is None)
        except Exception:  # noqa: BLE001 - a session that a test has stopped fails in many ways
            return True

    def _refuse_foreign_session(self) -> None:
        pyspark = sys.modules.get("pyspark")
        context = getattr(getattr(pyspark, "SparkContext", None), "_active_spark_context", None)
        if context is not None:
            raise ConfigurationError(
                f"there is a SparkSession already, on {context.master}, and a process has one at a "
                "time: stop it before the fixture spark_cluster is used, or use the fixture for "
                "all tests"
            )

    def _build(self, shape: Shape) -> Any:
        try:
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise ConfigurationError(
                f"the fixture spark_cluster needs pyspark ({error}): {INSTALL_SPARK}"
            ) from error
        builder: Any = SparkSession.builder.master(shape.master).appName("tests")
        for name, value in shape.settings(self._directory).items():
            builder = builder.config(name, value)
        with _environment():
            return builder.getOrCreate()

    def _start_server(self, shape: Shape) -> str:
        import pyspark

        home = Path(pyspark.__file__).parent
        if not list((home / "jars").glob("spark-connect_*.jar")):
            raise ConfigurationError(
                f"pyspark {pyspark.__version__} comes without Spark Connect's server: install "
                "pyspark>=4.0 with pip install 'pyspark[connect]'"
            )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(home / "bin" / "spark-submit"), "--master", shape.master]
        command += ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer"]
        settings = {**shape.settings(self._directory), "spark.connect.grpc.binding.port": str(port)}
        for name, value in settings.items():
            command += ["--conf", f"{name}={value}"]
        log = self._directory / "connect.log"
        with _environment(), log.open("wb") as sink:
            self._server = subprocess.Popen(
                [*command, "spark-internal"], stdout=sink, stderr=sink, stdin=subprocess.DEVNULL
            )
        end_by = time.monotonic() + SERVER_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return f"sc://127.0.0.1:{port}"
            if self._server.poll() is not None or time.monotonic() >= end_by:
                told = log.read_text(errors="replace")[-2000:]
                raise ConfigurationError(f"Spark Connect's server did not start:\n{told}")
            time.sleep(0.05)


@contextlib.contextmanager
def _environment() -> Any:
    """Let executors use this Python, and JVMs start quickly, unless the user chose otherwise."""
    before = dict(os.environ)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("JDK_JAVA_OPTIONS", _QUICK_JVM)
    try:
        yield
    finally:
        for name in ("JDK_JAVA_OPTIONS",):
            if name not in before:
                os.environ.pop(name, None)


def _logs_of(session: Any) -> Path:
    """Return where the executors of local-cluster write their logs."""
    import pyspark

    return Path(pyspark.__file__).parent / "work" / str(session.sparkContext.applicationId)
