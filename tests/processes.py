"""The one way to start a process in a test: it ends with all its descendants, whatever happens.

What is started here inherits a mark, which begins with the mark of who started it. Whoever ends a
mark finds all that carry it: children in sessions of their own, workers, executors, JVMs. A guard
ends a test session's mark when the session's process is gone, however it went: Ctrl-C, a crash of
an xdist worker, pytest-timeout's ``os._exit``, SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, CompletedProcess, Popen, TimeoutExpired
from typing import Any, TypeAlias

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "CompletedProcess",
    "Process",
    "TimeoutExpired",
    "execute",
    "run",
    "started",
]

MARK = "HOROVOD_LEAK_MARK"
"""Workers inherit it, too: variables that start with HOROVOD_ travel."""

LEAVING_SECONDS = 30.0
"""How long what is left may take to leave by itself. Only a test that fails waits for so long."""

Process: TypeAlias = "Popen[str]"
"""For annotations: nobody starts one by this name."""


def run(
    command: Sequence[str | Path],
    *,
    input: str | None = None,  # noqa: A002 -- the name that subprocess.run has for it
    capture_output: bool = False,
    check: bool = False,
    timeout: float | None = None,
    **options: Any,
) -> CompletedProcess[str]:
    """Run a command as ``subprocess.run`` does, in text; nothing of it outlives the call.

    It needs no ``timeout`` (seconds): pytest's own ends the command as well.
    """
    if capture_output:
        options.update(stdout=PIPE, stderr=PIPE)
    if input is not None:
        options.update(stdin=PIPE)
    with started(command, **options) as process:
        output, errors = process.communicate(input, timeout)
    done = CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


@contextlib.contextmanager
def started(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Process]:
    """Start a command as ``subprocess.Popen`` does, in text and in a session of its own.

    If it still runs at the end of the ``with`` block, it is killed with all its descendants.
    If it has ended by then, it must have left none.
    """
    with _nothing_outlives() as mark:
        environment = {**(os.environ if env is None else env), MARK: mark}
        options = {"stdin": DEVNULL, "text": True, **options}
        process = Popen(command, env=environment, start_new_session=True, **options)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                end(mark)
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()


def execute(
    notebook: Any,
    *,
    env: Mapping[str, str] | None = None,
    interrupt_at: str | None = None,
    **options: Any,
) -> None:
    """Execute a notebook in a kernel; nothing of it outlives the call.

    ``interrupt_at`` is a text: the kernel is interrupted as soon as it prints it.
    """
    import nbclient

    class Client(nbclient.NotebookClient):  # type: ignore[misc]
        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            if interrupt_at and interrupt_at in msg["content"].get("text", ""):
                self.interrupting = asyncio.ensure_future(self.km.interrupt_kernel())
            return super().process_message(msg, cell, cell_index)

    with _nothing_outlives() as mark:
        environment = {**(os.environ if env is None else env), MARK: mark}
        Client(notebook, **options).execute(env=environment)


@contextlib.contextmanager
def _nothing_outlives() -> Iterator[str]:
    """Lend a new mark, end who has it in the end, and fail if that was needed after a success."""
    mark = _new_mark()
    try:
        yield mark
        left = wait_for_leaving(mark, LEAVING_SECONDS)
    finally:
        end(mark)
    assert not left, f"left behind: {left}"


def _new_mark() -> str:
    return f"{os.environ.get(MARK, '/')}{uuid.uuid4().hex[:16]}/"


def pids_of(mark: str) -> list[int]:
    """List the processes that were started with this mark, or with one that begins with it."""
    word = f"{MARK}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if word in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def wait_for_leaving(mark: str, seconds: float) -> list[str]:
    """Wait until nobody has the mark; describe who stays."""
    deadline = time.monotonic() + seconds
    while (left := pids_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [f"process {pid}: {command_of(pid)}" for pid in left]


def command_of(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return words.replace(b"\0", b" ").decode(errors="replace").strip()


def end(mark: str) -> None:
    """Kill all that have the mark, and what they start meanwhile."""
    while left := pids_of(mark):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def guard(directory: str) -> None:
    """End what this process starts from now on, and delete a directory, when it is gone itself."""
    mark = _new_mark()
    command = [sys.executable, __file__, str(os.getpid()), mark, directory]
    silent = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in range(3)]
    os.posix_spawn(command[0], command, os.environ, file_actions=silent, setsid=True)
    os.environ[MARK] = mark


def _stand_guard(pid: int, mark: str, directory: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(pid)], [], [])
    wait_for_leaving(mark, 2)
    end(mark)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    _stand_guard(int(sys.argv[1]), *sys.argv[2:])
