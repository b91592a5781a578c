"""Workers forked from a process that has the frameworks imported. Runs in: the task.

See processes/worker/warm.py for that process, which the first task that wants it starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from horovodrunner.flows.call.import_path import start_command
from horovodrunner.pickling.installed import holds_installed_packages
from horovodrunner.placement.environment import IMPORT_PATH
from horovodrunner.wire.peers import is_our_own

__all__ = ["ForkedWorker", "fork_worker"]

IDLE_SECONDS = 600.0
"""How long the warm parent waits for another run."""

STARTING_SECONDS = 10.0
"""How long the warm parent may take to listen; its imports come after that."""

END_SECONDS = 5.0
"""How long ending a worker may take."""

_CAN_BE_FORKED = frozenset({"numpy", "torch", "torch._dynamo", "horovod.torch"})
"""Modules that start no threads when they are imported; TensorFlow does."""

_WORD = struct.Struct(">q")
"""What the warm parent answers with: the worker's process id, later its exit status."""


class ForkedWorker:
    """A worker that is the warm parent's child; used as one of our own is (process.py)."""

    def __init__(self, connection: socket.socket, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self._connection = connection
        self.stdout = stdout
        self.stderr = stderr
        self.pid = 0
        """Its process id; 0 until the warm parent has imported what it has to, and forked it."""
        self.returncode: int | None = None
        self._status: int | None = None
        self._wanted: signal.Signals | None = None
        self._changing = threading.Lock()
        self._ended = threading.Event()
        self._reader = threading.Thread(target=self._read, name="horovodrunner-warm", daemon=True)
        self._reader.start()

    def wait_for_end(self) -> int | None:
        """Block until the process has ended; its process group can still be signalled then."""
        self._ended.wait()
        return self._status

    def has_ended(self) -> bool:
        """Return whether the process has ended."""
        return self._ended.is_set()

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the worker's process group, as soon as there is one."""
        with self._changing:
            self._wanted = number
            if self.pid and self.returncode is None:
                _signal_group(self.pid, number)

    def wait(self) -> int:
        """End what is left of the process group, and give the worker's exit status."""
        if self.returncode is None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)  # the warm parent sees to it
            self._reader.join(END_SECONDS)
            with self._changing:
                self.returncode = -signal.SIGKILL if self._status is None else self._status
            self._connection.close()
        return self.returncode

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            if (pid := self._read_word()) is not None:
                with self._changing:
                    self.pid = pid
                    if self._wanted is not None:
                        _signal_group(pid, self._wanted)
                self._status = self._read_word()
                if self._status is None:  # the warm parent is gone, and nobody watches the worker
                    _signal_group(pid, signal.SIGKILL)
        self._ended.set()
        with contextlib.suppress(OSError):
            self._read_word()  # ends when the process group is gone

    def _read_word(self) -> int | None:
        data = self._connection.recv(_WORD.size, socket.MSG_WAITALL)
        return int(_WORD.unpack(data)[0]) if len(data) == _WORD.size else None


def fork_worker(
    owner: int,
    early_imports: Sequence[str],
    environment: Mapping[str, str],
    descriptors: Sequence[int],
) -> ForkedWorker | None:
    """Have a worker forked by a process that has imported what main needs."""
    if not (early_imports and _CAN_BE_FORKED.issuperset(early_imports)):
        return None
    if not (_has_pidfds() and hasattr(socket, "SO_PEERCRED")):
        return None
    connection = _connect(owner, early_imports, environment)
    if connection is None:
        return None
    out_read, out_write = os.pipe()
    error_read, error_write = os.pipe()
    try:
        socket.send_fds(connection, [b"w"], [out_write, error_write, *descriptors])
    except OSError:
        connection.close()
        os.close(out_read)
        os.close(error_read)
        return None
    finally:
        os.close(out_write)
        os.close(error_write)
    stdout, stderr = (os.fdopen(fd, "rb", buffering=0) for fd in (out_read, error_read))
    return ForkedWorker(connection, stdout, stderr)


def _has_pidfds() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # not Linux, or before 5.3
        return False
    return True


def _connect(
    owner: int, early_imports: Sequence[str], environment: Mapping[str, str]
) -> socket.socket | None:
    address = _address(owner, early_imports, environment)
    if (connection := _try_to_connect(address)) is not None:
        return connection
    command = [*start_command("horovodrunner.processes.worker"), "--keep-warm", address]
    command += ["--owner", str(owner), "--idle-seconds", str(IDLE_SECONDS)]
    for module in early_imports:
        command += ["--import", module]
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None  # noqa: S101 - a pipe
    with process.stdout as output:
        select.select([output], [], [], STARTING_SECONDS)  # ends when it listens, or has failed
    process.wait()  # it has left this process, or another task's was faster
    return _try_to_connect(address)


def _try_to_connect(address: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect("\0" + address)
    except OSError:
        connection.close()
        return None
    if not is_our_own(connection):
        connection.close()
        return None
    return connection


def _address(owner: int, early_imports: Sequence[str], environment: Mapping[str, str]) -> str:
    """Name the warm parent that fits: anything that could change what an import does counts."""
    changed = {  # by pip, for one
        directory: Path(directory).stat().st_mtime_ns
        for directory in json.loads(environment.get(IMPORT_PATH, "[]"))
        if Path(directory).exists() and holds_installed_packages(directory)
    }
    facts = {
        "owner": owner,  # the warm parent is gone before that number is used anew
        "command": start_command("horovodrunner.processes.worker"),
        "directory": os.getcwd(),  # noqa: PTH109
        "imports": list(early_imports),
        "environment": dict(environment),
        "changed": changed,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"horovodrunner-{os.getuid()}-{owner}-{digest[:40]}"


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
