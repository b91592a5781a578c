"""Hosts and GPUs to slots, as pure functions. Runs in: the task.

A *place* is one worker's seat: a task, and the number of the worker within it (a barrier task has
one worker; the single local agent of a run with np < 0 has them all).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from horovodrunner.flows.outcome.outcome import FailureKind

__all__ = [
    "HostGroup",
    "Member",
    "Slot",
    "compose_devices",
    "group_by_host",
    "tf_workers",
    "visible_devices",
]


@dataclass(frozen=True)
class Member:
    """What a task tells its peers about itself in the gather step.

    Parameters
    ----------
    partition
        The barrier task's partition; partition 0 holds rank 0.
    host_id
        Equal for tasks that share a network namespace of a machine, different otherwise.
    host
        Name for people.
    address
        IPv4 address at which the peers reach this task.
    interface
        Name of the network interface that has `address`.
    workers
        Number of workers this task starts.
    gpus
        GPU addresses this task owns (indices or UUIDs); empty when tasks own none.
    hub_port, rendezvous_port, master_port
        Set by partition 0: where its peers, Horovod's workers and torch.distributed connect.
    tf_ports
        Reserved for TensorFlow's servers, one for each worker, when the run has ``TF_CONFIG``.
    problem
        Set when this task cannot go on; nobody runs ``main`` then.
    problem_kind
        What kind of failure that is.
    rows
        What this task got of the data sets that travel with the run, as JSON text.
    versions
        What is installed for this task's Python, by name.
    """

    partition: int
    host_id: str
    host: str
    address: str
    interface: str
    workers: int = 1
    gpus: tuple[str, ...] = ()
    hub_port: int = 0
    rendezvous_port: int = 0
    master_port: int = 0
    tf_ports: tuple[int, ...] = ()
    problem: str = ""
    problem_kind: FailureKind = FailureKind.SETUP
    rows: str = ""
    versions: dict[str, str] = field(default_factory=dict, repr=False)

    def to_json(self) -> str:
        """Give the fields as JSON text.

        Returns
        -------
        str
            What :meth:`from_json` takes.
        """
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Member:
        """Read what :meth:`to_json` gave.

        Parameters
        ----------
        text
            JSON text.

        Returns
        -------
        Member
            An equal object.
        """
        fields = json.loads(text)
        sequences = {name: tuple(fields[name]) for name in ("gpus", "tf_ports")}
        kind = FailureKind(fields["problem_kind"])
        return cls(**{**fields, **sequences, "problem_kind": kind})


@dataclass(frozen=True)
class HostGroup:
    """The places on one host, in the order of their local ranks.

    Parameters
    ----------
    host_id
        The host.
    members
        The host's tasks, once for every worker they start, ordered by partition.
    """

    host_id: str
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Slot:
    """One worker's position in the run, in Horovod's terms.

    Parameters
    ----------
    partition
        The task that starts the worker.
    rank, size
        Position among all workers, and their number.
    local_rank, local_size
        Position among the workers of the same host, and their number.
    cross_rank, cross_size
        Position among the workers of other hosts with the same local rank, and their number.
    host_index
        Position of the worker's host among the run's hosts.
    host, host_id, address, interface
        Where the worker runs.
    devices
        Value for ``CUDA_VISIBLE_DEVICES``; None leaves the variable as it is.
    """

    partition: int
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    host_index: int
    host: str
    host_id: str
    address: str
    interface: str
    devices: str | None = None


def group_by_host(members: Sequence[Member]) -> list[HostGroup]:
    """Put tasks of one host side by side, so that ranks on a host are contiguous.

    The host of partition 0 comes first and the others follow by their smallest partition, so
    partition 0 always holds rank 0 and every task derives the same order.

    Parameters
    ----------
    members
        The gathered messages, in any order.

    Returns
    -------
    list of HostGroup
        The hosts in rank order.
    """
    hosts: dict[str, list[Member]] = {}
    for member in sorted(members, key=lambda m: m.partition):
        hosts.setdefault(member.host_id, []).extend([member] * member.workers)
    return [HostGroup(host_id, tuple(group)) for host_id, group in hosts.items()]


def tf_workers(members: Sequence[Member]) -> tuple[str, ...]:
    """List where TensorFlow's servers listen.

    Parameters
    ----------
    members
        The gathered messages, in any order.

    Returns
    -------
    tuple of str
        ``host:port`` of every rank, in rank order; empty when no ports were reserved.

    Examples
    --------
    >>> task = dict(host_id="a", host="a", address="10.0.0.1", interface="eth0")
    >>> tf_workers([Member(0, workers=2, tf_ports=(4000, 4001), **task)])
    ('10.0.0.1:4000', '10.0.0.1:4001')
    """
    ports = {member.partition: iter(member.tf_ports) for member in members}
    return tuple(
        f"{member.address}:{port}"
        for group in group_by_host(members)
        for member in group.members
        if (port := next(ports[member.partition], None)) is not None
    )


def compose_devices(addresses: Sequence[str], already_visible: str | None) -> tuple[str, ...]:
    """Say a task's GPUs in terms that hold for a new process.

    Spark numbers the GPUs it found on a machine. Where the executor itself sees only some of them,
    its numbers count within those.

    Parameters
    ----------
    addresses
        What Spark gave the task: indices or UUIDs.
    already_visible
        The executor's ``CUDA_VISIBLE_DEVICES``, or None where it is not set.

    Returns
    -------
    tuple of str
        Values for ``CUDA_VISIBLE_DEVICES``.

    Raises
    ------
    ValueError
        If an index points beyond what the executor sees.

    Examples
    --------
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


def visible_devices(group: HostGroup, local_rank: int) -> str | None:
    """List the GPUs that a worker sees, its own at the index of its local rank.

    Every worker sees all GPUs its run owns on the host, so that
    ``torch.cuda.set_device(hvd.local_rank())`` picks the worker's own. The first GPU of every
    worker comes first, in the order of the local ranks; further GPUs of tasks that own several
    follow. Where tasks share a GPU (a fractional amount), no list can do that, because CUDA
    refuses one with repetitions: each worker sees its own GPU alone then.

    Parameters
    ----------
    group
        The places of one host.
    local_rank
        The worker's position among them.

    Returns
    -------
    str or None
        Comma-separated GPU addresses, or None when no task owns a GPU.

    Examples
    --------
    >>> task = dict(host_id="a", host="a", address="10.0.0.1", interface="eth0")
    >>> first = Member(0, gpus=("2",), **task)
    >>> second = Member(1, gpus=("0",), **task)
    >>> visible_devices(HostGroup("a", (first, second)), local_rank=1)
    '2,0'
    >>> third = Member(2, gpus=("2",), **task)  # half of it
    >>> visible_devices(HostGroup("a", (first, third)), local_rank=1)
    '2'
    """
    owned = _gpus_by_local_rank(group)
    everything = [gpus[0] for gpus in owned if gpus] + [gpu for gpus in owned for gpu in gpus[1:]]
    if not everything:
        return None
    if len(set(everything)) < len(everything):
        return ",".join(owned[local_rank])
    return ",".join(everything)


def _gpus_by_local_rank(group: HostGroup) -> list[tuple[str, ...]]:
    """Deal each task's GPUs to its workers, of which a barrier task has one."""
    owned = []
    dealt: dict[int, int] = {}
    for member in group.members:
        number = dealt.get(member.partition, 0)
        dealt[member.partition] = number + 1
        owned.append(member.gpus[number :: member.workers])
    return owned
