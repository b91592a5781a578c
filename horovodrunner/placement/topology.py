"""Hosts and GPUs to slots, as pure functions. Runs in: the task."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from horovodrunner.flows.outcome.outcome import FailureKind

__all__ = ["Member", "Slot", "assign_slots", "compose_devices", "members_by_rank", "tf_workers"]


@dataclass(frozen=True)
class Member:
    """What a task tells its peers about itself in the gather step."""

    partition: int
    """Partition 0 leads and holds rank 0."""
    host_id: str
    """Equal for tasks that share a network namespace of a machine, different otherwise."""
    host: str
    address: str
    """IPv4 address at which the peers reach this task."""
    interface: str
    workers: int = 1
    """How many ranks it runs; the local agent of a run with np < 0 has them all."""
    gpus: tuple[str, ...] = ()
    """Indices or UUIDs."""
    peer_port: int = 0
    rendezvous_port: int = 0
    """0 where Horovod is not installed."""
    master_port: int = 0
    tf_ports: tuple[int, ...] = ()
    preflight_ports: tuple[int, ...] = ()
    """Where it answers probes; then, on partition 0, a rendezvous and a master port for them."""
    problem: str = ""
    """Why this task cannot go on; no task runs main then."""
    problem_kind: FailureKind = FailureKind.SETUP
    rows: tuple[str, ...] = ()
    """What each worker got of the data sets that travel with the run, as JSON."""
    versions: dict[str, str] = field(default_factory=dict, repr=False)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Member:
        fields = json.loads(text)
        sequences = {
            name: tuple(fields[name]) for name in ("gpus", "tf_ports", "preflight_ports", "rows")
        }
        kind = FailureKind(fields["problem_kind"])
        return cls(**{**fields, **sequences, "problem_kind": kind})


@dataclass(frozen=True)
class Slot:
    """One worker's position in the run, in Horovod's terms."""

    partition: int
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    """Position among the workers of other hosts with the same local rank."""
    cross_size: int
    host_index: int
    host: str
    host_id: str
    address: str
    interface: str
    devices: str | None = None
    """Value for ``CUDA_VISIBLE_DEVICES``; None leaves the variable as it is."""


def assign_slots(members: Sequence[Member]) -> list[Slot]:
    """Return a slot for every worker, in rank order; ranks on one host are contiguous.

    The assignment is that of Horovod's ``get_host_assignments``. Every task derives it from the
    same messages.
    """
    hosts = _by_host(members)
    size = sum(map(len, hosts))
    cross_size = [
        sum(len(host) > local_rank for host in hosts) for local_rank in range(max(map(len, hosts)))
    ]
    next_cross_rank = [0] * len(cross_size)
    slots: list[Slot] = []
    for host_index, host in enumerate(hosts):
        devices = _visible_devices(host)
        for local_rank, member in enumerate(host):
            slots.append(
                Slot(
                    partition=member.partition,
                    rank=len(slots),
                    size=size,
                    local_rank=local_rank,
                    local_size=len(host),
                    cross_rank=next_cross_rank[local_rank],
                    cross_size=cross_size[local_rank],
                    host_index=host_index,
                    host=member.host,
                    host_id=member.host_id,
                    address=member.address,
                    interface=member.interface,
                    devices=devices[local_rank],
                )
            )
            next_cross_rank[local_rank] += 1
    return slots


def members_by_rank(members: Sequence[Member]) -> list[Member]:
    """Return the task of every rank."""
    return list(itertools.chain(*_by_host(members)))


def _by_host(members: Sequence[Member]) -> list[list[Member]]:
    """List each host's tasks, once for every worker they start, by local rank.

    The host of partition 0 comes first and the others follow by their smallest partition.
    """
    hosts: dict[str, list[Member]] = {}
    for member in sorted(members, key=lambda m: m.partition):
        hosts.setdefault(member.host_id, []).extend([member] * member.workers)
    return list(hosts.values())


def tf_workers(members: Sequence[Member]) -> tuple[str, ...]:
    """List where TensorFlow's servers listen, in rank order; empty when no ports were reserved.

    >>> task = dict(host_id="a", host="a", address="10.0.0.1", interface="eth0")
    >>> tf_workers([Member(0, workers=2, tf_ports=(4000, 4001), **task)])
    ('10.0.0.1:4000', '10.0.0.1:4001')
    """
    ports = {member.partition: iter(member.tf_ports) for member in members}
    return tuple(
        f"{member.address}:{port}"
        for member in members_by_rank(members)
        if (port := next(ports[member.partition], None)) is not None
    )


def compose_devices(addresses: Sequence[str], already_visible: str | None) -> tuple[str, ...]:
    """Translate the GPUs that Spark gave a task into values for a new process.

    Spark numbers the GPUs it found on a machine. Where the executor itself sees only some of them
    (`already_visible`, its ``CUDA_VISIBLE_DEVICES``), the numbers count within those.

    >>> compose_devices(["1", "0"], "4,6")
    ('6', '4')
    >>> compose_devices(["GPU-8d0e"], "4,6")
    ('GPU-8d0e',)
    """
    if already_visible is None:
        return tuple(addresses)
    visible = [device.strip() for device in already_visible.split(",") if device.strip()]
    composed = []
    for address in addresses:
        if not address.isdecimal():
            composed.append(address)
        elif int(address) < len(visible):
            composed.append(visible[int(address)])
        else:
            raise ValueError(
                f"Spark gave this task GPU {address}, and the executor sees {len(visible)} "
                f"(CUDA_VISIBLE_DEVICES={already_visible})"
            )
    return tuple(composed)


def _visible_devices(host: Sequence[Member]) -> list[str | None]:
    """Return ``CUDA_VISIBLE_DEVICES`` of each worker on a host, None where no task owns a GPU.

    Every worker sees all GPUs its run owns on the host, its own at index `local_rank`, so that
    ``torch.cuda.set_device(hvd.local_rank())`` picks it; further GPUs of tasks that own several
    follow. CUDA refuses a list with repetitions: where workers share a GPU, or some own none, each
    sees its own alone.
    """
    workers_so_far: defaultdict[int, int] = defaultdict(int)
    owned = []
    for member in host:
        owned.append(_own_gpus(member, workers_so_far[member.partition]))
        workers_so_far[member.partition] += 1
    everything = [gpus[0] for gpus in owned if gpus] + [gpu for gpus in owned for gpu in gpus[1:]]
    if not everything:
        return [None] * len(owned)
    if len(set(everything)) < len(everything) or not all(owned):
        return [",".join(gpus) for gpus in owned]
    return [",".join(everything)] * len(owned)


def _own_gpus(member: Member, worker: int) -> tuple[str, ...]:
    """Deal out a task's GPUs to its workers; where there are fewer, workers share them."""
    if len(member.gpus) < member.workers:
        return member.gpus[worker % len(member.gpus) :][:1] if member.gpus else ()
    return member.gpus[worker :: member.workers]
