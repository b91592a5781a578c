"""One rank: load the job, call main, write the outcome. Runs in: the worker.

Started by the task, before the rank is known, as ``python -m horovodrunner.worker --control FD
--report FD --stacks FD [--result FD] [--import MODULE ...]``. The job comes through the control
pipe, and what happens goes out through the report pipe; what main returned goes to a file.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle

from horovodrunner.core import payload
from horovodrunner.core.job import (
    STACK_SIGNAL,
    Failure,
    FailureKind,
    Outcome,
    Success,
    WorkerSpec,
    speaks_of_peer_loss,
)
from horovodrunner.core.pickled import Layout
from horovodrunner.errors import PayloadError
from horovodrunner.worker import horovod_keras
from horovodrunner.worker.context import TaskLink, WorkerContext, set_context
from horovodrunner.worker.control import ControlPipe
from horovodrunner.worker.leaving import leave
from horovodrunner.worker.watch import collective_of

MAX_EXCEPTION_BYTES = 1024 * 1024
"""A pickled exception larger than this is left out; its text is enough."""

_OF_A_PYTHON = re.compile(r"/lib(?:64)?/python[\d.]*(?:/|$)")
"""In the path of every directory in which an installed Python keeps modules and packages."""

_PEER_LOSS_TYPES = ("HorovodInternalError", "HorovodShutdownError", "DistBackendError")


def main() -> int:
    """Run one rank from start to end.

    Returns
    -------
    int
        The process's exit code: 0 if main returned.
    """
    arguments = _parse_arguments()
    if arguments.keep_warm:
        vars(arguments).update(_forked_from_warm_parent(arguments))
    link = TaskLink(arguments.report)
    control = ControlPipe(arguments.control, link)
    fds = (arguments.control, arguments.report, arguments.stacks, arguments.result)
    _prepare_process(*(fd for fd in fds if fd is not None))
    faulthandler.register(STACK_SIGNAL, file=arguments.stacks, all_threads=True)
    link.send("ready", at=time.time())
    horovod_keras.install()
    _import_early(arguments.early_imports)
    imported_at = time.time()
    spec, call = control.wait_for_job()
    set_context(WorkerContext(spec, link, control))
    outcome, exit_code = run(spec, call, control, arguments.result)
    _flush_output()
    link.send("times", imported_at=imported_at, warmed=arguments.warmed, times=control.times())
    header, body = outcome.to_frame()
    link.send("outcome", body, **header)
    return exit_code


def run(
    spec: WorkerSpec,
    call: bytes | bytearray | memoryview,
    control: ControlPipe,
    result_fd: int | None,
) -> tuple[Outcome, int]:
    """Call main and turn whatever happens into an outcome.

    Parameters
    ----------
    spec
        The slot.
    call
        The pickled ``(main, kwargs)``.
    control
        Is told when main begins and ends.
    result_fd
        The file for what main returned, if it is wanted.

    Returns
    -------
    tuple of Outcome and int
        What happened, and the exit code that says the same.
    """
    began = time.time()
    os.environ.update(spec.environment)
    sys.path += [entry for entry in spec.sys_path if _is_lent(entry)]
    try:
        function, kwargs = payload.load(call)
    except BaseException as error:  # noqa: BLE001 - unpickling runs arbitrary code
        return _failed(spec, error, "main could not be unpickled: ", hint=_import_hint(error)), 1
    finally:
        control.unpickled(began)
    horovod_keras.announce()  # what was imported early had nobody to tell
    control.main_begins()
    try:
        result = function(**kwargs)
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            code = leaving.code if isinstance(leaving.code, int) else 1
            return _failed(spec, leaving, "main called sys.exit: ", exit_code=code), code
        result = None
    except BaseException as error:  # noqa: BLE001 - reported, never swallowed
        return _failed(spec, error, ""), 1
    finally:
        control.main_ends()
    try:
        layout: Layout = ()
        if spec.return_result and result_fd is not None:
            layout = payload.write_result(result, result_fd)
    except PayloadError as error:
        return _failed(spec, error, "", with_traceback=False), 1
    return Outcome(success=Success(spec.rank, layout)), 0


def _is_lent(entry: str) -> bool:
    """Whether a directory of the driver's import path serves here, too.

    Packages of the driver's own Python may not fit this one; and a rank on the driver's machine
    must not find what ranks elsewhere lack.
    """
    return entry not in sys.path and Path(entry).exists() and not _OF_A_PYTHON.search(entry)


def _failed(
    spec: WorkerSpec,
    error: BaseException,
    prefix: str,
    *,
    hint: str = "",
    exit_code: int | None = None,
    with_traceback: bool = True,
) -> Outcome:
    own_frames = error.__traceback__
    if own_frames is not None and own_frames.tb_next is not None:
        own_frames = own_frames.tb_next  # the frame of this file says nothing to the user
    text = "".join(traceback.format_exception(type(error), error, own_frames))
    with contextlib.suppress(OSError, ValueError):  # main may have closed it
        sys.stderr.write(text)
    name = type(error).__qualname__
    message = str(error) or "(no message)"
    after_peer_loss = name in _PEER_LOSS_TYPES or speaks_of_peer_loss(message)
    failure = Failure(
        rank=spec.rank,
        host=spec.host,
        summary=f"{prefix}{name}: {message}{hint}",
        kind=FailureKind.EXCEPTION,
        traceback=text if with_traceback else "",
        exit_code=exit_code,
        exception_type=f"{type(error).__module__}.{name}",
        exception=_pickle_exception(error),
        after_peer_loss=after_peer_loss,
        collective=collective_of(_frames_of(error)),
    )
    return Outcome(failure=failure)


def _frames_of(error: BaseException) -> list[FrameType]:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[::-1]


def _pickle_exception(error: BaseException) -> bytes:
    try:
        data = bytes(cloudpickle.dumps(error))
    except Exception:  # noqa: BLE001 - its text is enough
        return b""
    return data if len(data) <= MAX_EXCEPTION_BYTES else b""


def _import_hint(error: BaseException) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return ""
    return (
        f". The module {error.name!r} exists on the driver but not for {sys.executable} here: "
        "install it on the executors, ship it with spark.sparkContext.addPyFile(...), or call "
        f"cloudpickle.register_pickle_by_value({(error.name or 'module').split('.')[0]})"
    )


def _prepare_process(*own_fds: int) -> None:
    for fd in own_fds:
        os.set_inheritable(fd, False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    os.environ["PYTHONUNBUFFERED"] = "1"  # for Python processes that main starts


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # main may have closed it
            stream.flush()


def _import_early(modules: Sequence[str]) -> None:
    gc.disable()  # hardly anything is freed meanwhile, and looking takes a tenth of the time
    for module in modules:
        with contextlib.suppress(Exception):  # main meets the same error, with its own traceback
            importlib.import_module(module)
    gc.enable()


def _forked_from_warm_parent(arguments: Any) -> dict[str, Any]:
    """Be the warm parent until the session ends; this returns in workers forked from it only."""
    from horovodrunner.worker.warm import WarmParent

    try:
        parent = WarmParent(
            arguments.keep_warm, arguments.owner, arguments.idle_seconds, arguments.listener
        )
    except OSError:
        sys.exit(0)  # another task's is there already
    if arguments.listener is None:
        parent.detach()
    began = time.time()
    if parent.may_fork:
        _import_early(arguments.early_imports)
    warmed = (began, time.time())
    return {**parent.serve(), "early_imports": [], "warmed": warmed}


def _parse_arguments() -> Any:
    parser = argparse.ArgumentParser(prog="python -m horovodrunner.worker")
    parser.add_argument("--control", type=int, help="file descriptor to read from")
    parser.add_argument("--report", type=int, help="file descriptor to write to")
    parser.add_argument("--stacks", type=int, help="file descriptor to write to")
    parser.add_argument("--result", type=int, help="file descriptor of an empty file")
    parser.add_argument("--import", dest="early_imports", action="append", default=[])
    parser.set_defaults(warmed=(0.0, 0.0))
    warm = parser.add_argument_group("the process from which workers are forked")
    warm.add_argument("--keep-warm", help="its address")
    warm.add_argument("--owner", type=int, help="process with which it ends")
    warm.add_argument("--listener", type=int, help="its socket, where there is one already")
    warm.add_argument("--idle-seconds", type=float, help="how long it stays without a worker")
    return parser.parse_args()


if __name__ == "__main__":
    leave(main())
