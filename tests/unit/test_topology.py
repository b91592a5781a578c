"""Hosts and GPUs to places."""

import pytest

from horovodrunner.placement.topology import (
    HostGroup,
    Member,
    compose_devices,
    group_by_host,
    tf_workers,
    visible_devices,
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


def places(members: list[Member]) -> list[tuple[str, list[int]]]:
    return [(g.host_id, [m.partition for m in g.members]) for g in group_by_host(members)]


def test_ranks_of_one_host_are_contiguous_and_partition_0_comes_first() -> None:
    gathered = [member(3, "a"), member(1, "b"), member(2, "a"), member(0, "c"), member(4, "b")]
    assert places(gathered) == [("c", [0]), ("b", [1, 4]), ("a", [2, 3])]


def test_the_order_does_not_depend_on_the_order_of_the_messages() -> None:
    gathered = [member(i, "ab"[i % 2]) for i in range(6)]
    assert places(gathered) == places(gathered[::-1]) == [("a", [0, 2, 4]), ("b", [1, 3, 5])]


def test_an_agent_with_several_workers_has_a_place_for_each() -> None:
    assert places([member(0, "a", workers=3)]) == [("a", [0, 0, 0])]


def test_every_worker_sees_its_own_gpu_at_its_local_rank() -> None:
    group = HostGroup("a", (member(0, "a", gpus=("3",)), member(2, "a", gpus=("1",))))
    assert [visible_devices(group, rank) for rank in (0, 1)] == ["3,1", "3,1"]


def test_second_gpus_follow_after_every_workers_first() -> None:
    group = HostGroup("a", (member(0, "a", gpus=("0", "1")), member(1, "a", gpus=("2", "3"))))
    assert visible_devices(group, 1) == "0,2,1,3"


def test_without_gpus_the_variable_is_left_alone() -> None:
    assert visible_devices(HostGroup("a", (member(0, "a"), member(1, "a"))), 0) is None


def test_tasks_that_share_a_gpu_see_their_own_alone() -> None:
    """CUDA takes a list with repetitions for an empty one."""
    halves = [member(0, "a", gpus=("0",)), member(1, "a", gpus=("0",)), member(2, "a", gpus=("1",))]
    group = HostGroup("a", tuple(halves))
    assert [visible_devices(group, rank) for rank in range(3)] == ["0", "0", "1"]


def test_the_workers_of_one_agent_have_their_own_gpus_in_order() -> None:
    [group] = group_by_host([member(0, "a", workers=2, gpus=("4", "5", "6", "7"))])
    assert [visible_devices(group, rank) for rank in (0, 1)] == ["4,5,6,7"] * 2


def test_indices_count_within_what_the_executor_sees() -> None:
    assert compose_devices(("2", "0"), "5,6,7") == ("7", "5")
    assert compose_devices(("1",), "GPU-a, GPU-b") == ("GPU-b",)
    assert compose_devices(("GPU-x",), "0,1") == ("GPU-x",)
    assert compose_devices(("1",), None) == ("1",)


def test_a_gpu_that_the_executor_does_not_see_is_told() -> None:
    with pytest.raises(ValueError, match=r"GPU 2, and the executor sees 1 .*=0"):
        compose_devices(("2",), "0")


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
