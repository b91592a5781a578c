"""What all rungs share: nothing may be left behind by any test."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import multiprocessing  # noqa: TID251 -- to see whether there are children
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests import processes

if TYPE_CHECKING:
    from horovodrunner.testing.clusters import Clusters

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ROOT / "build" / "spark.jsa"
"""Made by scripts/archive_classes.py: another third of the time of a JVM that lives for seconds."""

os.environ["JDK_JAVA_OPTIONS"] = (
    "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    " -XX:+UnlockDiagnosticVMOptions -XX:-BytecodeVerificationRemote"
)
"""The JVMs of tests live for seconds: compiling and verifying would be a third of their time."""
if CLASSES.exists():
    # Without the log: a JVM that the archive does not fit would say so on its standard output.
    os.environ["JDK_JAVA_OPTIONS"] += f" -XX:SharedArchiveFile={CLASSES} -Xlog:disable"

# A shell that starts the tests in the background has SIGINT ignored, by all their children, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.pop("PYTHONUNBUFFERED", None)  # output must be shown at once without it

TEMPORARY = tempfile.mkdtemp(prefix="tests-of-horovodrunner-")
os.environ["TMPDIR"] = os.environ["SPARK_LOCAL_DIRS"] = tempfile.tempdir = TEMPORARY
"""Another test session on this machine has files of its own."""

HAS_TORCH = importlib.util.find_spec("torch") is not None
"""Not in "make test-python": see scripts/newest.py."""

_ALLOWED = ("java", "pyspark.daemon", "pyspark/daemon", "resource_tracker", "ipykernel")
_JANITOR = ("horovodrunner-scratch", "rm -rf -- ")
"""Outlives a task that was killed, to delete its files."""


_STARTS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"}
"""The events that Python tells its audit hooks when a process is started."""

_some_may_run = True
"""Whether there is a process to look for: reading what all of this machine have takes long."""


def _note_start(event: str, _: object, starts: set[str] = _STARTS) -> None:
    global _some_may_run
    if event in starts:  # also when the interpreter ends, and this module is empty
        _some_may_run = True


def marked_processes(*, with_janitors: bool = False) -> list[str]:
    """List what this test session started, directly or through Spark, and what is ours."""
    global _some_may_run
    if not (_some_may_run or multiprocessing.active_children()):
        return []
    allowed = _ALLOWED if with_janitors else (*_ALLOWED, *_JANITOR)
    _some_may_run = False
    found = [
        (pid, processes.command_of(pid)) for pid in processes.pids_of(os.environ[processes.MARK])
    ]
    _some_may_run |= bool(found)
    return [
        f"process {pid}: {command}"
        for pid, command in found
        if command
        and not any(word in command for word in allowed)
        and not _is_warm_parent(pid, command)
    ]


def _is_warm_parent(pid: int, command: str) -> bool:
    """Tell it, which ends with its session, from its forks, whose command is the same."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid).ppid()
        return "--keep-warm" in command and "--keep-warm" not in processes.command_of(parent)
    return False


def workers_left() -> list[str]:
    """Wait until no worker is left; a killed executor cannot wait for its own."""
    deadline = time.monotonic() + processes.LEAVING_SECONDS
    while (left := marked_processes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def own_threads() -> set[str]:
    """List the threads that are this package's, or would keep the interpreter from leaving."""
    return {
        f"thread {thread.name}"
        for thread in threading.enumerate()
        if thread.name.startswith(("horovodrunner", "asyncio")) or not thread.daemon
    }


def listening_sockets() -> set[str]:
    """List the ports this process listens on."""
    return {
        f"port {connection.laddr.port}"
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def temporary_files() -> set[str]:
    """List this package's files in the temporary directory, and in those of Spark's executors."""
    found = [*Path(TEMPORARY).glob("horovodrunner*"), *Path(TEMPORARY).glob("spark-*/*/horovodr*")]
    return {f"file {path}" for path in found}


def _present() -> set[str]:
    return {
        *marked_processes(with_janitors=True),
        *own_threads(),
        *listening_sockets(),
        *temporary_files(),
    }


def pytest_configure() -> None:
    """Not on import: ranks import this, too, with the module of a test's main."""
    processes.guard(TEMPORARY)
    sys.addaudithook(_note_start)


RUNGS = ["corpus", "docs", "horovod", "spark", "process", "unit"]
"""In the order of how long their files take: the short ones keep all workers busy to the end."""


@functools.cache
def uses_the_session(file: Path) -> bool:
    """Return whether a file's tests share the ``spark`` session."""
    return re.search(r'usefixtures\("spark"\)|\bspark: Any\b', file.read_text()) is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let xdist's workers begin with what takes long."""

    def order(item: pytest.Item) -> tuple[bool, int]:
        folder = item.path.parent.name
        return not uses_the_session(item.path), RUNGS.index(folder) if folder in RUNGS else 0

    if hasattr(config, "workerinput"):
        items.sort(key=order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand each file to one worker, and all that share the ``spark`` session to the same one."""
    from xdist.scheduler import LoadFileScheduling

    class OneSession(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "one session" if uses_the_session(config.rootpath / file) else file

    config.option.loadscopereorder = False
    return OneSession(config, log) if config.option.dist == "loadfile" else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip a test that needs torch where there is none."""
    try:
        yield
    except Exception as error:
        if HAS_TORCH or "No module named 'torch'" not in str(error):
            raise
        pytest.skip("needs torch")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a process, a thread, a port or a file; end its processes."""
    before = _present()
    yield
    deadline = time.monotonic() + processes.LEAVING_SECONDS
    while (left := _present() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    for what in left & {*marked_processes(with_janitors=True)}:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(what.split()[1].rstrip(":")))
            for one in [*process.children(recursive=True), process]:
                one.kill()
    assert not left, f"left behind: {sorted(left)}"


@pytest.fixture(autouse=True)
def executors_use_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sessions that tests or their subprocesses start use this environment."""
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def spark(_spark_clusters: Clusters) -> Any:
    """The plugin's spark_cluster, for fixtures of modules, too; in between there are others."""
    from horovodrunner.testing.clusters import Shape

    return _spark_clusters.session(Shape())


@pytest.fixture
def executor_logs(spark: Any) -> Path:
    """The directory in which the executors of local-cluster write their logs."""
    from horovodrunner.testing.clusters import logs_of

    return logs_of(spark)
