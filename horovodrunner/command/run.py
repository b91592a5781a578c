"""Runs what the command line says, and chooses the exit code. Runs in: the driver."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from horovodrunner.command.line import CommandLine, UsageError, help_text, parse
from horovodrunner.command.signals import EndingSignals, end_jvm
from horovodrunner.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    BarrierStageError,
    ConfigurationError,
    HorovodRunnerError,
    RunStoppedError,
    RunSupersededError,
    StartTimeoutError,
    WorkerFailedError,
)

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["run_command"]

USAGE = 2
FAILED = 1
TRY_AGAIN = os.EX_TEMPFAIL

_Say = Callable[..., None]


def run_command(words: Sequence[str], say: _Say) -> int:
    """Run a script as the command line says, and return the exit code.

    `say` prints a text, to standard output or to a stream that it is given.
    """
    try:
        line = parse(words)
    except UsageError as error:
        say(f"error: {error} (`python -m horovodrunner run --help` lists the options)", sys.stderr)
        return USAGE
    if line is None:
        say(help_text())
        return 0
    signals = EndingSignals()
    try:
        signals.install()
        with _working_directory_explained():
            return _run(line, signals, say)
    except (ArgumentTypeError, ArgumentValueError) as error:
        say(f"error: {error}", sys.stderr)
        return USAGE
    except HorovodRunnerError as error:
        say(f"error: {error._message(with_traceback=False)}", sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt as error:
        name = (signals.received or signal.SIGINT).name
        told = str(error) if error.args else "the run had not begun"
        say(f"error: {name}: {told}", sys.stderr)
        return signals.exit_code
    finally:
        _let_nobody_read()


def exit_code_of(error: HorovodRunnerError) -> int:
    """Return what the command leaves with for a run that failed."""
    if isinstance(error, WorkerFailedError):
        if error.exit_code:
            return error.exit_code
        if error.signal is not None:
            return 128 + _number(error.signal)
        return TRY_AGAIN if error.worker_was_lost else FAILED
    if isinstance(error, RunStoppedError):  # nothing but --sigterm-grace stops a run here
        return 128 + signal.SIGTERM
    executor_was_lost = isinstance(error, BarrierStageError) and error.executor_was_lost
    if executor_was_lost or isinstance(error, (StartTimeoutError, RunSupersededError)):
        return TRY_AGAIN
    return FAILED


def _number(name: str) -> int:
    with contextlib.suppress(KeyError):
        return int(signal.Signals[name])
    return int(name.rpartition(" ")[2])  # "signal 40"


def _run(line: CommandLine, signals: EndingSignals, say: _Say) -> int:
    from horovodrunner.command.runner import CommandRunner

    _forget_own_directory()
    runner = CommandRunner(
        np=line.np,
        driver_log_verbosity="all",
        output_filename=line.output_filename,
        verbose=line.verbose,
        **line.options,
    )
    # What is wrong with the script is told before a session is started.
    runner.check_script(line.script, line.arguments, line.code_dir)
    with contextlib.ExitStack() as stack:
        if line.np >= 0:
            stack.enter_context(_session(line, signals, say))
        runner.run_script(line.script, *line.arguments, code_dir=line.code_dir, **line.key)
    return 0


def _forget_own_directory() -> None:
    """Leave out the working directory, which `python -m` has put first: no script has it there."""
    is_safe = getattr(sys.flags, "safe_path", False)
    if not is_safe and _has_working_directory() and sys.path[:1] == [os.getcwd()]:  # noqa: PTH109
        del sys.path[0]


@contextlib.contextmanager
def _working_directory_explained() -> Iterator[None]:
    """Explain what fails because the working directory is gone."""
    try:
        yield
    except FileNotFoundError as error:
        if _has_working_directory():
            raise
        raise ArgumentValueError(
            f"the working directory cannot be found ({error.strerror}): somebody has deleted it. "
            "Change to one that is there, or give full paths"
        ) from error


def _has_working_directory() -> bool:
    try:
        os.getcwd()  # noqa: PTH109
    except OSError:  # somebody has deleted it
        return False
    return True


@contextlib.contextmanager
def _session(line: CommandLine, signals: EndingSignals, say: _Say) -> Iterator[SparkSession]:
    """Have a session with these settings, and stop it in the end."""
    from horovodrunner.spark.errors import told_as
    from horovodrunner.spark.session import is_connect, use_this_python

    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        from horovodrunner.prerequisites import INSTALL_SPARK

        raise ConfigurationError(
            f"-np {line.np} needs pyspark, which {sys.executable} cannot import ({error}): install "
            f"it with `{INSTALL_SPARK}`, or give a negative -np"
        ) from error
    builder: Any = SparkSession.builder.appName(f"horovodrunner {line.script}")
    if line.master is not None:
        is_remote = line.master.startswith("sc://")
        builder = builder.remote(line.master) if is_remote else builder.master(line.master)
    for name, value in line.conf.items():
        builder = builder.config(name, value)
    try:
        with told_as(ConfigurationError, f"there is no Spark session for {_source(line)}"):
            session = builder.getOrCreate()
    except BaseException:
        end_jvm()
        raise
    signals.install()
    try:
        use_this_python(session)
        master = line.master if is_connect(session) else session.sparkContext.master
        say(f"HorovodRunner: Spark's master is {master}, from {_source(line)}", sys.stderr)
        yield session
    finally:
        session.stop()


def _source(line: CommandLine) -> str:
    if line.master is not None:
        return f"--master {line.master}"
    if any(map(os.environ.get, ("PYSPARK_GATEWAY_PORT", "PYSPARK_SUBMIT_ARGS", "SPARK_REMOTE"))):
        return "spark-submit or the environment"
    return "Spark's own settings (--master names another one)"


def _let_nobody_read() -> None:
    """Close what cannot be written any more: the interpreter would complain at its end."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed from the start
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
