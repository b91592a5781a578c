"""What the driver tells every task of one run. Runs in: the driver and the task."""

from __future__ import annotations

from dataclasses import dataclass, field

from horovodrunner.flows.call.import_path import ImportPath
from horovodrunner.flows.call.record import RunRecord
from horovodrunner.flows.checkpoints.fence import Fence
from horovodrunner.flows.checkpoints.retention import Retention

__all__ = ["JobSpec"]


@dataclass(frozen=True)
class JobSpec:
    """One attempt of a run."""

    run_id: str
    size: int
    """How many ranks there are."""
    payload: bytes = field(repr=False)
    """The cloudpickled ``(main, kwargs)``."""
    token: bytes = field(repr=False)
    """32 random bytes that prove, on every connection of this run, that the peer belongs to it."""
    early_imports: tuple[str, ...] = ()
    """Modules the worker may import before it knows its rank."""
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    """The variables that the workers get from the driver."""
    removed_variables: tuple[str, ...] = ()
    """Names of variables that the workers get neither from the driver nor from the executor."""
    import_path: ImportPath = field(default_factory=ImportPath)
    driver_address: tuple[str, int] | None = None
    stream_output: bool = False
    """Whether the workers' output goes to the driver, not only ``log_to_driver`` messages."""
    driver_shows_output: bool = False
    """Whether the driver shows that output; it may only keep it."""
    usage_seconds: float | None = None
    """How often the use of processors and memory is reported; None: never."""
    profiles: bool = False
    """Whether the ranks report where main's time goes."""
    shares_terminal: bool = False
    """Whether the tasks' own log is the driver's terminal."""
    ranks_per_task: int = 1
    """How many ranks a task runs; the last one may have fewer."""
    all_results: bool = False
    """Whether every rank's return value goes to the driver, not only rank 0's."""
    preflight: str = ""
    """``"refuse"`` or ``"warn"``: what becomes of a run whose hosts are not well; "": not tried."""
    max_result_bytes: int | None = None
    """The largest pickled result that Spark takes back, or None for no limit."""
    attempt: int = 1
    stall_timeout: float | None = None
    checkpoint_location: str | None = None
    """Path on the driver, or URL."""
    retention: Retention = field(default_factory=Retention)
    checkpoint_fence: Fence | None = None
    """Which driver's checkpoints these are, when several may follow each other."""
    record: RunRecord | None = field(default=None, repr=False)
    """What the run is called with, for those that go on from its checkpoints."""
    fail_on_checkpoint_error: bool = False
    brought_files: tuple[str, ...] = ()
    """Variables that name a file which Horovod writes on rank 0's host and the driver gets."""
    ports: tuple[int, int] | None = None
    """First and last port that tasks may listen on, or None for any that is free."""
    tf_config: bool = False
    keep_warm: bool = False
    versions: dict[str, str] = field(default_factory=dict, repr=False)
    """What is installed on the driver, by name."""

    @property
    def workers(self) -> tuple[int, ...]:
        """How many ranks each task runs, by partition.

        >>> JobSpec("run", 10, b"", b"", ranks_per_task=4).workers
        (4, 4, 2)
        """
        full, rest = divmod(self.size, self.ranks_per_task)
        return (self.ranks_per_task,) * full + (rest,) * (rest > 0)
