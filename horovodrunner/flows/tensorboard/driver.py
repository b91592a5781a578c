"""Writes what the ranks report into event files, which TensorBoard reads. Runs in: the driver."""

from __future__ import annotations

import importlib.util
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from horovodrunner.errors import ArgumentValueError, ConfigurationError
from horovodrunner.flows.metrics.records import Bar, Point
from horovodrunner.flows.metrics.scalars import Scalar, ScalarStream
from horovodrunner.flows.observer import Observer, RunFacts
from horovodrunner.storage import is_url, local_path, path_of_file_url
from horovodrunner.wire.events import Points

__all__ = ["TensorBoardWriter", "checked_directory"]

_file_numbers = itertools.count()


def checked_directory(name: str, location: str) -> Path:
    """Return the directory for event files, if it is one of this machine and they can be made."""
    path = path_of_file_url(location)
    if path is None and is_url(location):
        raise ArgumentValueError(
            f"{name}={location!r}: event files are written on the driver, and no storage behind a "
            "URL can be appended to: give a path, and copy the files when the run has ended"
        )
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigurationError(
            f"{name}={location!r} needs the package tensorboard, which {sys.executable} does not "
            f"have: install it with `{sys.executable} -m pip install tensorboard`"
        )
    return local_path(location if path is None else path)


class TensorBoardWriter(Observer):
    """Writes scalars into a directory of the run's own, and one below it for each restart.

    Rank 0's are in it, the statistics of all ranks beside them, and those of another rank that
    reports all in ``rank-N`` below it.
    """

    title = "writing event files for TensorBoard"

    def __init__(
        self,
        directory: Path,
        facts: RunFacts,
        records_of: Callable[[Points], Iterable[Point | Bar]],
    ) -> None:
        began = time.strftime("%Y%m%d-%H%M%S", time.localtime(facts.began))
        self._run = self._directory = directory / f"{began}-{facts.label}"
        self._scalars = ScalarStream(abs(facts.np))
        self._files: dict[int, EventFile] = {}
        self.handlers = {Points: lambda event: self._take(records_of(event))}
        try:
            self._run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"tensorboard_dir={os.fspath(directory)!r} cannot be written to: {error}. Choose "
                "a directory that this process may write to"
            ) from error

    def begin(self, attempt: int) -> None:
        """Write into another directory from now on, as the steps begin anew."""
        if attempt > 1:
            self._finish()
            self._directory = self._run / f"attempt-{attempt}"
        self._scalars.begin()

    def end(self, error: BaseException | None) -> None:
        """Complete the files."""
        self._finish()

    def _take(self, records: Iterable[Point | Bar]) -> None:
        self._write(self._scalars.take(records))
        for file in self._files.values():
            file.flush()

    def _write(self, scalars: Iterable[Scalar]) -> None:
        for scalar in scalars:
            if scalar.rank not in self._files:
                at = self._directory / f"rank-{scalar.rank}" if scalar.rank else self._directory
                self._files[scalar.rank] = EventFile(at)
            self._files[scalar.rank].add(scalar)

    def _finish(self) -> None:
        self._write(self._scalars.rest())
        while self._files:
            self._files.popitem()[1].close()


class EventFile:
    """A file of TensorBoard's records.

    TensorBoard's own writer of such files would import TensorFlow where that is installed.
    """

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event: Any = event_pb2.Event
        self._summary: Any = summary_pb2.Summary
        directory.mkdir(parents=True, exist_ok=True)
        now, host = time.time(), socket.gethostname()
        name = f"events.out.tfevents.{now:.0f}.{host}.{os.getpid()}.{next(_file_numbers)}"
        self._records = RecordWriter((directory / name).open("wb"))
        self._write(wall_time=now, file_version="brain.Event:2")

    def add(self, scalar: Scalar) -> None:
        """Write a number."""
        value = self._summary.Value(tag=scalar.name, simple_value=scalar.value)
        summary = self._summary(value=[value])
        self._write(wall_time=scalar.time, step=scalar.step, summary=summary)

    def flush(self) -> None:
        """Let TensorBoard see what was written."""
        self._records.flush()

    def close(self) -> None:
        """Complete the file."""
        self._records.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(**fields).SerializeToString())
