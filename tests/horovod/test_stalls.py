"""A rank that never comes to a collective, in the frameworks' own collectives."""

from __future__ import annotations

import time
from typing import Any

import pytest

from horovodrunner import HorovodRunner, StallTimeoutError

pytestmark = [pytest.mark.horovod, pytest.mark.spark, pytest.mark.usefixtures("spark")]


def stay_away() -> None:
    time.sleep(600)


def horovod_torch(late: int) -> None:
    import horovod.torch as hvd
    import torch

    hvd.init()
    hvd.allreduce(torch.ones(2), name="first")
    if hvd.rank() == late:
        stay_away()
    hvd.allreduce(torch.ones(2), name="second")


def horovod_tensorflow(late: int) -> None:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()

    @tf.function  # type: ignore[untyped-decorator]
    def step(x: Any) -> Any:
        return hvd.allreduce(x, name="gradient")

    step(tf.ones(2))
    if hvd.rank() == late:
        stay_away()
    step(tf.ones(2))


def torch_distributed(late: int) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(2))
    if dist.get_rank() == late:
        stay_away()
    dist.all_reduce(torch.ones(2))


def data_parallel(late: int) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    model(torch.ones(1, 2)).sum().backward()
    if dist.get_rank() == late:
        stay_away()
    model(torch.ones(1, 2)).sum().backward()


@pytest.mark.parametrize(
    ("np", "late", "main", "collective"),
    [
        (2, 0, horovod_torch, "allreduce"),
        (2, 1, horovod_tensorflow, "a TensorFlow step"),
        (-2, 0, torch_distributed, "all_reduce"),
        (-2, 1, data_parallel, "DistributedDataParallel"),
    ],
)
def test_the_missing_rank_is_named_and_every_stack_is_shown(
    np: int, late: int, main: Any, collective: str
) -> None:
    with pytest.raises(StallTimeoutError) as caught:
        HorovodRunner(np=np, stall_timeout=4).run(main, late=late)
    error = caught.value
    assert error.rank == late
    assert f"rank {1 - late} waits in {collective}" in error.summary
    assert f"missing: rank {late} is at {__file__}" in error.summary
    assert "in stay_away" in error.summary
    assert f"in {main.__name__}" in error.stacks[1 - late]
    assert "in stay_away" in error.stacks[late]
