"""Reports a run to MLflow. Runs in: the driver.

Executors need neither the tracking server nor its credentials: all that is reported goes through
the driver. Only a main that itself uses MLflow talks to the server from where it runs.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from horovodrunner.errors import ConfigurationError, RunStoppedError
from horovodrunner.flows.artifacts.store import ArtifactStore
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.metrics.records import Bar, Point
from horovodrunner.flows.metrics.scalars import Scalar, ScalarStream
from horovodrunner.flows.mlflow import naming
from horovodrunner.flows.mlflow.delivery import END_SECONDS, Delivery
from horovodrunner.flows.mlflow.tracking import Metric, RunInMlflow, is_local
from horovodrunner.flows.observer import Observer, RunFacts
from horovodrunner.flows.rundir import layout
from horovodrunner.flows.rundir.masking import Mask
from horovodrunner.formatting import in_one_line
from horovodrunner.placement.environment import MLFLOW
from horovodrunner.placement.versions import installed_versions
from horovodrunner.wire.events import Points, Usage

if TYPE_CHECKING:
    from horovodrunner.flows.rundir.driver import RunDirectory

__all__ = ["MlflowReporter", "Sources", "reporters", "require_mlflow"]

START_SECONDS = 5.0
"""How long the launch waits for the id of a run that is started, if the server is slow."""

PATIENCE_SECONDS = 2.0
"""A longer wait at the end is announced."""

_TAGS = "horovodrunner."

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """What a run is reported from, beside its events."""

    records_of: Callable[[Points], Iterable[Point | Bar]]
    """Returns what an event has, which is decoded once for all that follow the run."""
    artifacts: ArtifactStore
    record: RunDirectory | None = None

    def files(self) -> Iterator[tuple[Path, PurePosixPath]]:
        """Yield the report, and what the ranks left, each with its name."""
        if self.record is not None and (report := self.record.directory / layout.REPORT).exists():
            yield report, PurePosixPath(layout.REPORT)
        if (root := self.artifacts.directory) is not None:
            for path in sorted(root.rglob("*")):
                if path.is_file():
                    yield path, PurePosixPath(path.relative_to(root))


def require_mlflow() -> None:
    """Fail if MLflow is not installed; it is not imported for that."""
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigurationError(
            f"mlflow=True needs MLflow, which {sys.executable} does not have: install it with "
            f"`{sys.executable} -m pip install mlflow-skinny` (mlflow has the server, too)"
        )


def reporters(
    wanted: bool | str, facts: RunFacts, sources: Sources, console: Console
) -> list[MlflowReporter]:
    """Make what reports this run: to the run that is active in this thread, or to a new one."""
    if wanted is True:
        active = _import_mlflow().active_run()
        return [MlflowReporter(facts, active, sources, console)]
    mlflow: Any = sys.modules.get("mlflow") if wanted else None  # not imported only to look
    try:
        run = mlflow.active_run() if hasattr(mlflow, "active_run") else None
        return [] if run is None else [MlflowReporter(facts, run, sources, console)]
    except Exception as error:
        _logger.debug("mlflow.active_run() failed", exc_info=error)
        console.note(f"this run is not reported to MLflow: {in_one_line(error)}")
        return []


def _import_mlflow() -> Any:
    try:
        import mlflow
    except Exception as error:
        raise ConfigurationError(
            f"mlflow=True: MLflow cannot be imported ({in_one_line(error)}). Install another "
            "version, or leave mlflow out"
        ) from error
    return mlflow


class MlflowReporter(Observer):
    """Reports to a run that is active on the driver, or starts one and ends it.

    What there is in the run's record at its end becomes MLflow's artifacts.
    """

    title = "reporting to MLflow"
    wants_usage = True

    def __init__(self, facts: RunFacts, active: Any, sources: Sources, console: Console) -> None:
        import mlflow

        self._facts = facts
        self._sources = sources
        self._console = console
        self._uri = str(mlflow.get_tracking_uri())
        self._run_id = "" if active is None else str(active.info.run_id)
        self._experiment_id = "" if active is None else str(active.info.experiment_id)
        self._is_own = active is None
        self._scalars = ScalarStream(abs(facts.np))
        self._usage_steps: dict[str, int] = {}
        self._reporting_ranks: dict[str, int] = {}
        self._attempts = 0
        self.handlers = {
            Points: lambda event: self._take(sources.records_of(event)),
            Usage: self._take_usage,
        }
        options = {name: value for name, value in facts.options.items() if name != "mlflow"}
        self._delivery = Delivery(self._open, console.note)  # starts when the run does
        self._delivery.add_texts("tags", self._first_tags())
        self._delivery.add_texts("params", naming.parameters(facts.np, options, facts.arguments))

    @property
    def environment(self) -> dict[str, str]:
        """Make ``mlflow.start_run()`` in main go on with this run, if the ranks can reach it."""
        variables = {MLFLOW: "1"}
        if self._run_id and (self._facts.np < 0 or not is_local(self._uri)):
            variables |= {"MLFLOW_RUN_ID": self._run_id, "MLFLOW_TRACKING_URI": self._uri}
            if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
                variables["MLFLOW_EXPERIMENT_ID"] = self._experiment_id
        return variables

    def begin(self, attempt: int) -> None:
        """Wait, for a bounded time, until there is a run."""
        self._attempts = attempt
        self._scalars.begin()
        if attempt == 1:
            self._delivery.start()
        if not self._run_id:
            self._delivery.was_tried.wait(START_SECONDS)

    def end(self, error: BaseException | None) -> None:
        """Deliver what is left, for a bounded time, and tell what was not."""
        delivery = self._delivery
        if not self._attempts:
            return
        delivery.add(map(_metric, self._scalars.rest()))
        delivery.add_texts("tags", self._last_tags(error))
        status = functools.partial(RunInMlflow.set_status, status=self._status(error))
        files = list(self._files())
        delivery.finish([status, *files])
        try:
            self._wait()
        except KeyboardInterrupt:  # of the wait alone: what main returned is not to be lost
            _logger.debug("the wait for MLflow was interrupted")
        if not delivery.is_complete:
            delivery.abandon()
            self._console.note(self._undelivered(len(files)))
        elif delivery.thinned:
            self._console.note(
                f"MLflow was too slow for {delivery.thinned} of "
                f"{delivery.thinned + delivery.delivered} numbers, which are left out there, "
                "evenly; runner.history has them"
            )
        if delivery.refused:
            self._console.note(self._refused())

    def _files(self) -> Iterator[Callable[[RunInMlflow], None]]:
        """Yield what stores each file, in directories of its own if the run is not our own."""
        at = PurePosixPath("" if self._is_own else self._facts.run_id)
        for path, name in self._sources.files():
            directory = (at / name).parent
            text = "" if directory == PurePosixPath() else str(directory)
            yield functools.partial(self._store, path, text)

    def _store(self, path: Path, directory: str, run: RunInMlflow) -> None:
        if path.exists():
            self._delivery.allow(path.stat().st_size)
            run.log_file(str(path), directory)

    def _wait(self) -> None:
        began, is_announced = time.monotonic(), False
        while not self._delivery.join(0.1):
            if not is_announced and time.monotonic() - began > PATIENCE_SECONDS:
                is_announced = True
                self._console.note(
                    f"waiting for MLflow to take the outcome and {self._delivery.left} numbers, "
                    f"for {END_SECONDS:.0f} seconds at most; an interrupt ends the wait"
                )
            self._console.show(0)

    def _open(self) -> RunInMlflow:
        run = RunInMlflow(self._uri, self._run_id)
        if not self._run_id:
            self._experiment_id = run.start(self._facts.name or self._facts.main)
            self._run_id = run.run_id
            text = f"MLflow's run {run.run_id} at {shown_uri(self._uri)}"
            self._console.note(text, routine=True)
        return run

    def _take(self, records: Iterable[Point | Bar]) -> None:
        self._delivery.add(map(_metric, self._scalars.take(records)))

    def _take_usage(self, event: Usage) -> None:
        # all ranks of a host say the same of it; the first one knows its GPUs
        if self._reporting_ranks.setdefault(event.host, event.rank) < event.rank:
            return
        self._reporting_ranks[event.host] = event.rank
        step = self._usage_steps[event.host] = self._usage_steps.get(event.host, -1) + 1
        at = _milliseconds(event.time)
        self._delivery.add(
            Metric(name, value, at, step) for name, value in naming.system_metrics(event)
        )

    def _status(self, error: BaseException | None) -> str:
        if not self._is_own:
            return "RUNNING"  # a main that attached to it may have ended it
        if error is None:
            return "FINISHED"
        return "KILLED" if isinstance(error, (KeyboardInterrupt, RunStoppedError)) else "FAILED"

    def _first_tags(self) -> dict[str, str]:
        versions = {f"versions.{name}": each for name, each in installed_versions().items() if each}
        facts = {"run_id": self._facts.run_id, "main": self._facts.main, "status": "running"}
        return {f"{_TAGS}{name}": naming.bounded(text) for name, text in (facts | versions).items()}

    def _last_tags(self, error: BaseException | None) -> dict[str, str]:
        status = "finished" if error is None else "failed"
        if isinstance(error, (KeyboardInterrupt, RunStoppedError)):
            status = "killed"
        facts = {"status": status, "attempts": str(self._attempts), "cluster": self._cluster()}
        if self._sources.record is not None:
            facts["record"] = shown_uri(self._sources.record.location)
        if self._reporting_ranks:
            facts["hosts"] = ", ".join(sorted(self._reporting_ranks))
        if error is not None:
            run = self._facts
            secrets = run.secret_values()
            mask = Mask(os.environ, run.environment, run.arguments, values=secrets)
            facts["error"] = mask.text(in_one_line(error))
        return {f"{_TAGS}{name}": naming.bounded(text) for name, text in facts.items()}

    def _cluster(self) -> str:
        if self._facts.np < 0:
            return "none: the ranks ran on the driver"
        from horovodrunner.spark import session

        try:
            if not session.has_session():
                return "unknown"
            spark = session.find_session()
            return f"Spark {spark.version}, {spark.conf.get('spark.master', 'Spark Connect')}"
        except Exception as error:
            _logger.debug("the session cannot be asked", exc_info=error)
            return "unknown"

    def _undelivered(self, files: int) -> str:
        delivery, where = self._delivery, ""
        if delivery.left:
            what = f"{delivery.left} of {delivery.left + delivery.delivered} numbers"
            where = "; runner.history has the metrics"
        elif delivery.steps_left > files:
            what = "the outcome"
        else:
            what = f"{delivery.steps_left} of {files} files"
            where = "; they are in runner.artifacts and runner.record"
        why = delivery.error or "no answer"
        return f"MLflow at {shown_uri(self._uri)} has not got {what}: {why}{where}"

    def _refused(self) -> str:
        names = list(self._delivery.refused)
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
        why = self._delivery.refused[names[0]]
        advice = ""
        if "already logged" in why:
            advice = ". Start a run for each: mlflow.start_run(nested=True) within another"
        return f"MLflow does not store {listed}: {why}{advice}"


def shown_uri(uri: str) -> str:
    """Return a URI without the password that may be in it.

    >>> shown_uri("http://me:pw@mlflow:5000/x")
    'http://mlflow:5000/x'
    """
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _metric(scalar: Scalar) -> Metric:
    at = _milliseconds(scalar.time)
    return Metric(naming.scalar_name(scalar), scalar.value, at, scalar.step)


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
