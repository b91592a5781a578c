"""The options of a HorovodRunner, once they are checked. Runs in: the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.observer import Observer, RunFacts
from horovodrunner.placement.forwarding import Variables

if TYPE_CHECKING:
    from horovodrunner.flows.metrics.records import Point

__all__ = ["AUTO", "Options"]

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a runner was told; :class:`horovodrunner.HorovodRunner` describes it."""

    given: Mapping[str, Any]
    """Those that are not their defaults, as they were given, without secrets."""
    np: int
    shows_output: bool
    """Whether all that ranks print is shown where the run was started."""
    resources: Mapping[str, float] | None
    ranks_per_task: int | str
    preflight: str
    """``"refuse"``, ``"warn"`` or nothing."""
    keeps_all_results: bool
    start_timeout: float
    stall_timeout: float | None
    store: CheckpointStore | None
    resume: bool
    fails_on_checkpoint_error: bool
    max_restarts: int
    restart_on: tuple[type[BaseException], ...]
    tf_config: bool
    variables: Variables
    profile_launch: bool
    keep_warm: bool | str
    shows_progress: bool
    run_dir: str | None
    mlflow: bool | str
    tensorboard_dir: Path | None
    on_report: Callable[[Point], object] | None
    sigterm_grace: float | None
    name: str
    errors_apart: bool = False
    """Whether notes, and what ranks write to standard error, are shown on standard error."""
    shows_routine: bool | None = None
    """Whether routine notes are shown; None: as the environment says."""
    other_observers: tuple[Callable[[RunFacts], Observer], ...] = field(default=(), repr=False)
    """Make what follows a run beside what the options above ask for."""
