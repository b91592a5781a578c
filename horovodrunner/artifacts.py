"""Files that main leaves on any rank, and that come to the driver. Runs in: the worker.

What lies below :func:`path` when a rank ends, however it ends, is put on the driver under
``rank-N/`` of ``HorovodRunner.artifacts``::

    from horovodrunner import artifacts

    def train(steps):
        with artifacts.torch_profiler(wait=1, warmup=1, active=3) as profiler:
            for step in range(steps):
                ...
                profiler.step()
        figure.savefig(artifacts.path("confusion.png"))
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentValueError
from horovodrunner.flows.artifacts.places import directory_of_rank
from horovodrunner.processes.worker.context import inherited_context

__all__ = ["path", "torch_profiler"]

_outside: Path | None = None


def path(name: str | os.PathLike[str] = "") -> Path:
    """Return where this rank is to write a file, or a directory of files.

    All ranks may use the same names. Of each rank 1 GiB is brought to the driver, and of a run
    8 GiB, the smallest files first; what is left out is named there.

    Parameters
    ----------
    name
        A relative path such as ``"trace.json"`` or ``"samples/7.png"``; its directory exists then.
        ``""`` is the rank's directory itself, for what writes several files there.

    Returns
    -------
    pathlib.Path
        A path on this machine. Outside a run it is in a temporary directory, which goes with the
        process.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If `name` is neither a str nor a path, or leads out of the rank's directory.

    Examples
    --------
    >>> path("samples/7.txt").write_text("a sample")  # doctest: +SKIP
    """
    global _outside
    name = checked.text("name", os.fspath(name) if isinstance(name, os.PathLike) else name)
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
        raise ArgumentValueError(
            f"artifacts.path({name!r}): give a path relative to the rank's own directory, such as "
            "'trace.json'"
        )
    context = inherited_context()
    if context is not None:
        directory = directory_of_rank(Path(context.spec.scratch), context.spec.rank)
    else:
        if _outside is None:
            _outside = Path(tempfile.mkdtemp(prefix="horovodrunner-artifacts-"))
            atexit.register(_remove, _outside, os.getpid())
        directory = _outside
    found = directory / name
    (found.parent if parts else found).mkdir(parents=True, exist_ok=True)
    return found


def _remove(directory: Path, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # not one that it forked
        shutil.rmtree(directory, ignore_errors=True)


def torch_profiler(
    *, wait: int = 1, warmup: int = 1, active: int = 3, repeat: int = 1, **options: Any
) -> Any:
    """Return a profiler of PyTorch whose traces are artifacts; call its ``step()`` each step.

    The files, ``trace-<step>.json``, open in Perfetto and in Chrome's tracing view.

    Parameters
    ----------
    wait, warmup, active, repeat
        As in ``torch.profiler.schedule``: steps to leave out, to warm up, and to record, and how
        often; ``repeat=0`` goes on to the end.
    **options
        Others of ``torch.profiler.profile``: ``record_shapes=True``, ``profile_memory=True``.

    Returns
    -------
    torch.profiler.profile
        A context manager.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If a number is not an int, or too small.

    Examples
    --------
    >>> with torch_profiler(active=2) as profiler:  # doctest: +SKIP
    ...     for batch in batches:
    ...         train(batch)
    ...         profiler.step()
    """
    import torch

    least = {"wait": 0, "warmup": 0, "active": 1, "repeat": 0}
    given = {"wait": wait, "warmup": warmup, "active": active, "repeat": repeat}
    numbers = {name: checked.integer(name, given[name], at_least=least[name]) for name in least}

    def export(profiler: Any) -> None:
        profiler.export_chrome_trace(str(path(f"trace-{profiler.step_num}.json")))

    schedule = torch.profiler.schedule(**numbers)
    return torch.profiler.profile(**{"schedule": schedule, "on_trace_ready": export, **options})
