"""Where a task runs, and what it reaches from there. Runs in: the task (np < 0: the driver)."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from horovodrunner.flows.checkpoints.task.backend import CheckpointBackend
from horovodrunner.flows.rows.taking import RowsTaker
from horovodrunner.pickling.buffers import Layout
from horovodrunner.placement.topology import Member
from horovodrunner.processes.task.driver_link import DriverLink
from horovodrunner.wire.events import Handlers

__all__ = ["TaskContext"]


class _Gather(Protocol):
    def __call__(self, text: str, *, reaches_driver: bool) -> Awaitable[list[str]]: ...


class _TakeResult(Protocol):
    def __call__(
        self, descriptor: int, layout: Layout, rank: int, *, reaches_driver: bool
    ) -> None: ...


@dataclass(frozen=True)
class TaskContext:
    """Where an agent runs; it knows nothing of Spark itself."""

    member: Member
    """What this task tells its peers; the agent fills in the ports."""
    gather: _Gather
    """Exchanges one text between all tasks: waits for all, and returns all texts."""
    open_driver: Callable[[Handlers], Awaitable[DriverLink]]
    """Called by partition 0, with what takes the driver's events: registers the run there."""
    log: Callable[[bytes], None]
    """Takes whole lines for this task's own log."""
    take_result: _TakeResult
    """Takes the file with what a rank's main returned; blocks."""
    take_file: Callable[[str, Path], None]
    """Takes a file that Horovod wrote on rank 0's host, by the variable that names it; blocks."""
    take_artifacts: Callable[[dict[str, Path]], None]
    """Takes files that this task's ranks have left, by name; blocks."""
    checkpoints: CheckpointBackend | None = None
    """Where checkpoints are kept, or None when the run keeps none."""
    abort_transfers: Callable[[], None] = lambda: None
    """Lets transfers that other threads wait for fail soon."""
    rows: RowsTaker | None = None
    """Takes the rows that travel with the run, or None when there are none."""
    scratch_base: str | None = None
    cores_per_worker: int = 1
    session_process: int = field(default_factory=os.getpid)
    """A process here that lasts as long as the user's session."""
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    """The environment variables that workers inherit."""
