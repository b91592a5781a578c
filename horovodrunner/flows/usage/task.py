"""What a rank's processes and its host use, measured once in a while. Runs in: the task."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import psutil

from horovodrunner.flows.usage.gpus import Gpu, find_gpu_reader
from horovodrunner.placement.topology import Slot
from horovodrunner.wire.events import Sink, Usage
from horovodrunner.wire.upload import in_thread

__all__ = ["FIRST_SECONDS", "watch_usage"]

FIRST_SECONDS = 1.0
"""The first pause; they double up to the wanted one, so that short runs have some numbers, too."""

_logger = logging.getLogger(__name__)


async def watch_usage(slot: Slot, pid: Callable[[], int], emit: Sink, seconds: float) -> None:
    """Report the use every so many seconds, until cancelled; what cannot be measured is left out.

    The GPUs are those of the host, and the first of its ranks reports them. `pid` returns the
    worker's process id, or 0 as long as there is none.
    """
    try:
        meter = _Meter(slot)
        await in_thread(meter.start, pid())
        pause = min(FIRST_SECONDS, seconds)
        while True:
            await asyncio.sleep(pause)
            pause = min(2 * pause, seconds)
            if (found := await in_thread(meter.measure, pid())) is not None:
                emit(found)
    except Exception as error:
        _logger.debug("rank %d: its usage is no longer measured", slot.rank, exc_info=error)


class _Meter:
    """Compares what has been used with what had been at the last look."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._read_gpus: Callable[[], list[Gpu]] | None = None
        self._seconds_used = 0.0
        self._at = time.monotonic()
        self._host_busy, self._host_seconds = _host_times()

    def start(self, pid: int) -> None:
        """Note what has been used before, and look for GPUs, which may take seconds."""
        with contextlib.suppress(psutil.Error):
            self._seconds_used, _ = _use_of_tree(psutil.Process(pid)) if pid else (0.0, 0)
        if self._slot.local_rank == 0:
            self._read_gpus = find_gpu_reader(self._slot.devices)

    def measure(self, pid: int) -> Usage | None:
        try:
            used, memory = _use_of_tree(psutil.Process(pid)) if pid else (0.0, 0)
        except psutil.NoSuchProcess:
            return None
        now, host_memory = time.monotonic(), psutil.virtual_memory()
        busy, total = _host_times()
        elapsed, host_elapsed = now - self._at, total - self._host_seconds
        usage = Usage(
            rank=self._slot.rank,
            host=self._slot.host,
            time=time.time(),
            cpu_percent=_percent(used - self._seconds_used, elapsed),
            memory=memory,
            host_cpu_percent=min(100.0, _percent(busy - self._host_busy, host_elapsed)),
            host_memory_used=int(host_memory.total - host_memory.available),
            host_memory_total=int(host_memory.total),
            gpus=tuple((gpu.number, gpu.percent, gpu.used, gpu.total) for gpu in self._gpus()),
        )
        self._seconds_used, self._at = used, now
        self._host_busy, self._host_seconds = busy, total
        return usage

    def _gpus(self) -> list[Gpu]:
        if self._read_gpus is None:
            return []
        try:
            return self._read_gpus()
        except Exception as error:
            _logger.debug("the GPUs are no longer measured", exc_info=error)
            self._read_gpus = None
            return []


def _use_of_tree(worker: psutil.Process) -> tuple[float, int]:
    """Return seconds on processors, and resident bytes, of a process and its descendants.

    The seconds of a child that has ended are its parent's, so they never become less.
    """
    seconds, memory = 0.0, 0
    for process in _tree(worker):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
            memory += process.memory_info().rss
    return seconds, memory


def _tree(worker: psutil.Process) -> Iterator[psutil.Process]:
    yield worker
    yield from worker.children(recursive=True)


def _host_times() -> tuple[float, float]:
    """Return the seconds that all cores were busy, and all seconds."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # what guests take is in user and nice already
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - idle, total


def _percent(part: float, whole: float) -> float:
    return max(0.0, 100.0 * part / whole) if whole > 0 else 0.0
