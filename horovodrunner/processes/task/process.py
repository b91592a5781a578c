"""One worker process: spawn, feed, read, end it for sure. Runs in: the task (np < 0: the driver).

The worker leads a process group of its own, so that everything it starts can be ended with it.
It dies with its task in two ways: the task ends the group, or, when the task itself is killed,
the control pipe ends and the worker ends its group. (``PR_SET_PDEATHSIG`` would be faster than
that pipe and would leave the worker's own children behind.)
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import IO

import psutil

from horovodrunner.flows.call.import_path import start_command
from horovodrunner.processes.task.exits import ExitStatus, OomWitness
from horovodrunner.processes.task.output import OutputReader
from horovodrunner.processes.task.warm import fork_worker
from horovodrunner.wire.events import Ending, Event, Sink, encode
from horovodrunner.wire.signals import STACK_SIGNAL
from horovodrunner.wire.stream import read_event
from horovodrunner.wire.upload import in_thread

__all__ = ["DRAIN_SECONDS", "GRACE_SECONDS", "METRICS", "WorkerProcess"]

GRACE_SECONDS = 1.0
"""Time between asking a worker to end (SIGTERM) and ending it (SIGKILL)."""

STACK_SECONDS = 1.0
"""How long a worker may take to begin to show its stack."""

STACK_PAUSE_SECONDS = 0.2
"""A stack that has not gone on for so long is complete."""

DRAIN_SECONDS = 1.0
"""How long output is still read after a worker's end, when a process it left behind holds it."""

_OWN_FRAMES = re.compile(
    r'File "(?:.*/horovodrunner/(?:processes/worker/__main__|flows/script/worker)\.py'
    r'|<frozen runpy>)"'
    r'|File "<string>", line 1 in <module>$'  # the command itself
)
METRICS = "metrics"
"""The stream of lines in which a rank reports."""

PAUSES = {METRICS: 0.1}
"""Seconds for which a stream is left alone after something came; people read no faster."""

_DESCRIPTORS = ("control", "report", "stacks", METRICS, "result")

_PIPE_BYTES = 1024 * 1024
_EXIT_ON_SIGTERM = 128 + signal.SIGTERM

_logger = logging.getLogger(__name__)


class WorkerProcess:
    """A worker that imports what main needs and then waits for its job.

    `result_fd` is the file for what main returns; `keep_warm_with` a process with which the process
    may end that the worker is forked from.
    """

    def __init__(
        self,
        early_imports: Sequence[str],
        environment: Mapping[str, str],
        result_fd: int | None = None,
        keep_warm_with: int | None = None,
    ) -> None:
        control_read, self._control_write = os.pipe()
        report_read, report_write = os.pipe()
        stack_read, stack_write = os.pipe()
        metrics_read, metrics_write = os.pipe()
        self._report: IO[bytes] = os.fdopen(report_read, "rb", buffering=0)
        self._stacks: IO[bytes] = os.fdopen(stack_read, "rb", buffering=0)
        self._metrics: IO[bytes] = os.fdopen(metrics_read, "rb", buffering=0)
        self._oom = OomWitness()
        self.killed_by_kernel = ""
        """What the kernel says about a worker that SIGKILL ended; after :meth:`wait`."""
        self.spawned_at = time.time()
        self._has_events = False
        self._stopping = False
        self._killed = False
        self._kill_timer: asyncio.TimerHandle | None = None
        self._output: list[OutputReader] = []
        passed: list[int] = []
        try:
            for fd in (control_read, report_write, stack_write, metrics_write, result_fd):
                if fd is not None:  # 0 to 2 are free where this process has closed its streams
                    passed.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
            forked = None
            if keep_warm_with is not None:
                forked = fork_worker(keep_warm_with, early_imports, environment, passed)
            self._process = forked or _OwnWorker(early_imports, environment, passed)
        except BaseException:
            os.close(self._control_write)
            self._report.close()
            self._stacks.close()
            self._metrics.close()
            raise
        finally:
            for fd in (control_read, report_write, stack_write, metrics_write, *passed):
                os.close(fd)
        _logger.debug("worker %s: %s", "forked" if forked else "spawned", self.pid or "(to come)")

    @property
    def pid(self) -> int:
        """The worker's process id, which is its process group's too."""
        return self._process.pid

    def was_stopped(self, status: ExitStatus) -> bool:
        """Return whether :meth:`stop` explains how the worker ended.

        A process that the kernel killed closes its connections a moment before it can be seen to
        have ended. Its peers may complain, and everybody may be told to stop, in between.
        """
        if not self._stopping:
            return False
        return status in (0, _EXIT_ON_SIGTERM, -signal.SIGTERM) or (
            status == -signal.SIGKILL and self._killed
        )

    async def send(self, event: Event) -> None:
        """Write an event to the control pipe, in a thread: a job may be larger than the pipe."""
        with contextlib.suppress(OSError):  # the worker's end is reported by wait()
            await asyncio.to_thread(self._write, *encode(event))
            self._has_events = True

    def _write(self, *parts: bytes) -> None:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(self._control_write, view[:_PIPE_BYTES]) :]

    async def stack(self) -> str:
        """Ask the worker where its threads are; it need not be able to run Python for that."""
        os.kill(self.pid, STACK_SIGNAL)
        text = b""
        async with _reading(os.fdopen(os.dup(self._stacks.fileno()), "rb", buffering=0)) as reader:
            pause = STACK_SECONDS
            with contextlib.suppress(asyncio.TimeoutError):
                while piece := await asyncio.wait_for(reader.read(_PIPE_BYTES), pause):
                    text += piece
                    pause = STACK_PAUSE_SECONDS
        if not text:
            return f"(no stack: the process does not react to a signal; {_process_state(self.pid)})"
        return _of_the_user(text.decode(errors="replace"))

    async def read_output(self, on_lines: Callable[[str, bytes], None]) -> None:
        """Read stdout, stderr and what the rank reports until all end."""
        self._output = [
            OutputReader(pipe, functools.partial(on_lines, name), PAUSES.get(name))
            for name, pipe in self._streams().items()
            if pipe
        ]
        await asyncio.gather(*(reader.read_to_end() for reader in self._output))

    def _streams(self) -> dict[str, IO[bytes] | None]:
        return {
            "stdout": self._process.stdout,
            "stderr": self._process.stderr,
            METRICS: self._metrics,
        }

    def catch_up(self) -> None:
        """Take at once what the worker has printed and reported up to now."""
        for reader in self._output:
            reader.catch_up()

    async def read_events(self, emit: Sink) -> None:
        """Read what the worker reports until it ends."""
        async with _reading(self._report) as reader:
            while (event := await read_event(reader, max_body_bytes=None)) is not None:
                emit(event)

    async def wait(self) -> ExitStatus:
        """Wait for the worker's end, and end whatever it left behind in its process group."""
        status = await in_thread(self._process.wait_for_end)
        if self._kill_timer is not None:
            self._kill_timer.cancel()
        self._process.signal_group(signal.SIGKILL)
        if status == -signal.SIGKILL:
            self.killed_by_kernel = self._oom.explain(self.pid)
        return self._process.wait()

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Ask the worker's process group to end, and end it after a grace period in seconds."""
        if self._stopping or self.has_ended():
            return
        self._stopping = True
        self._announce_end()
        self._process.signal_group(signal.SIGTERM)
        self._kill_timer = asyncio.get_running_loop().call_later(grace, self._end_grace)

    def _announce_end(self) -> None:
        """Let a worker that takes SIGTERM for something else know this one."""
        with contextlib.suppress(OSError):
            room = select.poll()
            room.register(self._control_write, select.POLLOUT)
            if self._has_events and room.poll(0):  # not into the middle of its job
                os.write(self._control_write, b"".join(encode(Ending())))

    def _end_grace(self) -> None:
        self._killed = True
        self._process.signal_group(signal.SIGKILL)

    def kill(self) -> None:
        """End the process group at once and wait for the worker's end."""
        if self._process.returncode is None:
            self._process.signal_group(signal.SIGKILL)
            self._process.wait()
        for pipe in (*self._streams().values(), self._report, self._stacks):
            if pipe is not None:
                pipe.close()
        if self._control_write >= 0:
            os.close(self._control_write)
            self._control_write = -1

    def has_ended(self) -> bool:
        """Return whether the process has ended."""
        return self._process.has_ended()


class _OwnWorker:
    """A worker that is a child of this process."""

    def __init__(
        self, early_imports: Sequence[str], environment: Mapping[str, str], passed: Sequence[int]
    ) -> None:
        command = start_command("horovodrunner.processes.worker")
        for name, fd in zip(_DESCRIPTORS, passed, strict=False):
            command += [f"--{name}", str(fd)]
        for module in early_imports:
            command += ["--import", module]
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=passed,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.stdout = self._process.stdout
        self.stderr = self._process.stderr

    @property
    def returncode(self) -> ExitStatus | None:
        return self._process.returncode

    def wait_for_end(self) -> ExitStatus | None:
        # WNOWAIT leaves the zombie, so that the group's id cannot be used anew before the group
        # was ended.
        with contextlib.suppress(ChildProcessError):
            end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            if end is not None:
                return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        return None

    def has_ended(self) -> bool:
        if self._process.returncode is not None:
            return True
        flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
        return os.waitid(os.P_PID, self.pid, flags) is not None

    def signal_group(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def wait(self) -> ExitStatus:
        return self._process.wait()


@contextlib.asynccontextmanager
async def _reading(pipe: IO[bytes]) -> AsyncIterator[asyncio.StreamReader]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_PIPE_BYTES)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    try:
        yield reader
    finally:
        transport.close()


def _of_the_user(stacks: str) -> str:
    """Leave out what this package does in every worker: its thread, and the frames below main."""
    threads = stacks.split("\n\n")
    threads = [part for part in threads if "horovodrunner/processes/worker/control.py" not in part]
    lines = "\n\n".join(threads).splitlines()
    return "\n".join(line for line in lines if not _OWN_FRAMES.search(line))


def _process_state(pid: int) -> str:
    try:
        return f"its state is {psutil.Process(pid).status()!r}"
    except psutil.Error:
        return "it is gone"
