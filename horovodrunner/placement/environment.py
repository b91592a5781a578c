"""Every environment variable name this package reads or sets. Runs in: every process."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from horovodrunner.errors import ConfigurationError

if TYPE_CHECKING:  # a worker reads names of variables only
    from horovodrunner.placement.topology import Slot

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

MLFLOW = "HOROVODRUNNER_MLFLOW"
"""Set in ranks whose driver reports the run to MLflow."""

FAULTS = "HOROVODRUNNER_FAULTS"
"""Faults that a test wants to happen in ranks (horovodrunner.testing)."""

MAIN_NAMES = "HOROVODRUNNER_MAIN_NAMES"
"""Where a process that main starts finds the names that ``__main__`` holds in the worker."""

GLOO_INTERFACE = "HOROVOD_GLOO_IFACE"
TF_CONFIG = "TF_CONFIG"
HASH_SEED = "PYTHONHASHSEED"

DEVICES = "CUDA_VISIBLE_DEVICES"

_TORCH_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""`GLOO_INTERFACE` for ``torch.distributed``, which goes by the host's name without it."""

_USER_WINS = frozenset(
    {GLOO_INTERFACE, "HOROVOD_GLOO_PORTS", "NCCL_SOCKET_IFNAME", _TORCH_GLOO_INTERFACE}
)
"""Chosen for each host, unless the user set them on the driver."""

_THREAD_COUNTS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
"""Without them every rank starts a thread for each core of the machine."""

_MAX_HASH_SEED = 2**32 - 1

SPARKS_SECRETS = frozenset(
    {"PYTHON_WORKER_FACTORY_SECRET", "PYSPARK_GATEWAY_SECRET", "PYSPARK_GATEWAY_PORT"}
)
"""They open Spark's own sockets."""

_NOT_INHERITED = SPARKS_SECRETS | {TF_CONFIG}  # which describes another process


@functools.cache
def _random_hash_seed() -> str:
    return str(int.from_bytes(os.urandom(4), sys.byteorder))


def hash_seed(environ: Mapping[str, str], where: str = "") -> dict[str, str]:
    """Return the driver's ``PYTHONHASHSEED``, if set; "random" is one number for all ranks.

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
        where = where or f"os.environ[{HASH_SEED!r}]"
        raise ConfigurationError(
            f"{HASH_SEED}={value!r} lets no Python process start: set {where} "
            f'to "random" or to a whole number from 0 to {_MAX_HASH_SEED}, or delete it'
        )
    return {HASH_SEED: value}


def worker_base_environment(
    environ: Mapping[str, str],
    forwarded: Mapping[str, str],
    import_path: Sequence[str],
    cores: int,
    removed: Collection[str] = (),
) -> dict[str, str]:
    """Return the environment a worker is started with, before its slot is known.

    Names in `removed` are those that neither the driver nor the executor is to lend.

    >>> given = worker_base_environment({}, {"OMP_NUM_THREADS": "3"}, [], cores=8)
    >>> given["OMP_NUM_THREADS"], given["TF_NUM_INTRAOP_THREADS"]
    ('3', '3')
    """
    left_out = _NOT_INHERITED.union(removed)
    kept = {name: value for name, value in environ.items() if name not in left_out}
    chosen = {**kept, **{name: forwarded[name] for name in forwarded if name not in removed}}
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
    """Express a worker's slot in the variables of Horovod 0.28's Gloo controller and torchrun.

    ``HOROVOD_GLOO_ADDRESS`` and ``HOROVOD_GLOO_PORTS`` (first and last port that Gloo may listen
    on) are read by the Horovod that this package builds. A rendezvous port of 0 means none.
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
        "RANK": str(slot.rank),
        "WORLD_SIZE": str(slot.size),
        "LOCAL_RANK": str(slot.local_rank),
        "LOCAL_WORLD_SIZE": str(slot.local_size),
        "GROUP_RANK": str(slot.host_index),
        "MASTER_ADDR": master[0],
        "MASTER_PORT": str(master[1]),
    }
    if rendezvous[1]:
        variables["HOROVOD_GLOO_RENDEZVOUS_ADDR"] = rendezvous[0]
        variables["HOROVOD_GLOO_RENDEZVOUS_PORT"] = str(rendezvous[1])
    if ports is not None:
        variables["HOROVOD_GLOO_PORTS"] = f"{ports[0]}-{ports[1]}"
    if slot.devices is not None:
        variables[DEVICES] = slot.devices
    if forwarded.get(GLOO_INTERFACE, slot.interface) != slot.interface:
        del variables["HOROVOD_GLOO_ADDRESS"]  # it belongs to another interface
    return {
        name: value
        for name, value in variables.items()
        if not (name in _USER_WINS and name in forwarded)
    }


def torchrun_environment(slot: Slot, hosts: int, run_id: str, attempt: int) -> dict[str, str]:
    """Return what else torchrun tells its processes (docs/adr/0010).

    ``TORCHELASTIC_RUN_ID`` alone makes Lightning take its ranks from the environment, whatever
    scheduler the machine has. The store of torchrun's agent is not claimed: rank 0 makes its own.
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
    """Return ``TF_CONFIG`` for a rank, or nothing without `workers` (``host:port`` by rank).

    >>> tf_config(["10.0.0.1:4000"], 0)["TF_CONFIG"]
    '{"cluster": {"worker": ["10.0.0.1:4000"]}, "task": {"type": "worker", "index": 0}}'
    """
    if not workers:
        return {}
    task = {"type": "worker", "index": rank}
    return {TF_CONFIG: json.dumps({"cluster": {"worker": list(workers)}, "task": task})}
