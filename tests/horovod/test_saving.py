"""checkpoint.should_save_now() where ranks wait for each other in every step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from horovodrunner import HorovodRunner, checkpoint, metrics

pytestmark = pytest.mark.horovod

SIZE = 3


def summed(framework: str) -> Callable[[float], float]:
    """Initialise a framework; return its sum over all ranks."""
    import torch

    if framework == "horovod":
        import horovod.torch as hvd

        hvd.init()
        return lambda value: float(hvd.allreduce(torch.tensor(value), op=hvd.Sum))
    import torch.distributed as dist

    dist.init_process_group("gloo")

    def allreduce(value: float) -> float:
        tensor = torch.tensor(value)
        dist.all_reduce(tensor)
        return float(tensor)

    return allreduce


def train(framework: str) -> list[int]:
    """Return the steps at which all ranks have saved; the last ranks are the slow ones."""
    allreduce, rank = summed(framework), int(os.environ["RANK"])
    step, saved = 0, list[int]()
    while len(saved) < 3:
        step += 1
        if rank == 0 and step == 20:
            metrics.report(step, loss=1.0)
        if rank == 1 and len(saved) == 1 and step == saved[0] + 10:
            os.kill(os.getpid(), signal.SIGTERM)
        if rank == 0 and len(saved) == 2 and step == saved[1] + 10:
            metrics.report(step, loss=0.5)
        time.sleep(0.002 * rank)
        total = allreduce(float(checkpoint.should_save_now()))
        assert total in {0.0, float(SIZE)}, f"{total} ranks save at step {step}"
        if total:
            saved.append(step)
    return saved


@pytest.mark.parametrize("framework", ["horovod", "torch.distributed"])
def test_all_ranks_save_at_the_same_step(framework: str) -> None:
    def on_report(_: Any) -> None:
        assert runner.request_checkpoint()

    runner = HorovodRunner(np=-SIZE, on_report=on_report)
    first, second, third = runner.run(train, framework=framework)
    assert 20 <= first < second < third
