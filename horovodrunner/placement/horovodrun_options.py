"""The options of ``horovodrun``, read by Horovod's own parser. Runs in: the driver.

Beside :mod:`horovodrunner.placement.rendezvous` the only file that imports ``horovod.runner``.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from horovod.runner import launch
from horovod.runner.common.util import config_parser

from horovodrunner.errors import ArgumentValueError

__all__ = ["REFUSED", "environment_of", "horovodruns_parser"]

_MPI = "workers are started by Spark and talk over Gloo, never by MPI"
_PLACED = "Spark places the ranks: np= says how many, the cluster's resources where"
_NO_SSH = "tasks are started by Spark, without ssh"
_FIXED_SIZE = (
    "the number of ranks stays the same while a run lasts; max_restarts= launches it again when "
    "a worker is lost"
)
_INTERFACE = (
    "each host's interface is the one that the others reach; the variable HOROVOD_GLOO_IFACE, set "
    "on the driver, names another one for all"
)

REFUSED = {
    "binding_args": _MPI,
    "check_build": "`python -m horovodrunner doctor` shows what is installed",
    "command": "main is what runs; options and their values are all that may stand here",
    "cooldown_range": _FIXED_SIZE,
    "disable_cache": f"there is nothing to cache: {_NO_SSH}",
    "elastic_timeout": _FIXED_SIZE,
    "help": "`horovodrun --help` prints it",
    "host_discovery_script": _FIXED_SIZE,
    "hostfile": _PLACED,
    "hosts": _PLACED,
    "max_num_proc": _FIXED_SIZE,
    "min_num_proc": _FIXED_SIZE,
    "mpi_args": _MPI,
    "mpi_threads_disable": _MPI,
    "nics": _INTERFACE,
    "num_proc": "np= of HorovodRunner says it",
    "output_filename": "the executors' logs keep every rank's output",
    "prefix_output_with_timestamp": "lines are prefixed with the rank; print the time in main",
    "reset_limit": _FIXED_SIZE,
    "slots": _PLACED,
    "ssh_identity_file": _NO_SSH,
    "ssh_port": _NO_SSH,
    "start_timeout": "start_timeout= of HorovodRunner says it",
    "use_jsrun": _MPI,
    "use_mpi": _MPI,
    "verbose": (
        'driver_log_verbosity="all" shows what the ranks print, --log-level=DEBUG what Horovod does'
    ),
    "version": "horovod.__version__ says it",
}
"""Why an option makes no sense here, by the name under which the parser stores it."""

_AUTOTUNING = (
    "autotune_log_file",
    "autotune_warmup_samples",
    "autotune_steps_per_sample",
    "autotune_bayes_opt_max_samples",
    "autotune_gaussian_process_noise",
)
_NEEDED = {"timeline_mark_cycles": "timeline_filename", **dict.fromkeys(_AUTOTUNING, "autotune")}
"""Options that Horovod ignores without another one."""


def environment_of(options: Sequence[str]) -> dict[str, str]:
    """Turn options of ``horovodrun`` into the variables that it would set.

    Parameters
    ----------
    options
        Options and their values, as on a command line.

    Returns
    -------
    dict of str
        Variables for the workers.

    Raises
    ------
    ArgumentValueError
        If Horovod's parser refuses them, or one makes no sense here.

    Examples
    --------
    >>> environment_of(["--fusion-threshold-mb", "32", "--cycle-time-ms", "2"])
    {'HOROVOD_FUSION_THRESHOLD': '33554432', 'HOROVOD_CYCLE_TIME': '2.0'}
    """
    try:
        parser, given = _parse(options)
    except ArgumentValueError:
        raise
    except ValueError as error:
        raise _wrong(str(error)) from error
    except (OSError, TypeError, AttributeError, launch.yaml.YAMLError) as error:
        raise _wrong(
            f"the file that --config-file names cannot be used: {type(error).__name__}: {error}"
        ) from error
    _refuse(parser, given)  # a config file says things, too
    for name, other in _NEEDED.items():
        if getattr(given, name) and not getattr(given, other) and not given.config_file:
            raise _wrong(
                f"Horovod ignores {_as_option(name)} without {_as_option(other)}: give both, or "
                "set the HOROVOD_... variables on the driver instead"
            )
    environment: dict[str, str] = {}
    config_parser.set_env_from_args(environment, given)
    if given.autotune is False:  # horovodrun sets nothing then, and a variable would win
        environment[config_parser.HOROVOD_AUTOTUNE] = "0"
    return environment


def horovodruns_parser() -> argparse.ArgumentParser:
    """Give Horovod's parser itself.

    Returns
    -------
    argparse.ArgumentParser
        It raises an ArgumentValueError where argparse would print and leave.
    """
    return _parse([])[0]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _wrong(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        reasons = "; ".join(REFUSED[name] for name in ("help", "version"))
        raise _wrong(f"--help and --version run nothing: {reasons}")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print nothing: what is wrong is raised."""


def _parse(options: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Call Horovod's function with another class of parser.

    It builds the parser and parses ``sys.argv`` in one go. A copy of the function that finds
    another `argparse` leaves this process as it is, for other threads, too.
    """
    built: list[argparse.ArgumentParser] = []

    class Parser(_Parser):
        def parse_args(self, *_: Any) -> Any:  # type: ignore[override]
            for action in self._actions:
                action.required = False  # -np is
            built.append(self)
            given = super().parse_args(options)
            _refuse(self, given)  # before Horovod does what it asks for, such as --check-build
            return given

    argparse_for_it = types.SimpleNamespace(**{**vars(argparse), "ArgumentParser": Parser})
    names = {**vars(launch), "argparse": argparse_for_it}
    given: argparse.Namespace = types.FunctionType(launch.parse_args.__code__, names)()
    return built[0], given


def _refuse(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    for name, reason in REFUSED.items():
        value = getattr(given, name, None)
        if value not in (None, [], parser.get_default(name)):
            option = " ".join(value) if name == "command" else _as_option(name, parser)
            raise _wrong(f"{option!r} makes no sense with HorovodRunner: {reason}")


def _as_option(name: str, parser: argparse.ArgumentParser | None = None) -> str:
    for action in parser._actions if parser is not None else ():
        if action.dest == name:
            return "/".join(action.option_strings)
    return "--" + name.replace("_", "-")


def _wrong(message: str) -> ArgumentValueError:
    return ArgumentValueError(f"horovodrun_args: {message}")
