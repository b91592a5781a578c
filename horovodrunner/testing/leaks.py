"""What a test leaves behind: processes, threads, ports and files of runs. Runs in: the driver."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

__all__ = ["end_what_is_left", "present"]

LEAVING_SECONDS = 10.0
"""How long what is left may take to leave by itself. Only a test that fails waits for so long."""

MARK = "HOROVOD_LEAKS_OF"
"""Inherited by all that a test starts, in ranks on executors, too: HOROVOD_* travels."""

_SESSIONS = ("pyspark.daemon", "pyspark/daemon", "resource_tracker")
"""Commands of what belongs to a session, not to a run."""

_FORKING = ("--keep-warm", "multiprocessing.forkserver")
"""The same, but their forks, which have the same command, belong to who asked for them."""

_OURS = "horovodrunner"

_made: set[str] = set()
"""Temporary files of this process; other test sessions have theirs in the same directory."""


def present() -> dict[object, str]:
    """Return what there is, with a text for each."""
    _mark()
    return dict([*_processes(), *_threads(), *_ports(), *_files()])


def end_what_is_left(before: Mapping[object, str]) -> list[str]:
    """Wait until nothing is there that was not before; return what stays, and kill processes."""
    end_by = time.monotonic() + LEAVING_SECONDS
    while (left := _without(before)) and time.monotonic() < end_by:
        time.sleep(0.02)
    for process in left:
        if isinstance(process, psutil.Process):
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [*process.children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
    return sorted(left.values())


def _without(before: Mapping[object, str]) -> dict[object, str]:
    return {what: text for what, text in present().items() if what not in before}


@functools.cache
def _mark() -> str:
    """Let what is started and made from now on be known as this process's."""
    sys.addaudithook(_note_file)
    # tests around these ones find what begins with their mark
    mark = os.environ[MARK] = f"{os.environ.get(MARK, '')}/{uuid.uuid4().hex}"
    return mark


def _note_file(event: str, arguments: tuple[Any, ...], made: set[str] = _made) -> None:
    if event in ("tempfile.mkdtemp", "tempfile.mkstemp"):
        made.add(str(arguments[0]))


def _processes() -> Iterator[tuple[object, str]]:
    children = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process in children or process.environ().get(MARK, "").startswith(_mark()):
                command = " ".join(process.cmdline())
                if command and not _is_of_session(process, command):
                    yield process, f"process {process.pid}: {command[:200]}"


def _is_of_session(process: psutil.Process, command: str) -> bool:
    if process.status() == psutil.STATUS_ZOMBIE or process.name() == "java":
        return True
    for word in _FORKING:
        if word in command:
            parent = process.parent()
            return parent is None or word not in " ".join(parent.cmdline())
    return any(word in command for word in _SESSIONS)


def _threads() -> Iterator[tuple[object, str]]:
    for thread in threading.enumerate():
        if thread.name.startswith((_OURS, "asyncio")) or not thread.daemon:
            yield thread, f"thread {thread.name}"


def _ports() -> Iterator[tuple[object, str]]:
    with contextlib.suppress(psutil.Error):
        for each in psutil.Process().net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN:
                yield each.laddr, f"port {each.laddr.port}"


def _files() -> Iterator[tuple[object, str]]:
    for path in list(_made):
        if not Path(path).exists():
            _made.discard(path)
        elif Path(path).name.startswith(_OURS):
            yield path, f"file {path}"
