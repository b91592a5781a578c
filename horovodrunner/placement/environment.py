"""Every environment variable name this package reads or sets. Runs in: every process."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a worker reads names of variables only
    from horovodrunner.placement.topology import Slot

__all__ = [
    "DATA_DIRECTORY",
    "FORWARDED_PREFIXES",
    "GLOO_INTERFACE",
    "IMPORT_PATH",
    "KEPT_MODELS",
    "KERAS_SWITCH",
    "LOG",
    "MAIN_NAMES",
    "TF_CONFIG",
    "forwarded_environment",
    "hash_seed",
    "slot_environment",
    "tf_config",
    "torchrun_environment",
    "worker_base_environment",
]

FORWARDED_PREFIXES = ("HOROVOD_", "NCCL_", "OMP_", "CUDA_", "TF_", "MLFLOW_")
"""Driver variables with these prefixes reach the workers when they are set before ``run()``."""

LOG = "HOROVODRUNNER_LOG"
"""``debug`` turns on the log of the driver, the tasks and the workers."""

KERAS_SWITCH = "HOROVODRUNNER_KERAS"
"""Set to ``horovod``: with Keras 3, too, Horovod's own code for Keras is used."""

DATA_DIRECTORY = "HOROVODRUNNER_DATA"
"""Where a rank, and any process it starts, finds the rows that travelled with the run."""

KEPT_MODELS = "HOROVODRUNNER_MODELS"
"""How many models a Python worker of Spark's keeps; ``spark.executorEnv.HOROVODRUNNER_MODELS``."""

IMPORT_PATH = "HOROVODRUNNER_IMPORT_PATH"
"""JSON: what ``sys.path`` is to be in a worker, which removes the variable when it starts."""

MAIN_NAMES = "HOROVODRUNNER_MAIN_NAMES"
"""Where a process that main starts finds the names that ``__main__`` holds in the worker."""

GLOO_INTERFACE = "HOROVOD_GLOO_IFACE"
"""Names the network interface that the ranks use."""

TF_CONFIG = "TF_CONFIG"
"""Tells TensorFlow about all its workers, and which one the process is: different on every rank."""

_TORCH_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""The same as `GLOO_INTERFACE` for ``torch.distributed``, which goes by the host's name without."""

HASH_SEED = "PYTHONHASHSEED"
"""Decides about ``hash()`` of text and the order of sets."""

_FORWARDED_NAMES = frozenset(
    {
        "CUBLAS_WORKSPACE_CONFIG",  # torch.use_deterministic_algorithms, which travels, needs it
        "KERAS_BACKEND",
        KERAS_SWITCH,
        LOG,
        _TORCH_GLOO_INTERFACE,
        "PYTHONDEVMODE",
        "PYTHONINTMAXSTRDIGITS",
        "PYTHONIOENCODING",
        "PYTHONOPTIMIZE",
        "PYTHONUTF8",
        "PYTHONWARNINGS",
    }
)
"""Reach the workers as well, because they change what the same code does."""

_USER_WINS = frozenset(
    {GLOO_INTERFACE, "HOROVOD_GLOO_PORTS", "NCCL_SOCKET_IFNAME", _TORCH_GLOO_INTERFACE}
)
"""Chosen for each host, unless the user set them on the driver."""

_THREAD_COUNTS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
"""What torch, MKL, OpenBLAS and NumPy read, and what TensorFlow reads. Without it every rank starts
a thread for each core of the machine, and the ranks on one machine get in each other's way."""

_MAX_HASH_SEED = 2**32 - 1

_SPARK_SECRETS = frozenset({"PYTHON_WORKER_FACTORY_SECRET", "PYSPARK_GATEWAY_SECRET"})
"""Secrets of Spark's own sockets, which user code has no business with."""

_NOT_INHERITED = _SPARK_SECRETS | {TF_CONFIG, "PYSPARK_GATEWAY_PORT"}


def forwarded_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Pick the driver's variables that the workers get.

    Parameters
    ----------
    environ
        The driver's environment.

    Returns
    -------
    dict of str
        The variables whose names start with one of `FORWARDED_PREFIXES`, and a few more; without
        ``TF_CONFIG``, which describes a single process.

    Examples
    --------
    >>> forwarded_environment({"NCCL_DEBUG": "INFO", "HOME": "/root"})
    {'NCCL_DEBUG': 'INFO'}
    """
    return {
        name: value
        for name, value in environ.items()
        if name in _FORWARDED_NAMES or (name.startswith(FORWARDED_PREFIXES) and name != TF_CONFIG)
    }


@functools.cache
def _random_hash_seed() -> str:
    """Return a number that is another one in each process of the user's."""
    return str(int.from_bytes(os.urandom(4), sys.byteorder))


def hash_seed(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the seed of all ranks' hashes, if the user chose one.

    Parameters
    ----------
    environ
        The driver's environment.

    Returns
    -------
    dict of str
        ``PYTHONHASHSEED``, or nothing. For ``"random"`` it is a number, so that the ranks agree;
        each driver process has another one.

    Raises
    ------
    ValueError
        If no Python would start with that value.

    Examples
    --------
    >>> hash_seed({"PYTHONHASHSEED": "42"}), hash_seed({})
    ({'PYTHONHASHSEED': '42'}, {})
    """
    value = environ.get(HASH_SEED, "")
    if not value:  # as Python takes it
        return {}
    if value == "random":
        return {HASH_SEED: _random_hash_seed()}
    digits = value.lstrip().removeprefix("+")
    if not (digits.isascii() and digits.isdigit() and int(digits) <= _MAX_HASH_SEED):
        raise ValueError(
            f"{HASH_SEED}={value!r} lets no Python process start: set os.environ[{HASH_SEED!r}] "
            f'to "random" or to a whole number from 0 to {_MAX_HASH_SEED}, or delete it'
        )
    return {HASH_SEED: value}


def worker_base_environment(
    environ: Mapping[str, str], forwarded: Mapping[str, str], import_path: Sequence[str], cores: int
) -> dict[str, str]:
    """Build the environment a worker process is started with, before its slot is known.

    Parameters
    ----------
    environ
        The task's own environment.
    forwarded
        The driver's variables.
    import_path
        The worker's ``sys.path``.
    cores
        How many cores the worker may use; the numbers of threads follow unless they were set.

    Returns
    -------
    dict of str
        The environment, without Spark's secrets and another process's ``TF_CONFIG``. All ranks have
        the same ``PYTHONHASHSEED``.

    Examples
    --------
    >>> given = worker_base_environment({}, {"OMP_NUM_THREADS": "3"}, [], cores=8)
    >>> given["OMP_NUM_THREADS"], given["TF_NUM_INTRAOP_THREADS"]
    ('3', '3')
    """
    kept = {name: value for name, value in environ.items() if name not in _NOT_INHERITED}
    chosen = {**kept, **forwarded}
    threads = chosen.get("OMP_NUM_THREADS") or str(max(1, cores))
    if chosen.get(HASH_SEED, "") in ("", "random"):  # else two ranks would not agree
        chosen[HASH_SEED] = "0"  # as Spark has it
    return {
        **dict.fromkeys(_THREAD_COUNTS, threads),
        **chosen,
        IMPORT_PATH: json.dumps(import_path),
    }


def slot_environment(
    slot: Slot,
    rendezvous: tuple[str, int],
    master: tuple[str, int],
    forwarded: Mapping[str, str],
    ports: tuple[int, int] | None = None,
) -> dict[str, str]:
    """Express a worker's slot in Horovod's variables and in torchrun's.

    The names are those that Horovod 0.28's Gloo controller reads and that torchrun documents;
    ``HOROVOD_GLOO_ADDRESS`` and ``HOROVOD_GLOO_PORTS`` are read by the Horovod that this package
    builds (horovod_build/edits.py).

    Parameters
    ----------
    slot
        The worker's position.
    rendezvous
        Host and port of Horovod's rendezvous server.
    master
        Host and port reserved for ``torch.distributed``.
    forwarded
        The driver's variables; a network interface the user named there is kept.
    ports
        First and last port that Gloo may listen on, or None for any.

    Returns
    -------
    dict of str
        Variables to set before ``main`` runs.
    """
    variables = {
        "HOROVOD_HOSTNAME": slot.host_id,
        "HOROVOD_RANK": str(slot.rank),
        "HOROVOD_SIZE": str(slot.size),
        "HOROVOD_LOCAL_RANK": str(slot.local_rank),
        "HOROVOD_LOCAL_SIZE": str(slot.local_size),
        "HOROVOD_CROSS_RANK": str(slot.cross_rank),
        "HOROVOD_CROSS_SIZE": str(slot.cross_size),
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        GLOO_INTERFACE: slot.interface,
        "HOROVOD_GLOO_ADDRESS": slot.address,
        "NCCL_SOCKET_IFNAME": slot.interface,
        _TORCH_GLOO_INTERFACE: forwarded.get(GLOO_INTERFACE, slot.interface),
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": rendezvous[0],
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(rendezvous[1]),
        "RANK": str(slot.rank),
        "WORLD_SIZE": str(slot.size),
        "LOCAL_RANK": str(slot.local_rank),
        "LOCAL_WORLD_SIZE": str(slot.local_size),
        "GROUP_RANK": str(slot.host_index),
        "MASTER_ADDR": master[0],
        "MASTER_PORT": str(master[1]),
    }
    if ports is not None:
        variables["HOROVOD_GLOO_PORTS"] = f"{ports[0]}-{ports[1]}"
    if slot.devices is not None:
        variables["CUDA_VISIBLE_DEVICES"] = slot.devices
    if forwarded.get(GLOO_INTERFACE, slot.interface) != slot.interface:
        del variables["HOROVOD_GLOO_ADDRESS"]  # it belongs to another interface
    return {
        name: value
        for name, value in variables.items()
        if not (name in _USER_WINS and name in forwarded)
    }


def torchrun_environment(slot: Slot, hosts: int, run_id: str, attempt: int) -> dict[str, str]:
    """Return what else torchrun tells its processes, so that others see that somebody started them.

    ``TORCHELASTIC_RUN_ID`` alone makes Lightning take its ranks from the environment, whatever
    scheduler the machine has, and check the number of devices (docs/adr/0010). The store of
    torchrun's agent is not claimed: rank 0 makes its own.

    Parameters
    ----------
    slot
        The worker's position.
    hosts
        How many hosts the run has.
    run_id
        Names the run.
    attempt
        1 for the first launch, one more for each restart.

    Returns
    -------
    dict of str
        Variables to set before ``main`` runs.
    """
    return {
        "GROUP_WORLD_SIZE": str(hosts),
        "ROLE_NAME": "default",
        "ROLE_RANK": str(slot.rank),
        "ROLE_WORLD_SIZE": str(slot.size),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": str(attempt - 1),
    }


def tf_config(workers: Sequence[str], rank: int) -> dict[str, str]:
    """Express a worker's place in TensorFlow's variable.

    Parameters
    ----------
    workers
        ``host:port`` of every rank, in rank order; empty when the run is not to have it.
    rank
        The worker's rank.

    Returns
    -------
    dict of str
        ``TF_CONFIG``, or nothing.

    Examples
    --------
    >>> tf_config(["10.0.0.1:4000"], 0)["TF_CONFIG"]
    '{"cluster": {"worker": ["10.0.0.1:4000"]}, "task": {"type": "worker", "index": 0}}'
    >>> tf_config([], 0)
    {}
    """
    if not workers:
        return {}
    task = {"type": "worker", "index": rank}
    return {TF_CONFIG: json.dumps({"cluster": {"worker": list(workers)}, "task": task})}
