"""Lets faults happen at the steps that main reports or saves. Runs in: the worker."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

from horovodrunner.errors import ConfigurationError
from horovodrunner.testing.fault import Fault, from_text
from horovodrunner.wire.events import Job

__all__ = ["StepFaults"]

WAIT_SECONDS = 60.0
"""How long a rank waits for the test, or for a checkpoint, before its fault fails."""

_LOOK_SECONDS = 0.01


class StepFaults:
    """The faults of one rank in one attempt; called with each step that main gets to."""

    def __init__(self, job: Job, text: str) -> None:
        self._job = job
        faults = from_text(text)
        self._went_on = [each.went_on for each in faults if 0 < each.attempt < job.attempt]
        self._waiting = [
            fault
            for fault in faults
            if fault.rank == job.rank and fault.attempt in (0, job.attempt)
        ]
        self._owner = os.getpid()

    def __call__(self, step: int) -> None:
        """Let happen what is due; a process that main forked is left alone."""
        if os.getpid() != self._owner:
            return
        due = [fault for fault in self._waiting if step >= fault.at_step]
        for fault in due:
            if fault.kind != "slow":
                self._waiting.remove(fault)
            if fault.checkpoints:
                self._wait_for_checkpoint(fault)
            if fault.told:
                Path(fault.told).touch()
            getattr(self, f"_{fault.kind}")(fault)

    def latest_is_asked_for(self) -> None:
        """Note that main asks for the checkpoint that it is to go on from."""
        for file in filter(None, self._went_on):
            Path(file).touch()

    def _kill(self, _: Fault) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _raise(self, fault: Fault) -> None:
        import cloudpickle

        raise cloudpickle.loads(bytes.fromhex(fault.exception))

    def _slow(self, fault: Fault) -> None:
        time.sleep(fault.seconds)

    def _lose_executor(self, _: Fault) -> None:
        import psutil

        for each in psutil.Process().parents():
            if any("CoarseGrainedExecutorBackend" in word for word in each.cmdline()):
                each.kill()
                time.sleep(WAIT_SECONDS)  # this process goes with it
        raise ConfigurationError(
            f"faults.lose_executor(rank={self._job.rank}): this rank runs in no executor of its "
            "own. It needs np > 0 on real executors: the fixture spark_cluster has them"
        )

    def _fill_disk(self, _: Fault) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # it would end the process
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))

    def _cut_driver(self, fault: Fault) -> None:
        place, done = Path(fault.place), Path(f"{fault.place}.done")
        nothing = Path(f"{fault.place}.nothing")
        place.touch()
        self._wait(
            lambda: done.exists() or nothing.exists(),
            "the test's process did not cut the connection",
        )
        if nothing.exists():
            raise ConfigurationError(
                f"faults.cut_driver(rank={self._job.rank}): this run has no connection to its "
                "driver. It needs np > 0: the fixture spark_cluster has executors"
            )

    def _wait_for_checkpoint(self, fault: Fault) -> None:
        root = Path(fault.checkpoints)
        self._wait(
            lambda: any(root.glob("**/step-*/manifest.json")),
            f"there is no checkpoint in {root} that the next attempt could go on from: save one "
            f"before step {fault.at_step}",
        )

    def _wait(self, condition: Any, problem: str) -> None:
        end_by = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() >= end_by:
                raise ConfigurationError(f"a fault waited for {WAIT_SECONDS:g} s: {problem}")
            time.sleep(_LOOK_SECONDS)
