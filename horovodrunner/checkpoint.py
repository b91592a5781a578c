"""Checkpoints, as main() sees them. Runs in: the worker.

Files that rank 0 saves appear where ``HorovodRunner(checkpoint_dir=...)`` says while training goes
on, and every rank finds them again in the next attempt or the next run::

    from horovodrunner import checkpoint

    def main(epochs):
        latest = checkpoint.latest()
        start = 0 if latest is None else latest.step + 1
        if latest is not None:
            model.load_state_dict(torch.load(latest / "model.pt"))
        for epoch in range(start, epochs):
            ...
            with checkpoint.save(step=epoch) as directory:
                torch.save(model.state_dict(), directory / "model.pt")

For PyTorch the same in one line each: :func:`load_torch` and :func:`save_torch`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
from horovodrunner.flows.checkpoints.worker import background
from horovodrunner.formatting import in_one_line
from horovodrunner.processes.worker.context import (
    WorkerContext,
    current_context,
    log_to_driver,
    notice,
)
from horovodrunner.random_state import RandomState
from horovodrunner.wire.events import CheckpointSaved, Latest, LatestWanted, PartSaved

if TYPE_CHECKING:
    from horovodrunner.flows.checkpoints.manifest import Manifest
    from horovodrunner.flows.checkpoints.worker.source import Source
    from horovodrunner.flows.checkpoints.worker.states import States

__all__ = [
    "Checkpoint",
    "RandomState",
    "attempt",
    "latest",
    "load_torch",
    "save",
    "save_torch",
    "should_save_now",
    "torch_reader",
    "wait",
]

attempt: int
"""1 in the first launch of a run, one more after each restart; 1 outside a run, too."""

_notes_given: set[str] = set()
_guesses = itertools.count(1)
"""Counts the calls of save_torch() whose objects tell who saves; ranks make the same calls."""


class Checkpoint(type(Path())):  # type: ignore[misc]  # Path's class for this system
    """A checkpoint's files in a directory of this machine.

    It is a :class:`pathlib.Path`, so ``latest / "model.pt"`` is a file of it. The directory is
    this attempt's own copy and goes with it.

    Attributes
    ----------
    step : int
        The step it was saved with.
    world_size : int or None
        How many ranks saved it, each its own part; None if it was rank 0 for all. With as many
        ranks as this run has, the directory has what this very rank saved. With more or fewer
        it is empty, and :meth:`of_rank` has the files.
    """

    step: int
    world_size: int | None
    _differs: bool  # whether the run that saved it was called with something else
    _manifest: Manifest | None

    @classmethod
    def _at(cls, found: Latest) -> Checkpoint:
        checkpoint = cls(found.directory)
        checkpoint.step = found.step
        checkpoint._differs = found.differs
        checkpoint._manifest = None
        if found.manifest:
            from horovodrunner.flows.checkpoints.manifest import Manifest

            checkpoint._manifest = Manifest.from_json(found.manifest.decode())
        manifest = checkpoint._manifest
        checkpoint.world_size = None if manifest is None else manifest.world_size
        return checkpoint

    def with_segments(self, *segments: str | os.PathLike[str]) -> Path:
        """Return a plain path for what is below; pathlib calls it from Python 3.12 on."""
        return Path(*segments)

    def of_rank(self, rank: int) -> Path:
        """Return the directory with what a rank saved; each host fetches it once.

        Parameters
        ----------
        rank
            At least 0 and less than :attr:`world_size`. Rank 0 of a checkpoint that it saved for
            all has this very directory.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If rank is not an int, or there was no such rank.
        CheckpointError
            If the files cannot be fetched, or one is not what was saved.
        """
        rank = checked.integer("rank", rank, at_least=0)
        if rank >= (self.world_size or 1):
            raise ArgumentValueError(
                f"rank={rank}: the checkpoint of step {self.step} was saved by "
                f"{self.world_size or 1} rank{'s' * (self.world_size not in (None, 1))}; ranks "
                "begin at 0"
            )
        if self.world_size is None:
            return Path(self)
        return Path(_ask_latest(rank).directory)

    def source(self) -> Source:
        """Return what reads parts of files of all ranks without fetching the rest."""
        from horovodrunner.flows.checkpoints.worker.ranges import TaskSource
        from horovodrunner.flows.checkpoints.worker.source import NearFirst

        context = current_context()
        if context is None or self._manifest is None:
            raise CheckpointError(
                f"the checkpoint of step {self.step} has no parts of several ranks to read from: "
                'it was saved without ranks="all"'
            )
        far = TaskSource(context, self._manifest)
        return NearFirst(Path(self), f"rank-{context.spec.rank}/", far)

    @property
    def _own_rank(self) -> int | None:
        """The number of this rank, where as many ranks have saved the checkpoint."""
        context = current_context()
        if context is None or os.environ.get("WORLD_SIZE") != str(self.world_size):
            return None
        return context.spec.rank

    def _source_for(self, bytes_of_every_rank: int) -> Source:
        """Return the same; or where the host's ranks want more in all, what fetches all of it once.

        `bytes_of_every_rank` is how much each of them reads of the same.
        """
        from horovodrunner.flows.checkpoints.worker.source import CopiesOfHost

        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if self._manifest is None or bytes_of_every_rank * ranks <= self._manifest.size:
            return self.source()
        return CopiesOfHost(self.source(), self.of_rank)


def latest() -> Checkpoint | None:
    """Return the checkpoint that this attempt starts from, the same on every rank.

    It is decided when the first rank asks: the newest one whose files are all there with the right
    SHA-256. Damaged ones are skipped with a warning.

    Returns
    -------
    Checkpoint or None
        A local directory with a ``step``; None when there is no checkpoint, when the run has no
        ``checkpoint_dir``, or outside a run.

    Raises
    ------
    CheckpointError
        If a checkpoint cannot be asked for or fetched. To start anew instead would lose work.

    Examples
    --------
    >>> latest() is None  # outside a run
    True
    """
    context = current_context()
    if context is None or not context.spec.keeps_checkpoints:
        return None
    found = _ask_latest()
    return Checkpoint._at(found) if found.directory else None


def _ask_latest(part: int = -1) -> Latest:
    context = current_context()
    if context is None:  # a process that main forked
        raise CheckpointError("only a rank's own process can get files of the latest checkpoint")
    if context.on_latest is not None:
        context.on_latest()
    answer: Latest = context.control.ask(LatestWanted(context.spec.rank, part))
    if answer.error:
        raise CheckpointError(
            f"rank {context.spec.rank} on {context.spec.host} cannot get the latest checkpoint: "
            f"{answer.error}"
        )
    return answer


@contextlib.contextmanager
def save(
    step: int, *, ranks: int | str = 0, metrics: Mapping[str, float] | None = None
) -> Iterator[Path]:
    """Save whatever is written into the directory, files and subdirectories, as a checkpoint.

    When the block ends, main goes on, and the files are stored in the background, complete or not
    at all. If saves come faster than they can be stored, the newest wins. If the block raises,
    nothing is saved.

    Parameters
    ----------
    step
        Names the checkpoint: an epoch or a number of batches, not negative. A checkpoint of the
        same step is replaced.
    ranks
        Whose files are kept. 0: rank 0's; the other ranks get a directory that is thrown away, so
        that the same code runs everywhere. ``"all"``: every rank's, each in a directory of its
        own; the checkpoint counts when all ranks have saved theirs, and not before. Files that
        are the same on several ranks are stored once.
    metrics
        Numbers to compare the checkpoint by, such as ``{"val_loss": 0.3}``; rank 0's count. None
        takes those that rank 0 has reported with :func:`horovodrunner.metrics.report` since it
        saved a checkpoint before.

    Yields
    ------
    pathlib.Path
        An empty directory.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If step is not an int, or negative, ranks neither 0 nor "all", or a metric no number.

    Examples
    --------
    >>> with save(step=3) as directory:  # outside a run nothing is kept
    ...     _ = (directory / "state.txt").write_text("weights")
    """
    step = checked.integer("step", step, at_least=0)
    of_all = _is_of_all(ranks)
    numbers = _numbers(metrics)
    background.wait()  # or this one would be taken for the older one
    _got_to(step)
    with _saving(step, of_all, numbers) as directory:
        yield directory


def _got_to(step: int) -> None:
    """Let the faults of a test happen, if there are any."""
    context = current_context()
    if context is not None and context.on_step is not None:
        context.on_step(step)


@contextlib.contextmanager
def _saving(
    step: int, of_all: bool, numbers: dict[str, float], *, guess: int = 0
) -> Iterator[Path]:
    context = current_context()
    if context is None or not context.spec.keeps_checkpoints:
        _note_once(context)
    scratch = context.spec.scratch if context is not None else None
    keeps = context is not None and context.spec.keeps_checkpoints
    own_pid, handed_over = os.getpid(), False
    directory: Path | None = None
    try:
        directory = Path(tempfile.mkdtemp(prefix="horovodrunner-saving-", dir=scratch))
        yield directory
        if context is not None and keeps and (of_all or context.spec.rank == 0):
            where = str(directory)
            context.link.send(
                PartSaved(context.spec.rank, step, where, metrics=numbers, guess=guess)
                if of_all
                else CheckpointSaved(step, where, numbers, guess=guess)
            )
            handed_over = True
    except BaseException as error:
        if context is not None and keeps and of_all and not handed_over:
            rank, text = context.spec.rank, in_one_line(error)
            problem = f"rank {rank} on {context.spec.host} could not save its own: {text}"
            context.link.send(PartSaved(rank, step, problem=problem))
        raise
    finally:
        is_forked = os.getpid() != own_pid  # in the block
        if directory is not None and not handed_over and not is_forked:
            shutil.rmtree(directory, ignore_errors=True)


def should_save_now() -> bool:
    """Return whether a checkpoint is wanted before the next regular one; every rank calls this.

    It is True once, on all ranks at the same call, after ``runner.request_checkpoint()``, when
    Spark decommissions an executor of the run, or when a rank is sent SIGTERM. Call it once a step,
    on every rank at the same place and always in the same thread: its calls are counted, and the
    ranks agree upon one that none of them has reached yet.

    Returns
    -------
    bool
        False in nearly all calls, at the cost of half a microsecond; False outside a run, and in a
        process that main has forked.

    Notes
    -----
    From its first call in the main thread on, SIGTERM no longer ends the rank: the first one asks
    for a checkpoint, and another one before that is saved, a second later or more, ends the rank. A
    handler that main has installed is left alone.

    Examples
    --------
    >>> should_save_now()  # outside a run
    False
    """
    context = current_context()
    return context is not None and context.control.saves.should_save_now()


def _is_of_all(ranks: object) -> bool:
    if isinstance(ranks, str) and ranks == "all":
        return True
    value = checked.plain(ranks)
    if type(value) is int and value == 0:
        return False
    raise ArgumentValueError(
        f'ranks={ranks!r:.100}: whose files are kept is 0 (rank 0 saves for all) or "all" (every '
        "rank saves its own)"
    )


def _numbers(metrics: object) -> dict[str, float]:
    """Return the numbers of a checkpoint: those that are given, or else the last reported ones."""
    given = None if metrics is None else _checked_metrics(metrics)
    context = current_context()
    reported = {} if context is None else context.metrics.take_unsaved()
    return {
        # halves of characters could not be written
        name.encode(errors="replace").decode(): float(value)
        for name, value in (reported if given is None else given).items()
    }


def _checked_metrics(metrics: object) -> dict[str, float]:
    example = 'give numbers by their names, such as {"val_loss": 0.3}'
    if hasattr(metrics, "state_dict"):
        raise ArgumentTypeError(
            f"metrics={checked.shown(metrics)} has a state to be saved: give it another name, "
            f"because metrics= is for numbers; {example}"
        )
    if not isinstance(metrics, Mapping):
        raise ArgumentTypeError(f"metrics={checked.shown(metrics)}: {example}")
    return {
        checked.text("a metric's name", name): checked.number(f"metrics[{name!r:.50}]", value)
        for name, value in metrics.items()
    }


class _HasState(Protocol):
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


def save_torch(
    step: int,
    *,
    ranks: int | str | None = None,
    asynchronous: bool = False,
    metrics: Mapping[str, float] | None = None,
    **objects: _HasState,
) -> None:
    """Save the states of PyTorch objects; every rank calls this.

    What every rank has whole, rank 0 writes, one file ``<name>.pt`` each. If a state is sharded
    (FSDP2, tensor parallelism: its tensors are DTensors), every rank writes its own parts, and no
    rank ever has the whole. No rank waits for another one.

    Parameters
    ----------
    step
        As for :func:`save`.
    ranks
        Who writes. None: rank 0, or every rank where an object is sharded, as above. ``"all"``:
        every rank, also what it has whole, and with as many ranks each loads its own again. That
        is for ranks whose objects differ: stages of a pipeline, each rank's own sampler. 0: rank 0
        alone.
    asynchronous
        Whether main goes on as soon as the tensors are copied to memory of the CPU, and a thread
        writes the files. The next save waits until the one before is written, and so does the end
        of main; :func:`wait` waits at once. When files cannot be written, ``on_checkpoint_error``
        says what happens.
    metrics
        As for :func:`save`; so no object is called ``metrics``, ``ranks`` or ``asynchronous``.
    **objects
        PyTorch modules, optimizers, schedulers and the like, by name. A sharded optimizer needs
        its module beside it: its state goes by the names of parameters.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If step is not an int or negative, nothing is to be saved, a metric is no number, the
        module of a sharded optimizer is not given, or rank 0 alone is to save what is sharded.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> save_torch(3, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    """
    from horovodrunner.flows.checkpoints.worker.states import Objects

    step = checked.integer("step", step, at_least=0)
    _check_objects("save_torch(step, ...)", objects)
    every_rank_writes = ranks is not None and _is_of_all(ranks)
    guess = next(_guesses) if ranks is None else 0
    numbers = _numbers(metrics)
    background.wait()
    # on every rank: some gather their state from all of them
    states = Objects(objects).states(every_rank_writes=every_rank_writes)
    if ranks is not None and states.is_of_all and not every_rank_writes:
        raise ArgumentValueError(
            f"save_torch(ranks=0): {', '.join([*states.sharded, *states.own])} has another part on "
            'every rank, and rank 0 would save its own alone: leave ranks out, or give ranks="all"'
        )
    _got_to(step)
    context = current_context()
    if not states.is_of_all and context is not None and context.spec.rank != 0:
        return
    if asynchronous:
        copied = states.copied()
        background.start(lambda: _write_behind(step, copied, numbers, guess=guess))
    else:
        _write(step, states, numbers, guess=guess)


def _write(step: int, states: States, numbers: dict[str, float], *, guess: int) -> None:
    context = current_context()
    with _saving(step, states.is_of_all, numbers, guess=guess) as directory:
        states.write(directory, is_rank_0=context is None or context.spec.rank == 0)


def _write_behind(step: int, states: States, numbers: dict[str, float], *, guess: int) -> None:
    """Write a checkpoint's files while main goes on, and report what goes wrong."""
    context = current_context()
    try:
        _write(step, states, numbers, guess=guess)
    except Exception as error:  # noqa: BLE001 - it is reported
        if context is None:
            log_to_driver(f"the checkpoint of step {step} was not written: {in_one_line(error)}")
        elif not states.is_of_all:  # of one of all ranks it has been reported
            context.link.send(CheckpointSaved(step, "", problem=in_one_line(error)))


def wait() -> None:
    """Wait until what ``save_torch(asynchronous=True)`` saves is written on this rank.

    From then on it is stored as after :func:`save`, in the background.

    Examples
    --------
    >>> wait()  # nothing is being written
    """
    background.wait()


def load_torch(**objects: _HasState) -> int:
    """Load what :func:`save_torch` saved into objects of the same shape; return the next step.

    Objects may be sharded over another number of ranks than those that saved them, or whole where
    they were sharded, and the other way round. Each rank reads what it needs of sharded ones.

    Parameters
    ----------
    **objects
        What to load, by the names that were used for saving.

    Returns
    -------
    int
        The step after the checkpoint's; 0 when there is none, and nothing was loaded.

    Raises
    ------
    ArgumentTypeError
        If nothing is to be loaded.
    CheckpointError
        If the checkpoint cannot be fetched, does not hold one of the objects, or an object that
        is sharded here or there has other parameters.

    Examples
    --------
    >>> import torch
    >>> load_torch(model=torch.nn.Linear(2, 1))  # outside a run there is no checkpoint
    0
    """
    _check_objects("load_torch(...)", objects)
    found = latest()
    if found is None:
        return 0
    from horovodrunner.flows.checkpoints.worker.loading import Loading
    from horovodrunner.flows.checkpoints.worker.states import Objects

    loading = Loading(Objects(objects), found, notice)
    for name in objects:
        loading.load(name)
    return found.step + 1


def torch_reader(found: Checkpoint | str | os.PathLike[str], directory: str = "") -> Any:
    """Return a ``StorageReader`` for ``torch.distributed.checkpoint.load(storage_reader=...)``.

    It reads the tensors of :func:`save_torch`, and what every rank wrote with a
    ``torch.distributed.checkpoint.FileSystemWriter`` into its own directory of
    ``save(step, ranks="all")``. A rank reads the bytes that it needs, and no more of them at once
    than 128 MiB and one tensor's part.

    Parameters
    ----------
    found
        What :func:`latest` returned; or a directory of this machine with a checkpoint's files,
        such as ``runner.checkpoints[-1].path``.
    directory
        The one below each rank's own that was given to the writer; "" if it was the rank's own.

    Returns
    -------
    torch.distributed.checkpoint.StorageReader
        For this checkpoint.

    Raises
    ------
    CheckpointError
        When metadata or tensors are read: if there are none, or some are missing.

    Examples
    --------
    >>> from torch.distributed.checkpoint import StorageReader
    >>> isinstance(torch_reader("/data/checkpoints/step-00000012"), StorageReader)
    True
    """
    from horovodrunner.flows.checkpoints.worker.shard_reader import ShardReader
    from horovodrunner.flows.checkpoints.worker.source import DirectorySource

    if isinstance(found, Checkpoint) and found.world_size is not None:
        return ShardReader(found.source(), directory, own_rank=found._own_rank)
    return ShardReader(DirectorySource(found), directory)


def _check_objects(call: str, objects: dict[str, Any]) -> None:
    if not objects:
        raise ArgumentTypeError(
            f"{call} was given nothing: name what it is to handle, model=model, optimizer=optimizer"
        )


def _note_once(context: WorkerContext | None) -> None:
    if context is None or context.spec.rank != 0 or "unkept" in _notes_given:
        return
    _notes_given.add("unkept")
    log_to_driver(
        "HorovodRunner: checkpoint.save() keeps nothing in this run, because it has no "
        "checkpoint_dir: HorovodRunner(np=..., checkpoint_dir=...)"
    )


def __getattr__(name: str) -> Any:
    if name == "attempt":
        context = current_context()
        return 1 if context is None else context.spec.attempt
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
