"""Which variables the ranks get from the driver, and from the user. Runs in: the driver."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from horovodrunner.errors import ArgumentTypeError, ArgumentValueError
from horovodrunner.formatting import format_bytes
from horovodrunner.placement import environment as names
from horovodrunner.placement.environment import hash_seed

__all__ = [
    "DOCUMENTED_PREFIXES",
    "FRAMEWORK_PREFIXES",
    "Variables",
    "checked_patterns",
    "checked_variables",
    "forwarded_environment",
    "named_by",
    "set_by_run",
]

DOCUMENTED_PREFIXES = ("HOROVOD_", "NCCL_", "OMP_", "CUDA_", "TF_", "MLFLOW_")
"""Whatever begins so travels, as Databricks' HorovodRunner documents it."""

FRAMEWORK_PREFIXES = (
    *("TORCH_", "PYTORCH_", "KERAS_", "JAX_", "XLA_"),
    *("HF_", "TRANSFORMERS_", "TOKENIZERS_", "WANDB_"),
    *("GLOO_", "UCX_", "FI_", "MKL_", "OPENBLAS_"),
)
"""What begins so travels if it means the same on another machine."""

# Python's own, and single names: they change what the same code does.
_TRAVELLING = frozenset(
    {
        "CUBLAS_WORKSPACE_CONFIG",  # torch.use_deterministic_algorithms, which travels, needs it
        names.FAULTS,
        names.KERAS_SWITCH,
        names.LOG,
        "PYTHONASYNCIODEBUG",
        "PYTHONBREAKPOINT",
        "PYTHONDEVMODE",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONFAULTHANDLER",
        "PYTHONINTMAXSTRDIGITS",
        "PYTHONIOENCODING",
        "PYTHONMALLOC",
        "PYTHONNODEBUGRANGES",
        "PYTHONOPTIMIZE",
        "PYTHONTRACEMALLOC",
        "PYTHONUTF8",
        "PYTHONWARNINGS",
    }
)

_OF_ONE_PROCESS = frozenset(
    {
        "JAX_COORDINATOR_ADDRESS",
        "JAX_COORDINATOR_BIND_ADDRESS",
        "JAX_COORDINATOR_PORT",
        "JAX_CUDA_VISIBLE_DEVICES",
        "JAX_LOCAL_DEVICE_IDS",
        "JAX_NUM_PROCESSES",
        "JAX_PROCESS_COUNT",
        "JAX_PROCESS_ID",
        "JAX_PROCESS_INDEX",
        "JAX_ROCM_VISIBLE_DEVICES",
        "WANDB_EXECUTABLE",
        "WANDB_SERVICE",  # a port of the driver's
    }
)
"""They describe a process of another job, or the driver."""

_OF_ONE_PROCESSOR = frozenset({"MKL_DEBUG_CPU_TYPE", "OPENBLAS_CORETYPE"})
"""Another processor may lack the instructions that they name."""

_NAMES_OF_PLACES = ("_DIR", "_DIRS", "_FILE", "_HOME", "_PATH", "_PATHS", "_ROOT")
_XLA_FLAGS = "XLA_FLAGS"

_PATH_INSTEAD = "extend sys.path on the driver, which travels, or use addPyFile"

_SET_BY_RUN = {
    **dict.fromkeys(
        (
            *("HOROVOD_HOSTNAME", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK"),
            *("HOROVOD_LOCAL_SIZE", "HOROVOD_CROSS_RANK", "HOROVOD_CROSS_SIZE"),
            *("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS", "HOROVOD_GLOO_ADDRESS"),
            *("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"),
            *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
            *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"),
            *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
            *(names.DATA_DIRECTORY, names.IMPORT_PATH, names.MAIN_NAMES, names.MLFLOW),
        ),
        "leave it out",
    ),
    names.TF_CONFIG: "tf_config=True gives every rank its own",
    "PYTHONHOME": "every executor's Python finds its own",
    "PYTHONPATH": _PATH_INSTEAD,
    "PYTHONUNBUFFERED": "the output of ranks is never buffered: leave it out",
    **dict.fromkeys(names.SPARKS_SECRETS, "it opens Spark's own sockets: leave it out"),
}
"""What a user's value could not change, or would break, and what to do instead."""

_MAX_BYTES = 128 * 1024
"""Of a variable with its value: Linux starts no process with more."""

_MAX_ALL_BYTES = os.sysconf("SC_ARG_MAX") - _MAX_BYTES
"""Of all that a user sets: room is left for what each machine adds."""

_OF_EVERY_MACHINE = ("HOME", "PATH", "PWD", "JAVA_HOME")
"""Patterns that match all of them match anything."""


def forwarded_environment(
    environ: Mapping[str, str], patterns: Collection[str] = ()
) -> dict[str, str]:
    """Pick the driver's variables that the workers get: what travels by itself, and `patterns`.

    >>> forwarded_environment({"NCCL_DEBUG": "INFO", "HOME": "/root", "HF_HOME": "/root/hf"})
    {'NCCL_DEBUG': 'INFO'}
    >>> forwarded_environment({"AWS_REGION": "eu-1", "XLA_FLAGS": "--a=1 --b=/x"}, ["AWS_*"])
    {'AWS_REGION': 'eu-1', 'XLA_FLAGS': '--a=1'}
    """
    found: dict[str, str] = {}
    for name, value in environ.items():
        if _is_named(name, patterns) or name in _TRAVELLING or name.startswith(DOCUMENTED_PREFIXES):
            found[name] = value
        elif name == _XLA_FLAGS and (flags := _without_places(value)):
            found[name] = flags
        elif name.startswith(FRAMEWORK_PREFIXES) and _means_the_same_elsewhere(name, value):
            found[name] = value
    return {name: value for name, value in found.items() if name not in _SET_BY_RUN}


def named_by(patterns: Collection[str], variables: Iterable[str]) -> frozenset[str]:
    """Return which variables the user's patterns name, whatever else lets them travel."""
    return frozenset(name for name in variables if _is_named(name, patterns))


def _is_named(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Variables:
    """What a user chose for the ranks of a run; the environment's None removes a variable."""

    environment: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    patterns: tuple[str, ...] = ()
    horovod: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What options of ``horovodrun`` stand for."""

    def __post_init__(self) -> None:
        for name, value in self.horovod.items():
            if self.environment.get(name, value) != value:
                raise ArgumentValueError(
                    f"environment and horovodrun_args both set {name}: leave it out of one"
                )

    @property
    def removed(self) -> tuple[str, ...]:
        """Names of variables that ranks get neither from the driver nor from an executor."""
        return tuple(name for name, value in self.environment.items() if value is None)

    def of_run(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that ranks get: the driver's that travel, and the chosen ones."""
        lent = {name: value for name, value in environ.items() if name not in self.environment}
        chosen = {name: value for name, value in self.environment.items() if value is not None}
        return {
            **forwarded_environment(lent, self.patterns),
            **self.horovod,
            **chosen,
            **hash_seed({**lent, **chosen}),
        }

    def of_attempt(
        self, of_run: Mapping[str, str], added: Mapping[str, str], left_out: Collection[str]
    ) -> dict[str, str]:
        """Return the variables of one attempt, for which `added` came; the user's own win."""
        chosen = {name: value for name, value in of_run.items() if name in self.environment}
        found = {**of_run, **added, **chosen}
        return {name: value for name, value in found.items() if name not in left_out}


def set_by_run(name: str) -> str | None:
    """Return what to do instead of setting a variable that is the run's own; None for others."""
    return _SET_BY_RUN.get(name)


def _means_the_same_elsewhere(name: str, value: str) -> bool:
    if name in _OF_ONE_PROCESS or name in _OF_ONE_PROCESSOR or name == _XLA_FLAGS:
        return False
    return not (_is_place(value) or (name.endswith(_NAMES_OF_PLACES) and "://" not in value))


def _is_place(value: str) -> bool:
    return value.startswith(("/", "~"))


def _without_places(flags: str) -> str:
    """Return XLA's flags without those that name a directory; a file with flags is none."""
    if not flags.lstrip().startswith("--"):
        return ""
    return " ".join(flag for flag in flags.split() if not _is_place(flag.partition("=")[2]))


def checked_variables(option: str, given: object) -> dict[str, str | None]:
    """Check what `environment=` sets; no value is shown, because it may be a secret."""
    example = f"give names and values, such as {option}={{'WANDB_MODE': 'offline'}}"
    if not isinstance(given, Mapping):
        raise ArgumentTypeError(f"{option} is a {type(given).__name__}: {example}")
    variables: dict[str, str | None] = {}
    for name, value in given.items():
        if not isinstance(name, str):
            raise ArgumentTypeError(f"{option}: the name {name!r} is no str; {example}")
        if not _can_be_a_name(name):
            raise ArgumentValueError(
                f"{option}: {name!r} cannot be the name of a variable, which has no '=', no NUL, "
                "no space around it, and nothing that cannot be written as bytes"
            )
        if value is not None and not isinstance(value, str):
            raise ArgumentTypeError(
                f"{option}[{name!r}]: it must be a str, or None to remove the variable, got "
                f"{type(value).__name__}"
            )
        if (instead := _SET_BY_RUN.get(name)) is not None:
            raise ArgumentValueError(f"{option} has {name}, which the run itself sets: {instead}")
        if value is not None:
            _check_value(option, name, value)
        variables[str.__str__(name)] = None if value is None else str.__str__(value)
    if (seed := variables.get(names.HASH_SEED)) is not None:
        hash_seed({names.HASH_SEED: seed}, f"{option}[{names.HASH_SEED!r}]")
    _check_size(option, variables)
    return variables


def _check_size(option: str, variables: Mapping[str, str | None]) -> None:
    set_here = {name: value for name, value in variables.items() if value is not None}
    size = sum(len(os.fsencode(f"{name}={value}")) + 1 for name, value in set_here.items())
    if size > _MAX_ALL_BYTES:
        raise ArgumentValueError(
            f"{option} has {format_bytes(size)} in {len(set_here)} variables, and Linux starts no "
            f"process with more than {format_bytes(_MAX_ALL_BYTES)} of them: pass large values as "
            "arguments of main"
        )


def _can_be_a_name(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return bool(name) and "=" not in name and "\0" not in name and name == name.strip()


def _check_value(option: str, name: str, value: str) -> None:
    if "\0" in value:
        raise ArgumentValueError(f"{option}[{name!r}] has a NUL in it, which no variable can have")
    try:
        size = len(os.fsencode(f"{name}={value}"))
    except UnicodeEncodeError as error:
        raise ArgumentValueError(
            f"{option}[{name!r}] cannot be written as bytes: {error.reason} at character "
            f"{error.start - len(name) - 1}"
        ) from None
    if size >= _MAX_BYTES:
        raise ArgumentValueError(
            f"{option}[{name!r}] has {size} bytes, and Linux starts no process with a variable of "
            f"more than {_MAX_BYTES}: pass it as an argument of main"
        )


def checked_patterns(option: str, given: Collection[str]) -> tuple[str, ...]:
    """Check the patterns of `forward=`; what stands behind a "=" is not shown."""
    example = f"such as {option}=['AWS_*', 'MY_TOKEN']"
    for pattern in given:
        name, is_value, _ = pattern.partition("=")
        if is_value:
            raise ArgumentValueError(
                f"{option} has '{name}=...': it takes names of variables, {example}, and "
                "environment={...} sets values"
            )
        if not _can_be_a_name(pattern):
            raise ArgumentValueError(f"{option} has {pattern!r}: give names, {example}")
        if (instead := _SET_BY_RUN.get(pattern)) is not None:
            raise ArgumentValueError(
                f"{option} has {pattern}, which the run itself sets: {instead}"
            )
    wide = [each for each in given if set(each) & set("*?[")]
    if all(_is_named(name, wide) for name in _OF_EVERY_MACHINE):
        raise ArgumentValueError(
            f"{option}={wide} would take along what describes this machine (PATH, HOME, "
            f"JAVA_HOME, ...) and every secret of its shell: name what main needs, {example}"
        )
    return tuple(given)
