"""Faults that a test asks for. Runs in: the driver."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError, ConfigurationError
from horovodrunner.placement.environment import FAULTS
from horovodrunner.processes.driver.channel import DriverChannel
from horovodrunner.testing.fault import Fault, from_text, to_text

__all__ = ["Faults"]

_LOOK_SECONDS = 0.01

_MAX_CHARACTERS = 100_000
"""Of all faults: Linux takes no variable of more than 128 KiB."""


class Faults:
    """Faults at a chosen place, in the runs that this process starts meanwhile.

    They happen when a rank gets to a step: when it calls :func:`horovodrunner.metrics.report`,
    :func:`horovodrunner.checkpoint.save` or :func:`~horovodrunner.checkpoint.save_torch` with that
    step or a later one, before it reports or saves it. The code under test stays as it is. Each
    happens once, in the first attempt of a run, unless ``attempt=`` says another (0: in each).

    Examples
    --------
    >>> from horovodrunner import HorovodRunner
    >>> with Faults() as faults:  # in pytest, the fixture ``faults`` is one
    ...     faults.kill(rank=1, at_step=3)
    ...     HorovodRunner(np=-2, max_restarts=1).run(train)  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._is_open = False
        self._before: str | None = None
        self._directory: Path | None = None
        self._cutter: threading.Thread | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Faults:
        self._before = os.environ.get(FAULTS)
        self._is_open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_open = False
        self._ended.set()
        if self._cutter is not None:
            self._cutter.join()
        if self._before is None:
            os.environ.pop(FAULTS, None)
        else:
            os.environ[FAULTS] = self._before
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self, rank: int, at_step: int = 0, *, attempt: int = 1) -> None:
        """Kill the rank's process with SIGKILL, as the kernel does when memory runs out.

        Parameters
        ----------
        rank
            The rank that it happens to.
        at_step
            The step at which it happens.
        attempt
            The launch that it happens in, counted from 1; 0: in each.
        """
        self._add("kill", rank, at_step, attempt)

    def raise_in(
        self, rank: int, error: BaseException, at_step: int = 0, *, attempt: int = 1
    ) -> None:
        """Raise an exception in the rank's main.

        Parameters
        ----------
        rank, at_step, attempt
            As for :meth:`kill`.
        error
            The exception, which travels by cloudpickle.
        """
        import cloudpickle

        if not isinstance(error, BaseException):
            raise ArgumentTypeError(
                f"error={checked.shown(error)}: give an exception, such as ValueError('no luck')"
            )
        try:
            pickled = cloudpickle.dumps(error)
            cloudpickle.loads(pickled)
        except Exception as problem:
            raise ArgumentTypeError(
                f"error={checked.shown(error)}: it cannot travel to the rank "
                f"({type(problem).__name__}: {problem}). Exceptions are made anew from args: give "
                "super().__init__() all that __init__ takes"
            ) from problem
        self._add("raise", rank, at_step, attempt, exception=pickled.hex())

    def lose_executor(self, rank: int, at_step: int = 0, *, attempt: int = 1) -> None:
        """Kill the executor that the rank runs in, with all its tasks; needs np > 0.

        Parameters
        ----------
        rank, at_step, attempt
            As for :meth:`kill`.
        """
        self._add("lose_executor", rank, at_step, attempt)

    def slow(
        self, rank: int, seconds_per_step: float, at_step: int = 0, *, attempt: int = 0
    ) -> None:
        """Let each step of the rank take longer, from a step on.

        Parameters
        ----------
        rank, at_step, attempt
            As for :meth:`kill`, but in each attempt.
        seconds_per_step
            How much longer.
        """
        seconds = checked.seconds("seconds_per_step", seconds_per_step)
        if seconds > threading.TIMEOUT_MAX:
            raise ArgumentValueError(f"seconds_per_step={seconds:g}: no step takes for so long")
        self._add("slow", rank, at_step, attempt, seconds=seconds)

    def fill_disk(self, rank: int, at_step: int = 0, *, attempt: int = 1) -> None:
        """Let no file grow that the rank writes from a step on.

        Writing fails with an OSError ("File too large"), which is how Linux tells a process that
        may write no more bytes to files; one of a full disk differs in its number alone.

        Parameters
        ----------
        rank, at_step, attempt
            As for :meth:`kill`.
        """
        self._add("fill_disk", rank, at_step, attempt)

    def cut_driver(self, rank: int = 0, at_step: int = 0, *, attempt: int = 1) -> None:
        """Break all connections between the run's tasks and this process; needs np > 0.

        Parameters
        ----------
        rank, at_step, attempt
            As for :meth:`kill`: the rank whose step it happens at.
        """
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="horovodrunner-faults-"))
        place = self._directory / f"cut-{len(self._faults)}"
        self._add("cut_driver", rank, at_step, attempt, place=str(place))
        if self._cutter is None:
            self._cutter = threading.Thread(target=self._cut, name="horovodrunner-faults")
            self._cutter.start()

    def _add(self, kind: str, rank: Any, at_step: Any, attempt: Any, **more: Any) -> None:
        fault = Fault(
            kind,
            checked.integer("rank", rank, at_least=0),
            checked.integer("at_step", at_step),
            checked.integer("attempt", attempt, at_least=0),
            **more,
        )
        if not self._is_open:
            raise ConfigurationError(
                "faults are added within a block, after which there are none any more: "
                "with Faults() as faults: ..., or the fixture faults in pytest"
            )
        self._publish([*self._faults, fault])

    def _publish(self, faults: list[Fault]) -> None:
        """Let runs see them, and those of a block around this one."""
        text = to_text([*from_text(self._before or "[]"), *faults])
        if len(text) > _MAX_CHARACTERS:
            raise ArgumentValueError(
                f"this test's faults have {len(text)} characters, and {_MAX_CHARACTERS} travel to "
                "the ranks: raise an exception with less in it"
            )
        self._faults = faults
        os.environ[FAULTS] = text

    def _cut(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            for fault in self._faults:
                place, done = Path(fault.place or "/nowhere"), Path(f"{fault.place}.done")
                nothing = Path(f"{fault.place}.nothing")
                if place.exists() and not (done.exists() or nothing.exists()):
                    was_there = DriverChannel.cut_all()
                    with contextlib.suppress(OSError):
                        (done if was_there else nothing).touch()

    def note_in(self, happened: Path, went_on: Path) -> None:
        """Let faults that are known by now create files: when they happen, and if main goes on."""
        told, later = str(happened), str(went_on)
        self._publish([replace(each, told=told, went_on=later) for each in self._faults])

    def after_checkpoint(self, directory: Path) -> None:
        """Let faults that are known by now wait until there is a checkpoint to go on from."""
        self._publish([replace(each, checkpoints=str(directory)) for each in self._faults])
