"""How a worker ended that reported no outcome. Runs in: the task."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

from horovodrunner.formatting import format_bytes
from horovodrunner.memory_limit import address_space_limit
from horovodrunner.wire.signals import EXIT_WITHOUT_PIPES

__all__ = ["ExitStatus", "OomWitness", "describe_exit"]

ExitStatus = int
"""As in subprocess: the exit code, or minus the signal's number."""

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_KERNEL_LOG = "/dev/kmsg"
_RECORD_BYTES = 16 * 1024
_MAX_LIMIT = 2**60
"""A larger limit stands for none."""


class OomWitness:
    """Counts the kernel's out-of-memory kills in this process's control group, from now on.

    The files are those that Linux documents for control groups of version 1 and 2; none of them
    need be readable.
    """

    def __init__(self) -> None:
        self._before = _oom_kills(os.getpid())
        self._since = time.monotonic()

    def explain(self, pid: int) -> str:
        """Return what is known about a process that was killed."""
        if line := _kernel_log_line(pid, self._since):
            return f"the kernel's log says: {line}"
        kills = _oom_kills(pid)
        if kills is None:
            return ""
        same_group = _memory_group(pid) == _memory_group(os.getpid())
        new = kills - (self._before or 0) if same_group else kills
        if new <= 0:
            return ""
        limit = _memory_limit(pid)
        times = "once" if new == 1 else f"{new} times"
        of = f" of {format_bytes(limit)}" if limit is not None else ""
        return (
            f"its control group ({_memory_group(pid)}) counts that the kernel killed for memory "
            f"{times}: its limit{of} was reached"
        )


def _memory_group(pid: int) -> Path | None:
    """Find the directory of the control group that limits a process's memory."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            roots = {"memory": [_CGROUP_ROOT / "memory"], "": [_CGROUP_ROOT]}
            for root in roots.get(controllers, []):
                # Within a container, the path may be the one outside of it.
                for group in (root / path.lstrip("/"), root):
                    if _read_oom_kills(group) is not None:
                        return group
    return None


def _oom_kills(pid: int) -> int | None:
    group = _memory_group(pid)
    return _read_oom_kills(group) if group is not None else None


def _read_oom_kills(group: Path) -> int | None:
    for name in ("memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError):
            text = (group / name).read_text(encoding="ascii")
            if found := re.search(r"^oom_kill (\d+)$", text, re.MULTILINE):
                return int(found[1])
    return None


def _memory_limit(pid: int) -> int | None:
    group = _memory_group(pid)
    for name in ("memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            limit = int((group / name).read_text(encoding="ascii"))  # type: ignore[operator]
            return limit if limit < _MAX_LIMIT else None
    return None


def _kernel_log_line(pid: int, since: float) -> str:
    """Find the kernel's own line about a killed process, where its log may be read.

    A record is "priority,number,microseconds since boot,flags;text". Process ids are used anew,
    so older records do not count.
    """
    try:
        fd = os.open(_KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    found = ""
    with contextlib.closing(os.fdopen(fd, "rb", buffering=0)) as log, contextlib.suppress(OSError):
        while record := log.read(_RECORD_BYTES):  # None after the last one
            head, _, text = record.decode(errors="replace").partition(";")
            is_new = float(head.split(",")[2]) / 1e6 > since - 1.0
            if is_new and re.search(rf"Killed process {pid}\b", text):
                found = text.splitlines()[0]
    return found


def describe_exit(
    status: ExitStatus, killed_by_kernel: str = "", when: str = ""
) -> tuple[str, int | None, str | None]:
    """Return how a process ended in words, its exit code, and its signal's name."""
    if status == EXIT_WITHOUT_PIPES:
        text = (
            "main closed the descriptors by which the worker process talks to its task "
            "(os.closerange?), so that what it returned or raised cannot be reported: close only "
            "what main has opened"
        )
        return text, status, None
    if status >= 0:
        return f"the worker process left with exit code {status} {when}".rstrip(), status, None
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    text = f"the worker process was ended by {name}"
    if name == "SIGKILL":
        text += (
            f" because memory ran out: {killed_by_kernel}"
            if killed_by_kernel
            else ", most likely by the kernel because memory ran out, or by an operator"
        )
    elif name in {"SIGABRT", "SIGBUS", "SIGSEGV", "SIGTRAP"} and (limit := address_space_limit()):
        text += f", perhaps because memory ran out: {limit}"
    return text, None, name
