"""Follows a run and keeps its record, in a thread of its own. Runs in: the driver."""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import platform
import queue
import shutil
import socket
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovodrunner.errors import ConfigurationError, RunStoppedError, WorkerFailedError
from horovodrunner.flows.call.recording import describe_values
from horovodrunner.flows.logs.lines import count_lines, missing_mark
from horovodrunner.flows.metrics.records import Bar, Point
from horovodrunner.flows.observer import Observer, RunFacts
from horovodrunner.flows.outcome.outcome import Outcome
from horovodrunner.flows.rundir import layout
from horovodrunner.flows.rundir.masking import Mask, without_secrets
from horovodrunner.flows.rundir.upload import RecordUpload
from horovodrunner.flows.rundir.writer import RecordWriter
from horovodrunner.flows.telemetry.phases import Phase
from horovodrunner.formatting import cut
from horovodrunner.placement.versions import installed_versions
from horovodrunner.storage import is_url, local_path
from horovodrunner.wire.events import (
    Failed,
    Lines,
    Message,
    Note,
    Placed,
    Points,
    Profile,
    Usage,
)

if TYPE_CHECKING:
    from horovodrunner.flows.checkpoints.retention import Best
    from horovodrunner.flows.checkpoints.saved import SavedCheckpoint

__all__ = ["RunDirectory"]

FLUSH_SECONDS = 5.0
"""How often what is not written at once is written."""

END_SECONDS = 60.0
"""How long the run's end waits for the disk."""

MAX_WAITING_BYTES = 64 * 1024 * 1024
"""Of events for a disk that is too slow; output and numbers beyond them are left out."""

_OBJECTS_PER_BYTE = 6
"""A point takes so many bytes for each byte that it travelled in."""

MAX_METRICS = 20
"""So many numbers of a checkpoint are kept."""

MAX_TEXT = 200_000
"""Of an error's text and traceback."""


class RunDirectory(Observer):
    """The directory of one run.

    Behind a URL it is a temporary one, whose files are uploaded while the run goes on. It goes with
    this object, unless something could not be uploaded.
    """

    title = "keeping the record of the run"
    wants_usage = wants_output = wants_profiles = True

    def __init__(
        self,
        location: str,
        facts: RunFacts,
        *,
        records_of: Callable[[Points], list[Point | Bar]],
        phases: Callable[[], Sequence[Phase]],
        checkpoints: Callable[[], Sequence[SavedCheckpoint]],
        artifacts: Callable[[], Path | None],
        best: Best | None = None,
    ) -> None:
        self._facts = facts
        self._phases = phases
        self._checkpoints = checkpoints
        self._artifacts = artifacts
        self._best = best
        self._checkpoints_are_near = not is_url(str(facts.options.get("checkpoint_dir") or ""))
        when = time.strftime("%Y%m%d-%H%M%S", time.gmtime(facts.began))
        name = f"{when}-{facts.label}"
        mask = Mask(
            *(os.environ, facts.environment, facts.arguments, facts.options),
            values=facts.secret_values(),
        )
        self._upload: RecordUpload | None = None
        self._remove: weakref.finalize[..., RunDirectory] | None = None
        if is_url(location):
            self._upload = RecordUpload(location, name)
            self.directory = Path(tempfile.mkdtemp(prefix="record-of-a-run-"))
            self._remove = weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
            self.location = self._upload.location
        else:
            self.directory = local_path(location) / name
            self.location = str(self.directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(self.directory, _described(facts), abs(facts.np), mask)
        except OSError as error:
            raise ConfigurationError(
                f"run_dir={location!r}: the record of the run cannot be written to "
                f"{self.directory}: {error}. Choose a directory that this process may write to"
            ) from error
        self.shown = mask.text(self.location)
        """The location without a password that is in it."""
        self._error: BaseException | None = None
        self._waiting: queue.SimpleQueue[tuple[Callable[..., object], Any, int] | None]
        self._waiting = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._left_out: dict[int, int] = {}
        self._thread = threading.Thread(target=self._run, name="horovodrunner-record", daemon=True)
        writer = self._writer
        self.handlers = {
            Lines: lambda event: self._put(writer.lines, event, len(event.lines)),
            Message: lambda event: self._put(writer.message, event),
            Note: lambda event: self._put(writer.note, event),
            Points: lambda event: self._put(
                functools.partial(writer.records, event.rank),
                records_of(event),
                len(event.records) * _OBJECTS_PER_BYTE,
            ),
            Usage: lambda event: self._put(writer.usage, event),
            Profile: lambda event: self._put(writer.profile, event, len(event.stacks)),
            Placed: lambda event: self._put(self._placed, event),
            Failed: lambda event: self._put(self._attempt_failed, event),
        }

    @property
    def artifacts(self) -> Path | None:
        """Where files of the ranks are to be put, in ``rank-N``.

        None if the record is behind a URL: the user wants to find them here, too.
        """
        return self.directory / layout.ARTIFACTS if self._upload is None else None

    def begin(self, attempt: int) -> None:
        """Note that an attempt is launched."""
        self._start()
        self._put(self._writer.begin, attempt)

    def end(self, error: BaseException | None) -> None:
        """Note how the run ended, write the report, and wait for it, for a bounded time."""
        ended = time.time()
        self._start()
        for rank, lines in self._left_out.items():
            self._put_mark(rank, lines)
        self._put(self._finish, (error, ended))
        self._waiting.put(None)
        self._thread.join(END_SECONDS)
        if self._error is None and self._thread.is_alive():
            self._error = TimeoutError(
                f"{self.directory} was not written to within {END_SECONDS:g} s"
            )
        try:
            if self._error is not None:
                raise self._error
            if self._upload is not None:
                self._upload.end()
        except BaseException:
            if self._remove is not None:
                self._remove.detach()
            raise

    def discard(self) -> None:
        """Delete a temporary directory now."""
        if self._remove is not None:
            self._remove()

    def _start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
            if self._upload is not None:
                self._upload.begin(self.directory)

    def _put(self, act: Callable[[Any], object], argument: Any, size: int = 0) -> None:
        if self._error is not None:
            raise self._error  # who called leaves this observer out, and says why
        rank = argument.rank if isinstance(argument, Lines) else -1
        with self._lock:
            if size and self._waiting_bytes > MAX_WAITING_BYTES:
                if rank >= 0:
                    lines = count_lines(argument.lines)
                    self._left_out[rank] = self._left_out.get(rank, 0) + lines
                return
            self._waiting_bytes += size
            missing = self._left_out.pop(rank, 0)
        if missing:
            self._put_mark(rank, missing)
        self._waiting.put((act, argument, size))

    def _put_mark(self, rank: int, lines: int) -> None:
        mark = missing_mark(lines, "the record's disk was too slow")
        self._waiting.put((self._writer.lines, Lines(rank, "stdout", mark), 0))

    def _run(self) -> None:
        try:
            self._take_all()
        except BaseException as error:  # noqa: BLE001 - raised where the next event is taken
            self._error = error

    def _take_all(self) -> None:
        next_flush = time.monotonic() + FLUSH_SECONDS
        while True:
            with contextlib.suppress(queue.Empty):
                item = self._waiting.get(timeout=max(0.0, next_flush - time.monotonic()))
                if item is None:
                    return
                act, argument, size = item
                act(argument)
                with self._lock:
                    self._waiting_bytes -= size
            if time.monotonic() >= next_flush:
                self._writer.flush()
                if self._checkpoints_are_near:  # of others a list may take long
                    self._list_checkpoints()
                next_flush = time.monotonic() + FLUSH_SECONDS

    def _placed(self, event: Placed) -> None:
        self._writer.placed(event)
        self._writer.know(cluster=_cluster(self._facts.np))

    def _attempt_failed(self, event: Failed) -> None:
        failure = Outcome.from_bytes(event.outcome).failure
        if failure is not None:
            where = "" if failure.rank is None else f"rank {failure.rank} on {failure.host}: "
            self._writer.attempt_failed(cut(f"{where}{failure.summary}", MAX_TEXT))

    def _finish(self, how: tuple[BaseException | None, float]) -> None:
        error, ended = how
        self._list_checkpoints()
        for path in self._facts.files.values():
            self._writer.keep_file(path)
        if self._upload is not None and (artifacts := self._artifacts()) is not None:
            self._writer.keep_artifacts(artifacts)
        phases = [[each.name, each.began, each.ended, each.last_rank] for each in self._phases()]
        self._writer.end({**self._outcome(error), "ended": ended}, phases)
        from horovodrunner.flows.rundir.report import write_report

        write_report(self.directory)

    def _list_checkpoints(self) -> None:
        with contextlib.suppress(OSError):
            saved = self._checkpoints()
            best = [] if self._best is None else self._best.among(saved[::-1])[:1]
            found = [
                {
                    "step": each.step,
                    "path": self._writer.hidden(each.path),
                    "size": each.size,
                    "time": each.time.timestamp(),
                    "metrics": self._some_metrics(each),
                    "is_best": each in best,
                }
                for each in saved
                if each.time.timestamp() >= self._facts.began - 1
            ]
            self._writer.checkpoints(found)

    def _some_metrics(self, saved: SavedCheckpoint) -> dict[str, float]:
        """Return a checkpoint's numbers, first of all what it is compared by."""
        first = "" if self._best is None else self._best.metric
        names = sorted(saved.metrics, key=lambda name: name != first)
        return {name: saved.metrics[name] for name in names[:MAX_METRICS]}

    def _outcome(self, error: BaseException | None) -> dict[str, Any]:
        if error is None:
            return {"status": "succeeded"}
        hide = self._writer.hidden
        status = "failed"
        if isinstance(error, (KeyboardInterrupt, RunStoppedError)):
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
        told: dict[str, Any] = {"type": type(error).__name__, "text": hide(_text_of(error))}
        if isinstance(error, WorkerFailedError):
            told["summary"] = hide(cut(error.summary, MAX_TEXT))
            told["rank"], told["host"] = error.rank, error.host
            told["last_lines"] = hide(error.last_lines)
            told["consequences"] = [hide(each) for each in error.consequences]
            told["traceback"] = hide(cut(error.traceback, MAX_TEXT, keep_end=True))
        if not told.get("traceback"):
            lines = "".join(traceback.format_exception(error))
            told["traceback"] = hide(cut(lines, MAX_TEXT, keep_end=True))
        told["attempts"] = [hide(each) for each in getattr(error, "attempts", ())]
        return {"status": status, "error": told}


def _text_of(error: BaseException) -> str:
    try:
        return cut(str(error), MAX_TEXT)
    except Exception:  # noqa: BLE001 - it may be anybody's
        return "(its text cannot be had)"


def _described(facts: RunFacts) -> dict[str, Any]:
    return {
        "run_id": facts.run_id,
        "name": facts.name,
        "main": facts.main,
        "np": facts.np,
        "began": facts.began,
        "arguments": describe_values(facts.arguments),
        "options": describe_values(facts.options),
        "environment": describe_values(without_secrets(facts.environment, facts.secret_variables)),
        "versions": {name: each for name, each in installed_versions().items() if each},
        "driver": {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "user": _user(),
            "system": platform.platform(),
        },
        "outcome": {"status": "running"},
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        return str(os.getuid())


def _cluster(np: int) -> dict[str, str]:
    """Describe the cluster as far as that needs no waiting."""
    if np < 0:
        return {"mode": "processes on the driver, without Spark"}
    found = {"mode": "a barrier stage of Spark"}
    with contextlib.suppress(Exception):  # it may be any Spark, and be going
        from horovodrunner.spark.session import find_session, has_session

        if not has_session():
            return found
        spark = find_session()
        found["Spark"] = str(spark.version)
        for name in _CLUSTER_CONFS:
            if value := spark.conf.get(name, None):
                found[name] = value
    return found


_CLUSTER_CONFS = (
    "spark.master",
    "spark.app.name",
    "spark.app.id",
    "spark.executor.instances",
    "spark.executor.cores",
    "spark.executor.memory",
    "spark.task.cpus",
    "spark.executor.resource.gpu.amount",
    "spark.task.resource.gpu.amount",
)
