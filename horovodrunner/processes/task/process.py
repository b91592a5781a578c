"""One worker process: spawn, feed, read its output, end it for sure. Runs in: the task.

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
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import IO

import psutil

from horovodrunner.flows.call.import_path import start_command
from horovodrunner.flows.logs.lines import LineAssembler
from horovodrunner.memory_limit import address_space_limit
from horovodrunner.processes.task.memory import OomWitness
from horovodrunner.processes.task.warm import fork_worker
from horovodrunner.wire.connection import read_frame
from horovodrunner.wire.frames import Frame, encode_frame, encode_prefix_and_header
from horovodrunner.wire.job import EXIT_WITHOUT_PIPES, STACK_SIGNAL

__all__ = ["GRACE_SECONDS", "ExitStatus", "WorkerProcess", "describe_exit"]

GRACE_SECONDS = 1.0
"""Time between asking a worker to end (SIGTERM) and ending it (SIGKILL)."""

STACK_SECONDS = 1.0
"""How long a worker may take to begin to show its stack."""

STACK_PAUSE_SECONDS = 0.2
"""A stack that has not gone on for so long is complete."""

DRAIN_SECONDS = 1.0
"""How long output is still read after a worker's end, when a process it left behind holds it."""

OUTPUT_PAUSE_SECONDS = 0.01
"""Output that comes within this time after other output is read together: per line it is dear."""

STATE_SECONDS = 1.0
"""Of a line that is drawn again and again, such as a progress bar, a state is taken so often."""

DRAWING_SECONDS = 0.05
"""How long a first state is left to be drawn, which may take several writes."""

OUTPUT_PIPE_BYTES = 256 * 1024
"""So much a worker may print before it has to wait for its task to read.

An unprivileged user's pipes may have 64 MiB in all; what is made beyond that gets a page each.
"""

_OWN_FRAMES = re.compile(
    r'File "(?:.*/horovodrunner/processes/worker/__main__\.py|<frozen runpy>)"'
    r'|File "<string>", line 1 in <module>$'  # the command itself
)
_PIPE_BYTES = 1024 * 1024
_EXIT_ON_SIGTERM = 128 + signal.SIGTERM

ExitStatus = int
"""As in subprocess: the exit code, or minus the signal's number."""


class WorkerProcess:
    """A worker that imports what main needs and then waits for its job.

    Parameters
    ----------
    early_imports
        Modules it may import at once.
    environment
        Its whole environment.
    result_fd
        The file for what main returns, if that is wanted.
    keep_warm_with
        The process as long as which imported frameworks are kept for further workers; None for
        a worker that does its imports itself.
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
        self._report: IO[bytes] = os.fdopen(report_read, "rb", buffering=0)
        self._stacks: IO[bytes] = os.fdopen(stack_read, "rb", buffering=0)
        self._oom = OomWitness()
        self._testimony = ""
        self.spawned_at = time.time()
        """Seconds since the epoch."""
        self.shows_stacks = False
        """Whether the worker is known to have installed its handler of STACK_SIGNAL."""
        self._stopping = False
        self._killed = False
        self._kill_timer: asyncio.TimerHandle | None = None
        self._output: list[_OutputReader] = []
        passed: list[int] = []
        try:
            for fd in (control_read, report_write, stack_write, result_fd):
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
            raise
        finally:
            for fd in (control_read, report_write, stack_write, *passed):
                os.close(fd)

    @property
    def pid(self) -> int:
        """The worker's process id, which is its process group's too."""
        return self._process.pid

    def was_stopped(self, status: ExitStatus) -> bool:
        """Tell whether :meth:`stop` explains how the worker ended.

        A process that the kernel killed closes its connections a moment before it can be seen to
        have ended. Its peers may complain, and everybody may be told to stop, in between.

        Parameters
        ----------
        status
            How it ended.

        Returns
        -------
        bool
            False if it ended by itself, or by a signal that was not ours.
        """
        if not self._stopping:
            return False
        return status in (0, _EXIT_ON_SIGTERM, -signal.SIGTERM) or (
            status == -signal.SIGKILL and self._killed
        )

    async def send_job(self, call: bytes, header: Mapping[str, object]) -> None:
        """Give the worker its job; the control pipe stays open.

        Parameters
        ----------
        call
            The pickled ``(main, kwargs)``.
        header
            The :class:`~horovodrunner.wire.job.WorkerSpec`'s fields.
        """
        # A pickle may be larger than the pipe's buffer, so the writing gets a thread.
        with contextlib.suppress(BrokenPipeError):  # the worker's end is reported by wait()
            await asyncio.to_thread(self._write_job, encode_frame("job", call, **header), call)

    def _write_job(self, *parts: bytes) -> None:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(self._control_write, view[:_PIPE_BYTES]) :]

    def answer(self, kind: str, **header: object) -> None:
        """Answer what the worker asked for in a report.

        Parameters
        ----------
        kind
            What was asked for.
        **header
            JSON-compatible fields.
        """
        with contextlib.suppress(OSError):  # the worker's end is reported by wait()
            self._write_job(encode_prefix_and_header(kind, 0, **header))

    async def stack(self) -> str:
        """Ask the worker where its threads are; it need not be able to run Python for that.

        Returns
        -------
        str
            Its Python stacks, or a sentence that says why there are none.
        """
        if not self.shows_stacks or self._has_ended():
            return "(no stack: main has not been called, or the process has ended)"
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

    def killed_by_kernel(self) -> str:
        """Say what the kernel tells about a worker that SIGKILL ended; after :meth:`wait`.

        Returns
        -------
        str
            A sentence, or "" when nothing can be read.
        """
        return self._testimony

    async def read_output(self, on_lines: Callable[[str, bytes], None]) -> None:
        """Read stdout and stderr until both end.

        Parameters
        ----------
        on_lines
            Called with ``"stdout"`` or ``"stderr"`` and whole lines.
        """
        streams = {"stdout": self._process.stdout, "stderr": self._process.stderr}
        self._output = [
            _OutputReader(pipe, functools.partial(on_lines, name))
            for name, pipe in streams.items()
            if pipe
        ]
        try:
            await asyncio.gather(*(reader.read_to_end() for reader in self._output))
        finally:
            for reader in self._output:
                reader.close()

    def catch_up(self) -> None:
        """Take at once what the worker has printed up to now."""
        for reader in self._output:
            reader.catch_up()

    async def read_reports(self, on_frame: Callable[[Frame], None]) -> None:
        """Read what the worker reports until it ends.

        Parameters
        ----------
        on_frame
            Called with each frame.
        """
        async with _reading(self._report) as reader:
            while (frame := await read_frame(reader, max_body_bytes=None)) is not None:
                on_frame(frame)

    async def wait(self) -> ExitStatus:
        """Wait for the worker's end, and end whatever it left behind in its process group.

        Returns
        -------
        int
            The exit code, or minus the signal's number.
        """
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        statuses: list[ExitStatus | None] = []

        def watch() -> None:
            statuses.append(self._process.wait_for_end())
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=watch, name="horovodrunner-wait", daemon=True).start()
        await ended.wait()
        if self._kill_timer is not None:
            self._kill_timer.cancel()
        self._signal(signal.SIGKILL)
        if statuses[0] == -signal.SIGKILL:
            self._testimony = self._oom.testimony(self.pid)
        return self._process.wait()

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Ask the worker's process group to end, and end it after a grace period.

        Parameters
        ----------
        grace
            Seconds between SIGTERM and SIGKILL.
        """
        if self._stopping or self._has_ended():
            return
        self._stopping = True
        self._signal(signal.SIGTERM)
        loop = asyncio.get_running_loop()
        self._kill_timer = loop.call_later(grace, self._end_grace)

    def _end_grace(self) -> None:
        self._killed = True
        self._signal(signal.SIGKILL)

    def kill(self) -> None:
        """End the process group at once and wait for the worker's end."""
        if self._process.returncode is None:
            self._signal(signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr, self._report, self._stacks):
            if pipe is not None:
                pipe.close()
        if self._control_write >= 0:
            os.close(self._control_write)
            self._control_write = -1

    def _has_ended(self) -> bool:
        return self._process.has_ended()

    def _signal(self, number: signal.Signals) -> None:
        self._process.signal_group(number)


class _OwnWorker:
    """A worker that is a child of this process."""

    def __init__(
        self, early_imports: Sequence[str], environment: Mapping[str, str], passed: Sequence[int]
    ) -> None:
        command = start_command("horovodrunner.processes.worker")
        for name, fd in zip(("control", "report", "stacks", "result"), passed, strict=False):
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


class _OutputReader(asyncio.Protocol):
    """Takes whole lines from a pipe, those that come in quick succession together.

    What comes after a silence is taken at once; of a line that is overwritten, such as a progress
    bar, what it shows every `STATE_SECONDS`, and at last.

    Parameters
    ----------
    pipe
        Where from.
    on_lines
        Takes whole lines.
    """

    def __init__(self, pipe: IO[bytes], on_lines: Callable[[bytes], None]) -> None:
        self._pipe = pipe
        self._on_lines = on_lines
        self._lines = LineAssembler()
        self._pipe_bytes = 0
        self._transport: asyncio.ReadTransport | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._next_state_at = 0.0
        self._drawing: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()

    async def read_to_end(self) -> None:
        with contextlib.suppress(OSError):  # this user's pipes hold too much already
            fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, OUTPUT_PIPE_BYTES)
        self._pipe_bytes = fcntl.fcntl(self._pipe, fcntl.F_GETPIPE_SZ)
        await asyncio.get_running_loop().connect_read_pipe(lambda: self, self._pipe)
        await self._ended.wait()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.ReadTransport)  # noqa: S101 - that of a pipe
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._take(data)
        if len(data) < self._pipe_bytes // 2 and self._transport is not None:
            self._transport.pause_reading()
            # A pipe that is smaller is full sooner, and then the worker would have to wait.
            pause = OUTPUT_PAUSE_SECONDS * self._pipe_bytes / OUTPUT_PIPE_BYTES
            self._pause = asyncio.get_running_loop().call_later(pause, self._go_on)

    def connection_lost(self, error: Exception | None) -> None:
        self._end_pause()
        if self._drawing is not None:
            self._drawing.cancel()
        if rest := self._lines.close():
            self._on_lines(rest)
        self._ended.set()

    def catch_up(self) -> None:
        """Take what the pipe holds now, and go on reading."""
        if self._transport is not None and not self._transport.is_closing():
            with contextlib.suppress(BlockingIOError):
                self._take(os.read(self._pipe.fileno(), OUTPUT_PIPE_BYTES))
            self._go_on()

    def _take(self, data: bytes) -> None:
        if complete := self._lines.feed(data):
            self._on_lines(complete)
        if self._drawing is None and self._lines.has_states:
            loop = asyncio.get_running_loop()
            at = max(self._next_state_at, loop.time() + DRAWING_SECONDS)
            self._drawing = loop.call_at(at, self._take_states)

    def _take_states(self) -> None:
        self._drawing = None
        self._next_state_at = asyncio.get_running_loop().time() + STATE_SECONDS
        if states := self._lines.take_states():
            self._on_lines(states)

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None

    def _go_on(self) -> None:
        self._end_pause()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


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


def describe_exit(
    status: ExitStatus, killed_by_kernel: str = "", when: str = ""
) -> tuple[str, int | None, str | None]:
    """Say how a process ended that gave no outcome.

    Parameters
    ----------
    status
        The exit code, or minus the signal's number.
    killed_by_kernel
        What the kernel tells about it, if it does.
    when
        In which part of its life, as far as that is known.

    Returns
    -------
    tuple of str, int or None, and str or None
        A sentence, the exit code and the signal's name.

    Examples
    --------
    >>> describe_exit(3, when="before main returned (os._exit?)")[0]
    'the worker process left with exit code 3 before main returned (os._exit?)'
    """
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
