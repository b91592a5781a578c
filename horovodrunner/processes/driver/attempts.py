"""Launch a run again when a worker or an executor was lost. Runs in: the driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from horovodrunner.errors import (
    BarrierStageError,
    HorovodRunnerError,
    RunStoppedError,
    WorkerFailedError,
)
from horovodrunner.flows.call.record import changes
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.going import GoingRun
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.outcome.driver import open_outcome
from horovodrunner.flows.outcome.outcome import Outcome
from horovodrunner.formatting import class_names, cut, in_one_line, short_name
from horovodrunner.pickling.pickler import travels_by_reference

__all__ = ["STOPPED", "describe_end", "run_attempts"]

STOPPED = "the run was stopped"
"""What a run is told to end with; how far it was is added at its end."""

_CAUSE_CHARACTERS = 1000


def run_attempts(
    launch: Callable[[int], Outcome],
    max_restarts: int,
    restart_on: tuple[type[BaseException], ...],
    *,
    store: CheckpointStore | None,
    console: Console,
    run: GoingRun,
) -> Any:
    """Launch attempts, by their number, until one succeeds, fails for good, or all are used.

    Once the run is stopped there is no further one.

    The last attempt's error tells in ``attempts`` what ended each of them. `restart_on` are types
    of exceptions that are worth another attempt beside lost workers and executors.
    """
    causes: list[str] = []
    while True:
        try:
            result = open_outcome(launch(len(causes) + 1))
            if (stopped := run.close()) is not None:
                raise stopped
        except HorovodRunnerError as error:
            run.check()
            causes.append(_in_one_line(error))
            if len(causes) > max_restarts or not _is_worth_another(error, restart_on):
                if len(causes) > 1:
                    error.attempts = tuple(causes)
                if isinstance(error, BarrierStageError) and error.was_cancelled:
                    error.args = (f"{error.args[0]}; {_describe_latest(store)}",)
                raise
            console.note(
                f"attempt {len(causes) + 1} of {max_restarts + 1}, because {causes[-1]}; "
                + _where_it_goes_on(store)
            )
        else:
            return result


def _is_worth_another(
    error: HorovodRunnerError, restart_on: tuple[type[BaseException], ...]
) -> bool:
    if isinstance(error, restart_on):
        return True
    if isinstance(error, WorkerFailedError):
        # By name: what main raised need not unpickle here, or not as what it was there.
        wanted = {name for kind in restart_on for name in _names_on_ranks(kind)}
        return error.worker_was_lost or not wanted.isdisjoint(error.exception_types)
    return isinstance(error, BarrierStageError) and error.executor_was_lost


def _names_on_ranks(kind: type) -> list[str]:
    """List what a class may be called on ranks: one that travels by value loses its scope."""
    name = class_names(kind)[0]
    if travels_by_reference(kind):
        return [name]
    return [name, name.removesuffix(short_name(kind)) + kind.__name__]


def _in_one_line(error: HorovodRunnerError) -> str:
    return cut((str(error).splitlines() or [type(error).__name__])[0], _CAUSE_CHARACTERS)


def describe_end(
    run: GoingRun, error: BaseException, size: int, store: CheckpointStore | None
) -> BaseException:
    """Complete the error that a run ends with; return what is told to those who follow it."""
    stopped = run.close()
    if isinstance(error, KeyboardInterrupt):
        error.args = (_describe_stopped(str(error) if error.args else "", size, store),)
    elif isinstance(error, RunStoppedError) and error is stopped:
        reason = error.reason or str(error).removesuffix(STOPPED)
        error.args = (_describe_stopped(reason, size, store),)
    elif error is stopped:  # what on_report has raised: the run was ended and has not failed
        return RunStoppedError(in_one_line(error))
    return error


def _describe_stopped(reason: str, size: int, store: CheckpointStore | None) -> str:
    """Describe what was stopped, and what is left; `size` is 0 for all slots."""
    ranks = " of 1 rank" if size == 1 else f" of {size} ranks" if size else ""
    because = f"{reason}: " if (reason := " ".join(reason.split())) else ""
    return f"{because}the run{ranks} was stopped; {_describe_latest(store)}"


def _describe_latest(store: CheckpointStore | None) -> str:
    if store is None:
        return "there is no checkpoint, because the run has no checkpoint_dir"
    try:
        saved = store.manifests()
    except OSError as error:
        return f"whether there is a checkpoint cannot be told: {error}"
    if not saved:
        return f"there is no checkpoint in {store.location} yet"
    return f"the latest checkpoint is that of step {saved[0].step}: {store.path_of(saved[0].step)}"


def _where_it_goes_on(store: CheckpointStore | None) -> str:
    if store is None:
        return "starting anew (the run has no checkpoint_dir)"
    try:
        saved = store.manifests()
    except OSError as error:
        return f"whether there is a checkpoint cannot be told: {error}"
    if not saved:
        return "starting anew (nothing saved yet)"
    text, run = f"going on from step {saved[0].step}", saved[0].run
    if store.run is None or (run is not None and run.run_id == store.run.run_id):
        return text
    found = "; ".join(changes(run, store.run)) if run is not None else ""
    return f"{text} of an earlier run" + f" (warning: {found})" * bool(found)
