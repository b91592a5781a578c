"""A rank that never comes to a collective, in the frameworks' own collectives."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import HorovodRunner, StallTimeoutError

pytestmark = [pytest.mark.horovod, pytest.mark.spark, pytest.mark.usefixtures("spark")]

STALL_SECONDS = 5


def meet(directory: str) -> None:
    """Wait until every rank is in main: one that still imports would be missing before."""
    Path(directory, os.environ["RANK"]).touch()
    while len(list(Path(directory).iterdir())) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.02)


def stay_away() -> None:
    time.sleep(600)


def horovod_tensorflow(late: int, directory: str) -> None:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    meet(directory)
    hvd.init()

    @tf.function  # type: ignore[untyped-decorator]
    def step(x: Any) -> Any:
        return hvd.allreduce(x, op=hvd.Sum, name="gradient")

    assert step(tf.ones(2)).numpy().tolist() == [2, 2]
    if hvd.rank() == late:
        stay_away()
    step(tf.ones(2))


def of_torch(late: int, directory: str) -> None:
    """Let each of three ranks wait in another collective."""
    import horovod.torch as hvd
    import torch
    import torch.distributed as dist

    meet(directory)
    hvd.init()
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Linear(2, 1), process_group=dist.new_group()
    )

    def horovods_own() -> None:
        hvd.allreduce(torch.ones(2), name="ones")

    def torch_distributed() -> None:
        dist.all_reduce(torch.ones(2))

    def data_parallel() -> None:
        model(torch.ones(1, 2)).sum().backward()

    collectives = [horovods_own, torch_distributed, data_parallel]
    for collective in collectives:
        collective()
    if hvd.rank() == late:
        stay_away()
    collectives[hvd.rank() - (hvd.rank() > late)]()


@pytest.mark.parametrize(
    ("np", "late", "main", "waiting"),
    [
        (2, 0, horovod_tensorflow, {1: ("a TensorFlow step", "horovod_tensorflow")}),
        (
            -4,
            1,
            of_torch,
            {
                0: ("allreduce", "horovods_own"),
                2: ("all_reduce", "torch_distributed"),
                3: ("DistributedDataParallel", "data_parallel"),
            },
        ),
    ],
)
def test_the_missing_rank_is_named_and_every_stack_is_shown(
    np: int, late: int, main: Any, waiting: dict[int, tuple[str, str]], tmp_path: Path
) -> None:
    runner = HorovodRunner(np=np, stall_timeout=STALL_SECONDS)
    with pytest.raises(StallTimeoutError) as caught:
        runner.run(main, late=late, directory=str(tmp_path))
    error = caught.value
    assert error.rank == late
    for rank, (collective, function) in waiting.items():
        assert f"rank {rank} waits in {collective} ({__file__}" in error.summary
        assert f"in {function}" in error.stacks[rank]
    assert f"missing: rank {late} is at {__file__}" in error.summary
    assert "in stay_away" in error.summary
    assert "in stay_away" in error.stacks[late]
