"""One rank: load the job, call main, write the outcome. Runs in: the worker.

Started by the task, before the rank is known, as if by ``python -m horovodrunner.processes.worker
--control FD --report FD --stacks FD --metrics FD [--result FD] [--import MODULE ...]``;
flows/call/import_path.py says how. The job comes through the control pipe, and what happens goes
out through the report pipe; what main returned goes to a file.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import faulthandler
import fcntl
import gc
import importlib
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from horovodrunner.errors import PayloadError
from horovodrunner.flows.call.import_path import before_stdlib
from horovodrunner.flows.logs.debug import turn_on_if_wanted
from horovodrunner.flows.metrics.worker import MetricsPipe
from horovodrunner.flows.mlflow.worker import keep_autologging_to_rank_0
from horovodrunner.flows.outcome.gpu_hint import gpu_hint
from horovodrunner.flows.outcome.outcome import (
    Failure,
    FailureKind,
    Outcome,
    Success,
    speaks_of_peer_loss,
)
from horovodrunner.flows.outcome.worker import (
    RECURSION_LIMIT,
    describe,
    exit_code_of,
    show_source_of_threads,
)
from horovodrunner.formatting import cut, in_one_line
from horovodrunner.memory_limit import memory_hint
from horovodrunner.pickling import payload
from horovodrunner.pickling.buffers import Layout, loads
from horovodrunner.placement.environment import FAULTS, IMPORT_PATH
from horovodrunner.processes.worker import gloo, horovod_keras, notices
from horovodrunner.processes.worker.context import TaskLink, WorkerContext, set_context
from horovodrunner.processes.worker.control import ControlPipe, leave_without_pipes
from horovodrunner.processes.worker.leaving import flush_output, leave
from horovodrunner.processes.worker.main_module import become_main, lowest_descriptor
from horovodrunner.processes.worker.watch import collective_of
from horovodrunner.wire.events import Ended, Job, Ready
from horovodrunner.wire.signals import STACK_SIGNAL

if TYPE_CHECKING:
    from horovodrunner.testing.injection import StepFaults

_logger = logging.getLogger("horovodrunner.processes.worker")

_PEER_LOSS_TYPES = ("HorovodInternalError", "HorovodShutdownError", "DistBackendError")

_NOTHING: Layout = ()

_NOT_IN_MAIN = re.compile(
    r"Can't get attribute '(\w+)[\w.]*' on <module '__main__'"
    r"|module '__main__' has no attribute '(\w+)'"
    r"|cannot import name '(\w+)' from '__main__'"
)


def main() -> int:
    """Run one rank from start to end."""
    arguments = _parse_arguments()
    _take_over_process()
    if arguments.keep_warm:
        vars(arguments).update(_forked_from_warm_parent(arguments))
    _move_descriptors(arguments)
    link = TaskLink(arguments.report)
    metrics = MetricsPipe(arguments.metrics)
    control = ControlPipe(arguments.control, link, metrics)
    _prepare_streams()
    faulthandler.register(STACK_SIGNAL, file=arguments.stacks, all_threads=True)
    link.send(Ready(time.time()))
    turn_on_if_wanted("a worker", "its standard error, which is in its executor's log")
    gloo.install()
    horovod_keras.install()
    notices.install()
    _import_early(arguments.early_imports)
    imported_at = time.time()
    _logger.debug("has imported %s; waits for its job", arguments.early_imports)
    spec, call = control.wait_for_job()
    faults = _faults(spec)
    on_latest = None if faults is None else faults.latest_is_asked_for
    set_context(WorkerContext(spec, link, control, metrics, faults, on_latest))
    _logger.debug("is rank %d; main and its arguments have %d bytes", spec.rank, len(call))
    if spec.preflight:
        from horovodrunner.flows.preflight.worker import measure

        control.wait_for_step()
        began = time.time()
        link.send(measure(spec))
        control.measured(began)
        control.wait_for_step()
    outcome, exit_code = run(spec, call, control, arguments.result)
    _logger.debug("main has ended, exit code %d", exit_code)
    flush_output()
    try:
        link.send(control.times(imported_at, arguments.warmed))
        link.send(Ended(spec.rank, outcome.to_bytes()))
    except OSError as error:
        if error.errno == errno.EBADF:
            leave_without_pipes()
        raise
    return exit_code


def _faults(spec: Job) -> StepFaults | None:
    """Return what lets faults of a test happen, if there are any."""
    if (text := os.environ.get(FAULTS)) is None:
        return None
    from horovodrunner.testing.injection import StepFaults

    return StepFaults(spec, text)


def run(spec: Job, call: bytes, control: ControlPipe, result_fd: int | None) -> tuple[Outcome, int]:
    """Call main and turn whatever happens into an outcome and an exit code.

    Only this process does so. One that main forked and that falls out of main ends as that of a
    script does: with its own exit code, and without a word to the task.
    """
    own_pid = os.getpid()
    began = time.time()
    os.environ.update(spec.environment)
    keep_autologging_to_rank_0()
    become_main()
    show_source_of_threads()
    try:
        function, kwargs = loads(call)
    except BaseException as error:  # noqa: BLE001 - it is described
        if os.getpid() != own_pid:
            _leave_as_child(error)
        return _failed(spec, error, "main could not be unpickled: ", hint=_import_hint), 1
    finally:
        control.unpickled(began)
    script, layout, left_early = _script_name(function), _NOTHING, b""
    if script:  # it may end its process itself, or become another program
        layout = _written(None, spec, result_fd)
        left_early = Outcome(success=Success(spec.rank, layout)).to_bytes()
    control.main_begins(left_early)
    try:
        result = function(**kwargs)
        sys.settrace(None)
        _finish_saving()
        _stop_what_interrupts()
    except BaseException as error:  # noqa: BLE001 - it is described
        sys.settrace(None)
        if os.getpid() != own_pid:
            _leave_as_child(error)
        _stop_what_interrupts()
        _end_main(control)
        if not issubclass(type(error), SystemExit):
            return _failed(spec, error, "", hint=_main_hint), 1
        if code := exit_code_of(error):
            told = f"{script or 'main'} called sys.exit: "
            hint = _reason_of_exit if script else _exit_hint
            failed = _failed(
                spec, error, told, hint=hint, exit_code=code, prints_traceback=not script
            )
            return failed, code
        _finish_saving()
        result = None
    else:
        if os.getpid() != own_pid:
            _leave_as_child()
        _end_main(control)
    try:
        layout = layout or _written(result, spec, result_fd)
    except PayloadError as error:
        return _failed(spec, error, "", with_traceback=False), 1
    except BaseException as error:  # noqa: BLE001 - pickling runs the user's code
        what = "the value that main returned cannot be pickled: "
        return _failed(spec, error, what, kind=FailureKind.RESULT), 1
    return Outcome(success=Success(spec.rank, layout)), 0


def _written(result: Any, spec: Job, result_fd: int | None) -> Layout:
    """Write what main returned to the rank's file, if somebody wants it."""
    if not spec.return_result or result_fd is None:
        return _NOTHING
    return payload.write_result(result, result_fd)


def _finish_saving() -> None:
    """Wait until what main saves in the background is written."""
    background = sys.modules.get("horovodrunner.flows.checkpoints.worker.background")
    if background is not None:
        background.wait()


def _stop_what_interrupts() -> None:
    """Stop main's timers and ``interrupt_main()``: what they raise would end the report."""
    for _ in range(10):
        with contextlib.suppress(BaseException):  # a handler of main's, for one that came meanwhile
            for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
                signal.setitimer(timer, 0)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            return


def _end_main(control: ControlPipe) -> None:
    control.main_ends()
    if sys.getrecursionlimit() < RECURSION_LIMIT:
        sys.setrecursionlimit(RECURSION_LIMIT)


def _leave_as_child(error: BaseException | None = None) -> NoReturn:
    """End a process that main forked as that of a script ends, but without Horovod.

    Horovod's threads are in its parent only: waiting for them would never end, and taking its
    connections down would take the parent's down.
    """
    code = 0
    if error is not None:
        told = describe(error)
        if issubclass(type(error), SystemExit):
            code = exit_code_of(error)
            _print_like_python(error, told.text)
        else:
            code = 1
            _print(told.traceback)
    for name in ("horovod.torch.mpi_ops", "horovod.tensorflow.mpi_ops"):
        with contextlib.suppress(BaseException):  # main may have put anything there
            atexit.unregister(sys.modules[name]._basics.shutdown)
    leave(code)


def _failed(
    spec: Job,
    error: BaseException,
    prefix: str,
    *,
    hint: Callable[[BaseException], str] | None = None,
    exit_code: int | None = None,
    with_traceback: bool = True,
    kind: FailureKind = FailureKind.EXCEPTION,
    prints_traceback: bool = True,
) -> Outcome:
    told = describe(error)
    if prints_traceback:
        _print(told.traceback)
    else:
        _print_like_python(error, told.text)
    advice = collective = ""
    with contextlib.suppress(BaseException):  # it is the user's object, and so are names in frames
        advice = hint(error) if hint is not None else ""
        advice += memory_hint(error) or gpu_hint(error)
        collective = collective_of(told.frames)
    failure = Failure(
        rank=spec.rank,
        host=spec.host,
        summary=_with_advice(f"{prefix}{told.name}: {told.text}", advice),
        kind=kind,
        traceback=told.traceback if with_traceback else "",
        exit_code=exit_code,
        exception_types=told.types,
        exception=told.pickled,
        after_peer_loss=told.name in _PEER_LOSS_TYPES or speaks_of_peer_loss(told.text),
        collective=collective,
    )
    return Outcome(failure=failure)


def _script_name(function: Any) -> str:
    """Return what a script is called, or ""; runs of functions do without its module."""
    module = sys.modules.get("horovodrunner.flows.script.worker")
    return function.name if module is not None and type(function) is module.Script else ""


def _print_like_python(leaving: BaseException, text: str) -> None:
    """Print what an interpreter prints when it is left with a text instead of a number."""
    if not isinstance(getattr(leaving, "code", None), int | None):
        _print(f"{text}\n")


def _with_advice(text: str, advice: str) -> str:
    """Put advice into the first line, also where a text has several."""
    first, line_break, rest = text.partition("\n")
    return f"{first}{advice}{line_break}{rest}"


def _print(text: str) -> None:
    try:
        sys.stderr.write(text)
    except BaseException:  # noqa: BLE001 - main may have put anything there
        with contextlib.suppress(OSError):
            os.write(2, text.encode())


def _import_hint(error: BaseException) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return ""
    return _horovod_hint(error) or (
        f". The module {error.name!r} exists on the driver but not for {sys.executable} here: "
        "install it on the executors, ship it with spark.sparkContext.addPyFile(...), or call "
        f"cloudpickle.register_pickle_by_value({(error.name or 'module').split('.')[0]})"
    )


def _horovod_hint(error: BaseException) -> str:
    """Name what main's own import lacks: Horovod is optional."""
    name = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if (name or "").partition(".")[0] != "horovod":
        return ""
    return (
        f". Horovod is not installed for {sys.executable} on {os.uname().nodename}: run "
        f"`{sys.executable} -m horovodrunner build-horovod` there"
    )


def _main_hint(error: BaseException) -> str:
    return _horovod_hint(error) or _missing_name_hint(error)


def _missing_name_hint(error: BaseException) -> str:
    """Explain why a file of the driver's cannot be read: its classes have to be in ``__main__``."""
    is_lookup = isinstance(error, AttributeError | ImportError)
    found = _NOT_IN_MAIN.search(str(error)) if is_lookup else None
    if found is None:
        return ""
    name = found[found.lastindex or 0]
    return (
        f". Of the driver's __main__ only what main refers to is there: mention {name} in main "
        f"(a line that says {name} is enough) so that it travels along"
    )


def _reason_of_exit(error: BaseException) -> str:
    """Repeat what a parser of arguments has printed before it left; it prints to standard error."""
    reason = _text_of_parser(error)
    return f" ({reason})" if reason else ""


def _exit_hint(error: BaseException) -> str:
    reason = _reason_of_exit(error)
    if not reason:
        return ""
    return (
        f"{reason}. In main, sys.argv is {cut(repr(sys.argv), 200)}: pass settings "
        "as arguments of run(), or give the parser a list of its own: parse_args([])"
    )


def _text_of_parser(error: BaseException) -> str:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        message = frame.f_locals.get("message")
        if frame.f_code.co_name == "error" and isinstance(message, str):
            return " ".join(message.split())  # argparse, and what is built on it
    refused = error.__context__
    is_known = refused is not None and type(refused).__module__.startswith("absl.flags")
    return in_one_line(refused) if refused is not None and is_known else ""


def _take_over_process() -> None:
    """See to it that main finds what it would find elsewhere, on Spark or without it."""
    # Spark's JVMs leave SIGQUIT blocked in the processes that they start.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGQUIT])
    del sys.argv[1:]  # a parser in main has no use for ours
    if given := os.environ.pop(IMPORT_PATH, None):
        sys.path[:] = json.loads(given)


def _move_descriptors(arguments: Any) -> None:
    """Move our own descriptors out of main's way; those that main forks do not keep them."""
    lowest, moved = lowest_descriptor(), list[int]()
    for name in ("control", "report", "stacks", "metrics", "result"):
        if (descriptor := getattr(arguments, name)) is not None:
            moved.append(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, lowest))
            os.close(descriptor)
            setattr(arguments, name, moved[-1])

    def close_in_child() -> None:
        for descriptor in moved:
            with contextlib.suppress(OSError):  # main has closed it
                os.close(descriptor)

    os.register_at_fork(after_in_child=close_in_child)


def _prepare_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        # Its task reads UTF-8, whatever the executor's locale.
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    # for Python processes that main starts
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(before_stdlib(sys.path))


def _import_early(modules: Sequence[str]) -> None:
    gc.disable()  # hardly anything is freed meanwhile, and looking takes a tenth of the time
    for module in modules:
        with contextlib.suppress(BaseException):  # main meets the same one, with its own traceback
            importlib.import_module(module)
    gc.enable()


def _forked_from_warm_parent(arguments: Any) -> dict[str, Any]:
    """Be the warm parent until the session ends; this returns in workers forked from it only."""
    from horovodrunner.processes.worker.warm import WarmParent

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
    parser = argparse.ArgumentParser(prog="python -m horovodrunner.processes.worker")
    parser.add_argument("--control", type=int, help="file descriptor to read from")
    parser.add_argument("--report", type=int, help="file descriptor to write to")
    parser.add_argument("--stacks", type=int, help="file descriptor to write to")
    parser.add_argument("--metrics", type=int, help="file descriptor to write to")
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
