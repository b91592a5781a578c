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
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ConfigurationError
from horovodrunner.prerequisites import INSTALL_SPARK

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["Clusters", "Shape", "logs_of"]

SERVER_SECONDS = 120.0
"""How long Spark Connect's server may take to start."""

_CONNECT_MODE = "SPARK_CONNECT_MODE_ENABLED"
"""How PySpark remembers that sessions of this process are Spark Connect's."""

_OF_A_JVM = ("spark.driver.", "spark.jars")
"""What a JVM takes when it starts, and at no other time."""

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
        least = {"gpus_per_executor": 0, "memory": 512}  # Spark takes no less than 450 MiB
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

    @property
    def needs_own_jvm(self) -> bool:
        """Whether it has settings that a JVM takes only when it starts."""
        return any(name.startswith(_OF_A_JVM) for name, _ in self.confs)

    def settings(self, directory: Path) -> dict[str, str]:
        """Return Spark's settings; a script that finds GPUs is written into the directory."""
        settings = {
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.log.level": "ERROR",
            "spark.executor.memory": f"{self.memory}m",
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
        """The shape, and whether it is Spark Connect's."""
        self._session: Any = None
        self._server: subprocess.Popen[bytes] | None = None

    def session(self, shape: Shape) -> SparkSession:
        """Return a session on such a cluster; one on another cluster is stopped."""
        self._refuse_foreign_session()
        if self._kind != (shape, False) or self._has_ended():
            self.stop(for_shape=shape)
            self._session = self._build(shape)
            self._kind = shape, False
        return self._session

    def connect(self, shape: Shape) -> SparkSession:
        """Return a Spark Connect session on such a cluster."""
        self._refuse_foreign_session()
        if self._kind != (shape, True) or self._has_ended():
            self.stop()
            self._kind = shape, True
            address = self._start_server(shape)
            with warnings.catch_warnings():
                # what PySpark thinks of the installed pandas is nothing that a test did
                warnings.simplefilter("ignore", FutureWarning)
                from pyspark.sql import SparkSession

                self._session = SparkSession.builder.remote(address).create()
        return self._session

    def stop(self, for_shape: Shape | None = None) -> None:
        """Stop the session, and what was started for it.

        The JVM stays for the next shape, if its settings can be taken from it.
        """
        session, self._session, kind, self._kind = self._session, None, self._kind, None
        if kind is None:
            return
        shape, is_connect = kind
        # stopping what has ended would make PySpark forget the session that came after it
        if is_connect or session.sparkContext is _active_context():
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                session.stop()
        if is_connect:
            os.environ.pop(_CONNECT_MODE, None)  # PySpark would make no other session
            self._stop_server()
        else:
            is_same = for_shape == shape
            may_stay = for_shape is not None and not (
                shape.needs_own_jvm or for_shape.needs_own_jvm
            )
            if not (is_same or may_stay) or not _take_from_jvm(shape.settings(self._directory)):
                _end_jvm()
        for logs in _work_directory().glob(f"app-*-{os.getpid()}"):
            shutil.rmtree(logs, ignore_errors=True)

    def close(self) -> None:
        """Stop everything, for good."""
        if _active_context() in (None, self._own_context()):
            self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _stop_server(self) -> None:
        if self._server is not None:
            self._server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(10)
            self._server.kill()
            self._server.wait()
            self._server = None

    def _has_ended(self) -> bool:
        if self._kind is not None and self._kind[1]:
            return bool(self._session is None or self._session.is_stopped or self._is_server_gone())
        try:
            context = self._session.sparkContext
            return context._jsc is None or bool(context._jsc.sc().isStopped())
        except Exception:  # noqa: BLE001 - its JVM is gone
            return True

    def _is_server_gone(self) -> bool:
        return self._server is None or self._server.poll() is not None

    def _own_context(self) -> Any:
        if self._session is None or self._kind is None or self._kind[1]:
            return None
        return self._session.sparkContext

    def _refuse_foreign_session(self) -> None:
        context = _active_context()
        if context is not None and context is not self._own_context():
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
def _environment() -> Iterator[None]:
    """Let executors use this Python, and JVMs start quickly, unless the user chose otherwise."""
    ours = {"PYSPARK_PYTHON": sys.executable, "JDK_JAVA_OPTIONS": _QUICK_JVM}
    added = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def logs_of(session: Any) -> Path:
    """Return where the executors of local-cluster write their logs."""
    return _work_directory() / str(session.sparkContext.applicationId)


def _work_directory() -> Path:
    from pyspark.find_spark_home import _find_spark_home

    return Path(_find_spark_home()) / "work"


def _active_context() -> Any:
    pyspark = sys.modules.get("pyspark")
    return getattr(getattr(pyspark, "SparkContext", None), "_active_spark_context", None)


def _take_from_jvm(settings: Mapping[str, str]) -> bool:
    """Take settings out of the JVM, which has those of its start for all sessions, if it lives."""
    from pyspark import SparkContext

    try:
        for name in settings:
            SparkContext._jvm.java.lang.System.clearProperty(name)
    except Exception:  # noqa: BLE001 - py4j has an exception for each way in which a JVM ends
        return False
    return True


def _end_jvm() -> None:
    """End the JVM that PySpark has started for this process, and let it start another."""
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    gateway: Any = SparkContext._gateway
    process = getattr(gateway, "proc", None)
    if process is None:
        return  # there is none, or another process's
    gateway.shutdown()
    process.stdin.close()  # that is how it knows that it is not needed
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    SparkContext._gateway = SparkContext._jvm = SparkContext._active_spark_context = None
    sessions: Any = SparkSession
    sessions._instantiatedSession = sessions._activeSession = None
