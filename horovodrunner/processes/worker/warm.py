"""A process that has the frameworks imported and forks workers. Runs in: the warm parent.

It holds nothing of any run: no user code, no slot, no open device. A worker is a fork of it, which
sees what a fresh process sees after the same imports. It serves tasks of its own user that came
with the same environment, and ends with the session, when nobody has needed it for a while, or when
runs of its session need another one. See ADR 19 and ADR 23 for what was weighed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from horovodrunner.pickling.installed import holds_installed_packages, is_of_a_python
from horovodrunner.placement.environment import IMPORT_PATH
from horovodrunner.wire.peers import is_our_own

__all__ = ["DESCRIPTORS", "WarmParent"]

DESCRIPTORS = ("stdout", "stderr", "control", "report", "stacks", "metrics", "result")
"""What a task sends for its worker, in this order; the last one is not always there."""

_WORD = struct.Struct(">q")
"""What the parent answers with: the worker's process id, later its exit status."""

MAX_PARENTS = 2
"""So many stay for one session: each holds 300 MiB, and runs differ in what they need."""

_BEGUN, _REPLACED = b"b", b"r"
"""What another parent of the same session sends: it asks when this one began, or has it end. A task
sends another byte."""

_NOT_OF_USERS = frozenset(
    {"__main__", "__mp_main__", "horovodrunner", "sitecustomize", "usercustomize"}
)

_HARMLESS_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "pts/", "ptmx", "shm/")

_REQUEST_SECONDS = 1.0
"""A task sends its descriptors at once; others wait no longer than this for one that does not."""


@dataclass
class _Child:
    """A worker, until its task has taken note of its end."""

    pid: int
    pidfd: int


class WarmParent:
    """Forks workers for the tasks that connect."""

    def __init__(
        self, address: str, owner: int, idle_seconds: float, listener: int | None = None
    ) -> None:
        self._address = address
        self._begun = time.monotonic_ns()
        self._idle_seconds = idle_seconds
        self._owner_fd = os.pidfd_open(owner)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=listener)
        if listener is None:
            self._listener.bind("\0" + address)
            self._listener.listen(128)
        self._listens = True
        self._selector = selectors.DefaultSelector()
        self._children: dict[socket.socket, _Child] = {}
        self.may_fork = listener is None
        """Whether workers can be forks; or else they become fresh processes."""

    def detach(self) -> None:
        """Leave the task that started us: it sees its child end, and its standard output.

        The stream objects stay: they have seen a pipe, and write to the worker's in a fork.
        """
        self.may_fork = _threads() == 1  # what starts with Python is lost here, too
        if os.fork():
            os._exit(0)
        _end_the_oldest(self._address)
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)

    def serve(self) -> dict[str, int]:
        """Fork workers until the session ends or nobody needs any; call it after the imports."""
        if self.may_fork and not _is_fit_to_fork():
            self._forget_imports()
        gc.freeze()  # what was imported stays shared: the collector does not touch it
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._owner_fd, selectors.EVENT_READ)
        used = time.monotonic()
        while True:
            if self._children:
                used = time.monotonic()
            left = used + self._idle_seconds - time.monotonic()
            if left <= 0 and not self._children:
                if not self._listens:
                    os._exit(0)
                if (descriptors := self._accept_the_last()) is not None:
                    return descriptors
                continue
            for key, _ in self._selector.select(max(0.0, left)):
                if key.fileobj == self._owner_fd:
                    os._exit(0)
                if key.fileobj is self._listener:
                    descriptors = self._accept()
                    if descriptors is not None:
                        return descriptors
                    used = time.monotonic()
                elif isinstance(key.fileobj, socket.socket):
                    self._forget(key.fileobj)
                else:
                    self._report_end(key.data)

    def _accept_the_last(self) -> dict[str, int] | None:
        """Take in nobody any more but those who have connected by now."""
        self._listens = False
        self._selector.unregister(self._listener)
        self._listener.shutdown(socket.SHUT_RD)
        self._listener.setblocking(False)
        while True:
            try:
                descriptors = self._accept()
            except OSError:
                self._listener.close()
                return None
            if descriptors is not None:
                return descriptors

    def _forget_imports(self) -> NoReturn:
        """Become a small process that only starts others."""
        os.set_inheritable(self._listener.fileno(), True)
        os.environ[IMPORT_PATH] = json.dumps(sys.path)
        command = [*sys.orig_argv, "--listener", str(self._listener.fileno())]
        os.execv(sys.executable, command)  # noqa: S606 - that is what it is for

    def _accept(self) -> dict[str, int] | None:
        """Fork a worker for a task; gives its descriptors in the worker, and nothing here."""
        connection, _ = self._listener.accept()
        received: list[int] = []
        connection.settimeout(_REQUEST_SECONDS)
        with contextlib.suppress(OSError):
            if is_our_own(connection):
                wanted, received, _, _ = socket.recv_fds(connection, 1, len(DESCRIPTORS))
                if wanted == _REPLACED:
                    self._idle_seconds = 0.0
                elif wanted == _BEGUN:
                    connection.sendall(_WORD.pack(self._begun))
        if len(received) < len(DESCRIPTORS) - 1:
            _close(received)
            connection.close()
            return None
        leads_group, tell_leads_group = os.pipe()
        try:
            pid = os.fork()
        except OSError:  # no memory, or too many processes: the task sees that nobody comes
            _close([leads_group, tell_leads_group, *received])
            connection.close()
            return None
        if pid == 0:
            os.setsid()
            _close([leads_group, tell_leads_group])
            connection.close()
            descriptors = self._become_worker(received)
            if not self.may_fork:
                _start_anew(descriptors)
            return descriptors
        _close([tell_leads_group, *received])
        os.read(leads_group, 1)  # ends when the worker's process group is there to be signalled
        os.close(leads_group)
        child = _Child(pid, os.pidfd_open(pid))
        self._children[connection] = child
        self._selector.register(connection, selectors.EVENT_READ)
        self._selector.register(child.pidfd, selectors.EVENT_READ, connection)
        with contextlib.suppress(OSError):
            connection.sendall(_WORD.pack(pid))
        return None

    def _become_worker(self, received: Sequence[int]) -> dict[str, int]:
        for connection, child in self._children.items():
            connection.close()
            os.close(child.pidfd)
        self._selector.close()
        self._listener.close()
        os.close(self._owner_fd)
        descriptors = dict(zip(DESCRIPTORS, received, strict=False))
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(descriptors[name], number)
            os.close(descriptors[name])
        _forget_what_forks_share()
        return descriptors

    def _report_end(self, connection: socket.socket) -> None:
        """Report how a worker ended; the zombie stays, so that its group keeps its id."""
        child = self._children.get(connection)
        if child is None:  # its task had gone at the same time
            return
        self._selector.unregister(child.pidfd)
        end = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert end is not None  # noqa: S101 - the pidfd said so
        status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        with contextlib.suppress(OSError):
            connection.sendall(_WORD.pack(status))

    def _forget(self, connection: socket.socket) -> None:
        """End a worker, with its process group, whose task is gone or has taken note of its end."""
        child = self._children.pop(connection)
        with contextlib.suppress(KeyError):
            self._selector.unregister(child.pidfd)
        self._selector.unregister(connection)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        os.close(child.pidfd)
        connection.close()


def _end_the_oldest(address: str) -> None:
    """Have the session's oldest warm parents end as soon as no worker needs them."""
    of_session = "@" + address[: address.rindex("-") + 1]
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    names = {line.split()[-1] for line in lines}
    others = {name[1:] for name in names if name.startswith(of_session)} - {address}
    begun = {other: _send_to(other, _BEGUN) for other in others}
    for other in sorted(others, key=lambda other: begun[other])[: len(others) + 1 - MAX_PARENTS]:
        _send_to(other, _REPLACED)


def _send_to(address: str, what: bytes) -> float:
    """Send a byte to another warm parent; return its answer, or infinity if there is none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_REQUEST_SECONDS)
        connection.connect("\0" + address)
        connection.sendall(what)
        if answer := connection.recv(_WORD.size):
            return float(_WORD.unpack(answer)[0])
    return math.inf  # it is importing, so it is new; or it is gone


def _is_fit_to_fork() -> bool:
    """Whether a fork of this process is as good as a fresh one that has imported the same."""
    return _is_alone() and not _has_open_device() and not _holds_code_of_users()


def _has_open_device() -> bool:
    """Whether a GPU was opened, say: it would be of no use in a fork."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the directory's own descriptor
            target = os.readlink(link)  # noqa: PTH115 - a Path of it would be something else
            if target.startswith("/dev/") and not target[5:].startswith(_HARMLESS_DEVICES):
                return True
    return False


def _holds_code_of_users() -> bool:
    """Whether a module was imported that may be edited before the next run."""
    installed = tuple(entry for entry in sys.path if holds_installed_packages(entry))
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in _NOT_OF_USERS or not isinstance(file, str):
            continue
        if file.startswith("/") and not (is_of_a_python(file) or file.startswith(installed)):
            return True
    return False


def _is_alone() -> bool:
    """Whether forks are sound: no thread is left that a fork would lose.

    Libraries that prepare for forks (OpenBLAS) end their threads when one is about to happen, and
    start them again when they need them; so it is tried out.
    """
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return _threads() == 1


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _start_anew(descriptors: Mapping[str, int]) -> NoReturn:
    """Become a fresh process instead of a fork of this one."""
    os.environ[IMPORT_PATH] = json.dumps(sys.path)
    command = sys.orig_argv[:3]  # as start_command() gave it
    for name in DESCRIPTORS[2:]:
        if name in descriptors:
            os.set_inheritable(descriptors[name], True)
            command += [f"--{name}", str(descriptors[name])]
    os.execv(sys.executable, command)  # noqa: S606 - that is what it is for


def _forget_what_forks_share() -> None:
    """Make random what a fresh process has at random; Python's own generator does it itself."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "multiprocessing.process" in sys.modules:
        process = sys.modules["multiprocessing.process"].current_process()
        process.authkey = os.urandom(32)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
