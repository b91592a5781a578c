"""Hosts and GPUs to slots."""

from collections import Counter
from random import Random

import pytest

from horovodrunner.placement.topology import (
    Member,
    Slot,
    assign_slots,
    compose_devices,
    members_by_rank,
    tf_workers,
)


def member(
    partition: int,
    host: str,
    workers: int = 1,
    gpus: tuple[str, ...] = (),
    tf_ports: tuple[int, ...] = (),
) -> Member:
    return Member(
        partition, host, host, "10.0.0.1", "eth0", workers=workers, gpus=gpus, tf_ports=tf_ports
    )


def positions(slots: list[Slot]) -> list[tuple[int, int, str, int, int, int, int]]:
    return [
        (s.rank, s.partition, s.host, s.local_rank, s.local_size, s.cross_rank, s.cross_size)
        for s in slots
    ]


def devices(*members: Member) -> list[str | None]:
    return [slot.devices for slot in assign_slots(members)]


def test_ranks_on_two_uneven_hosts() -> None:
    gathered = [member(0, "b"), member(1, "a"), member(2, "b"), member(3, "b"), member(4, "a")]
    slots = assign_slots(gathered)
    assert positions(slots) == [
        (0, 0, "b", 0, 3, 0, 2),
        (1, 2, "b", 1, 3, 0, 2),
        (2, 3, "b", 2, 3, 0, 1),
        (3, 1, "a", 0, 2, 1, 2),
        (4, 4, "a", 1, 2, 1, 2),
    ]
    assert [slot.host_index for slot in slots] == [0, 0, 0, 1, 1]
    assert {slot.size for slot in slots} == {5}


def test_ranks_of_one_host_are_contiguous_and_partition_0_comes_first() -> None:
    gathered = [member(3, "a"), member(1, "b"), member(2, "a"), member(0, "c"), member(4, "b")]
    assert [slot.partition for slot in assign_slots(gathered)] == [0, 1, 4, 2, 3]
    assert [task.partition for task in members_by_rank(gathered)] == [0, 1, 4, 2, 3]


def test_every_task_derives_the_same_slots_from_the_same_messages() -> None:
    gathered = [member(i, "abc"[i % 3]) for i in range(9)]
    assert assign_slots(gathered) == assign_slots(gathered[::-1])


def test_an_agent_with_several_workers_has_a_slot_for_each() -> None:
    slots = assign_slots([member(0, "a", workers=3)])
    assert positions(slots) == [(i, 0, "a", i, 3, 0, 1) for i in range(3)]


@pytest.mark.parametrize("seed", range(20))
def test_the_assignment_is_horovods(seed: int) -> None:
    hosts = pytest.importorskip("horovod.runner.common.util.hosts")
    random = Random(seed)
    gathered = [
        member(i, random.choice("abcdefg"), random.randint(1, 4))
        for i in range(random.randint(1, 20))
    ]
    slots = assign_slots(gathered)
    counts = Counter(slot.host_id for slot in slots)  # in the order of the ranks
    infos = [hosts.HostInfo(host, count) for host, count in counts.items()]
    assert [
        (s.rank, s.size, s.host_id, s.local_rank, s.local_size, s.cross_rank, s.cross_size)
        for s in slots
    ] == [
        (s.rank, s.size, s.hostname, s.local_rank, s.local_size, s.cross_rank, s.cross_size)
        for s in hosts.get_host_assignments(infos, len(slots))
    ]


def test_each_host_sees_its_own_gpus_and_every_worker_its_own_at_its_local_rank() -> None:
    gathered = (member(0, "a", gpus=("3",)), member(1, "b", gpus=("0",)))
    assert devices(*gathered, member(2, "a", gpus=("1",))) == ["3,1", "3,1", "0"]


def test_second_gpus_follow_after_every_workers_first() -> None:
    found = devices(member(0, "a", gpus=("0", "1")), member(1, "a", gpus=("2", "3")))
    assert found == ["0,2,1,3"] * 2


def test_without_gpus_the_variable_is_left_alone() -> None:
    assert devices(member(0, "a"), member(1, "a")) == [None, None]


def test_tasks_that_share_a_gpu_see_their_own_alone() -> None:
    """CUDA takes a list with repetitions for an empty one."""
    halves = [member(0, "a", gpus=("0",)), member(1, "a", gpus=("0",)), member(2, "a", gpus=("1",))]
    assert devices(*halves) == ["0", "0", "1"]


def test_the_workers_of_one_agent_have_their_own_gpus_in_order() -> None:
    assert devices(member(0, "a", workers=2, gpus=("4", "5", "6", "7"))) == ["4,5,6,7"] * 2


def test_indices_count_within_what_the_executor_sees() -> None:
    assert compose_devices(("2", "0"), "5,6,7") == ("7", "5")
    assert compose_devices(("1",), "GPU-a, GPU-b") == ("GPU-b",)
    assert compose_devices(("GPU-x",), "0,1") == ("GPU-x",)
    assert compose_devices(("1",), None) == ("1",)


@pytest.mark.parametrize("address", ["1", "2"])
def test_a_gpu_that_the_executor_does_not_see_is_told(address: str) -> None:
    with pytest.raises(ValueError, match=rf"GPU {address}, and the executor sees 1 .*=0"):
        compose_devices((address,), "0")


def test_a_member_travels_as_json() -> None:
    original = member(1, "a", gpus=("GPU-uuid",), tf_ports=(4000,))
    assert Member.from_json(original.to_json()) == original


def test_tensorflows_servers_are_in_rank_order_with_each_ones_own_port() -> None:
    scattered = [
        member(0, "a", tf_ports=(10,)),
        member(1, "b", tf_ports=(20,)),
        member(2, "a", workers=2, tf_ports=(30, 31)),
    ]
    ports = [int(worker.rpartition(":")[2]) for worker in tf_workers(scattered)]
    assert ports == [10, 30, 31, 20]
    assert tf_workers([member(0, "a"), member(1, "b")]) == ()


def test_tasks_of_several_ranks_use_all_gpus_of_their_hosts() -> None:
    """Hosts with one, two and three tasks of one to eight GPUs, in any order of partitions."""
    for seed in range(60):
        random = Random(seed)
        shapes = [
            (host, number)
            for host in "abc"[: random.randint(1, 3)]
            for number in range(random.randint(1, 3))
        ]
        random.shuffle(shapes)
        gathered = []
        for partition, (host, number) in enumerate(shapes):
            gpus = tuple(f"{host}{number}{i}" for i in range(random.randint(1, 8)))
            workers = random.randint(1, len(gpus))
            gathered.append(member(partition, host, workers=workers, gpus=gpus))
        slots = assign_slots(gathered)
        own = [(slot.devices or "").split(",")[slot.local_rank] for slot in slots]
        assert len(set(own)) == len(own) == sum(each.workers for each in gathered)
        for slot, gpu in zip(slots, own, strict=True):
            assert gpu in gathered[slot.partition].gpus
        for host in {slot.host for slot in slots}:
            seen = {slot.devices for slot in slots if slot.host == host}
            assert len(seen) == 1  # all that the run owns there
            owned = sorted(gpu for each in gathered if each.host == host for gpu in each.gpus)
            assert sorted(seen.pop().split(",")) == owned  # type: ignore[union-attr]
        ranks = [slot.rank for slot in slots if slot.partition == slots[-1].partition]
        assert ranks == list(range(ranks[0], ranks[-1] + 1))


def test_workers_of_a_task_with_too_few_gpus_share_them() -> None:
    assert devices(member(0, "a", workers=4, gpus=("5", "7"))) == ["5", "7", "5", "7"]
    mixed = (member(0, "a", workers=2, gpus=("0",)), member(1, "a", workers=1, gpus=("1", "2")))
    assert devices(*mixed) == ["0", "0", "1,2"]


def test_a_host_where_a_task_owns_no_gpu_gives_it_none_of_the_others() -> None:
    found = devices(member(0, "a", workers=2), member(1, "a", workers=2, gpus=("0", "1")))
    assert found[:2] == ["", ""]
    assert found[2:] == ["0", "1"]
