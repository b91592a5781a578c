"""What a test leaves behind: processes, threads, ports and files of runs. Runs in: the driver."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path

import psutil

__all__ = ["end_what_is_left", "present"]

LEAVING_SECONDS = 10.0
"""How long what is left may take to leave by itself. Only a test that fails waits for so long."""

_SESSIONS = ("java", "pyspark.daemon", "pyspark/daemon", "resource_tracker", "--keep-warm")
"""Commands of what belongs to a session, not to a run."""

_OURS = "horovodrunner"


def present() -> set[str]:
    """List what there is: children of this process, its threads and ports, and files of runs."""
    return {*_processes(), *_threads(), *_ports(), *_files()}


def end_what_is_left(before: set[str]) -> list[str]:
    """Wait until nothing is there that was not before; return what stays, and kill processes."""
    end_by = time.monotonic() + LEAVING_SECONDS
    while (left := present() - before) and time.monotonic() < end_by:
        time.sleep(0.02)
    for what in left:
        kind, number, *_ = what.split()
        if kind == "process":
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(number.rstrip(":")))
                for each in [*process.children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
    return sorted(left)


def _processes() -> set[str]:
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = " ".join(child.cmdline())
            is_of_session = any(word in command for word in _SESSIONS)
            if command and not is_of_session and child.status() != psutil.STATUS_ZOMBIE:
                found.add(f"process {child.pid}: {command[:200]}")
    return found


def _threads() -> set[str]:
    return {
        f"thread {thread.name}"
        for thread in threading.enumerate()
        if thread.name.startswith((_OURS, "asyncio")) or not thread.daemon
    }


def _ports() -> set[str]:
    with contextlib.suppress(psutil.Error):
        return {
            f"port {each.laddr.port}"
            for each in psutil.Process().net_connections("tcp")
            if each.status == psutil.CONN_LISTEN
        }
    return set()


def _files() -> set[str]:
    root = Path(tempfile.gettempdir())
    own = os.getuid()
    found = set()
    for path in root.glob(f"{_OURS}*"):
        with contextlib.suppress(OSError):
            if path.stat().st_uid == own:
                found.add(f"file {path}")
    return found
