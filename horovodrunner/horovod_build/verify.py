"""Proves an installed or unpacked Horovod with real processes. Runs in: the command line."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from horovodrunner.errors import HorovodBuildError

SCRIPT = Path(__file__).with_name("allreduce.py")


def verify_allreduce(
    frameworks: Iterable[str], *, folder: Path | None = None, timeout: float = 120.0
) -> None:
    """Run an allreduce of two processes with each framework, in `timeout` seconds at most.

    `folder` is where Horovod lies if it is not the installed one that is meant.
    """
    for framework in frameworks:
        _verify_one(framework, folder, timeout)


def _verify_one(framework: str, folder: Path | None, timeout: float) -> None:
    # What the user set for training runs must not decide about this one.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    paths = [folder, environ.get("PYTHONPATH"), Path(__file__).parents[2]]
    environ["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    with tempfile.TemporaryDirectory(prefix="horovod-verify-") as work:
        script = shutil.copy(SCRIPT, work)
        output = Path(work) / "output"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, script, framework],
                cwd=work,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end_group(process)
        if code != 0:
            said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            ended = f"exit code {code}" if code is not None else f"no answer in {timeout:.0f} s"
            raise HorovodBuildError(
                f"a two-process allreduce with {framework} failed ({ended}), so this Horovod "
                "does not work here; its last output:\n  " + "\n  ".join(said[-8:])
            )


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever the process started and is still running, then reap the process."""
    # EPERM is what macOS answers for a group in which only zombies are left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
