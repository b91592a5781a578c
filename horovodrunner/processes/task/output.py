"""What a worker prints, from its pipes to whole lines. Runs in: the task (np < 0: the driver)."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable
from typing import IO

from horovodrunner.flows.logs.lines import LineAssembler

__all__ = ["OutputReader"]

PAUSE_SECONDS = 0.01
"""Output that comes within this time after other output is coalesced, because waking up for each
line is expensive."""

STATE_SECONDS = 1.0
"""Of a line that is drawn again and again, such as a progress bar, a state is taken so often."""

DRAWING_SECONDS = 0.05
"""How long a first state is left to be drawn, which may take several writes."""

PIPE_BYTES = 256 * 1024
"""So much a worker may print before it has to wait for its task to read.

An unprivileged user's pipes may have 64 MiB in all; what is made beyond that gets a page each.
"""


class OutputReader(asyncio.Protocol):
    """Takes whole lines from a pipe, those that come in quick succession together.

    What comes after a silence is taken at once; of a line that is overwritten, such as a progress
    bar, what it shows every `STATE_SECONDS`, and at last.
    """

    def __init__(
        self,
        pipe: IO[bytes],
        on_lines: Callable[[bytes], None],
        pause_seconds: float | None = None,
    ) -> None:
        self._pipe = pipe
        self._on_lines = on_lines
        self._pause_seconds = PAUSE_SECONDS if pause_seconds is None else pause_seconds
        self._lines = LineAssembler()
        with contextlib.suppress(OSError):  # this user's pipes hold too much already
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._pipe_bytes = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
        self._transport: asyncio.ReadTransport | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._next_state_at = 0.0
        self._drawing: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()

    async def read_to_end(self) -> None:
        """Read until the pipe ends."""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: self, self._pipe)
        try:
            await self._ended.wait()
        finally:
            transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, as asyncio says."""
        assert isinstance(transport, asyncio.ReadTransport)  # noqa: S101 - that of a pipe
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take what has come, and pause."""
        self._take(data)
        if len(data) < self._pipe_bytes // 2 and self._transport is not None:
            self._transport.pause_reading()
            # A pipe that is smaller is full sooner, and then the worker would have to wait.
            pause = self._pause_seconds * self._pipe_bytes / PIPE_BYTES
            self._pause = asyncio.get_running_loop().call_later(pause, self._resume)

    def connection_lost(self, error: Exception | None) -> None:
        """Take what is left."""
        self._end_pause()
        if self._drawing is not None:
            self._drawing.cancel()
        if rest := self._lines.close():
            self._on_lines(rest)
        self._ended.set()

    def catch_up(self) -> None:
        """Take what the pipe holds now, and read on."""
        if self._transport is not None and not self._transport.is_closing():
            with contextlib.suppress(BlockingIOError):
                self._take(os.read(self._pipe.fileno(), PIPE_BYTES))
            self._resume()

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

    def _resume(self) -> None:
        self._end_pause()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
