"""Real Horovod over Gloo, on this machine and on executors."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from horovodrunner import HorovodRunner, WorkerFailedError
from tests.conftest import workers_left

pytestmark = [pytest.mark.horovod, pytest.mark.spark, pytest.mark.usefixtures("spark")]


def run(main: Any, np: int, **kwargs: Any) -> Any:
    return HorovodRunner(np=np).run(main, **kwargs)


@pytest.mark.parametrize("np", [-2, 1])
def test_torch_ranks_agree_on_who_they_are(np: int) -> None:
    def main() -> dict[str, Any]:
        import horovod.torch as hvd
        import torch

        hvd.init()
        ranks = hvd.allgather(torch.tensor([hvd.rank()])).tolist()
        total = hvd.allreduce(torch.tensor(float(hvd.rank() + 1)), op=hvd.Sum).item()
        names = hvd.allgather_object((hvd.rank(), hvd.local_rank(), os.environ["RANK"]))
        return {
            "ranks": ranks,
            "total": total,
            "names": names,
            "sizes": (hvd.size(), hvd.local_size(), hvd.cross_size()),
        }

    size = abs(np)
    assert run(main, np) == {
        "ranks": list(range(size)),
        "total": size * (size + 1) / 2,
        "names": [(rank, rank, str(rank)) for rank in range(size)],
        "sizes": (size, size, 1),
    }


def weights_after_training(rank: int, size: int, steps: int = 5) -> list[float]:
    """Train a linear model on this rank's shard; averaged gradients equal the whole batch's."""
    import torch

    torch.manual_seed(7)
    inputs, targets = torch.randn(8, 3), torch.randn(8, 1)
    model = torch.nn.Linear(3, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if size > 1:
        import horovod.torch as hvd

        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs[rank::size]), targets[rank::size])
        loss.backward()
        optimizer.step()
    return [value for p in model.parameters() for value in p.detach().flatten().tolist()]


def test_training_on_two_ranks_equals_training_on_the_whole_batch() -> None:
    def main() -> list[list[float]]:
        import horovod.torch as hvd

        hvd.init()
        own = weights_after_training(hvd.rank(), hvd.size())
        return list(hvd.allgather_object(own))

    first, second = run(main, 2)
    assert first == second
    assert first == pytest.approx(weights_after_training(0, 1), rel=1e-5)


@pytest.mark.parametrize(
    ("np", "on_rank", "how"),
    [
        (-2, 0, "SIGKILL"),
        (-2, 1, "exception"),
        (2, 0, "exception"),
        (2, 1, "SIGKILL"),
        (2, 0, "os._exit"),
    ],
)
def test_the_cause_is_named_when_the_others_wait_in_a_collective(
    np: int, on_rank: int, how: str
) -> None:
    def main(on_rank: int, how: str) -> None:
        import horovod.torch as hvd
        import torch

        hvd.init()
        hvd.allreduce(torch.ones(1), name="first")
        if hvd.rank() == on_rank:
            time.sleep(0.3)  # the other one is waiting by now
            if how == "exception":
                raise KeyError("missing column")
            if how == "os._exit":
                os._exit(5)
            os.kill(os.getpid(), signal.SIGKILL)
        hvd.allreduce(torch.ones(1), name="second")

    with pytest.raises(WorkerFailedError) as caught:
        run(main, np, on_rank=on_rank, how=how)
    assert caught.value.rank == on_rank, str(caught.value)
    expected = {"SIGKILL": "SIGKILL", "os._exit": "exit code 5", "exception": "missing column"}
    assert expected[how] in caught.value.summary


def test_a_rank_that_leaves_while_the_other_waits_is_named() -> None:
    def main() -> None:
        import horovod.torch as hvd
        import torch

        hvd.init()
        if hvd.rank() == 0:
            hvd.allreduce(torch.ones(1))

    with pytest.raises(
        WorkerFailedError, match="rank 1 returned from main while rank 0 waited in allreduce"
    ):
        run(main, -2)


@pytest.mark.parametrize("how", ["exception", "SIGKILL"])
def test_data_loader_workers_go_with_their_ranks(how: str) -> None:
    def main(how: str) -> None:
        import torch

        class Endless(torch.utils.data.IterableDataset):  # type: ignore[misc]
            def __iter__(self) -> Any:
                while True:
                    yield torch.ones(3)

        loader = torch.utils.data.DataLoader(Endless(), num_workers=2)
        for step, _ in enumerate(loader):
            if os.environ["RANK"] == "1" and step == 3:
                if how == "exception":
                    raise ValueError("with loaders")
                os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerFailedError, match=r"with loaders|SIGKILL"):
        run(main, -2, how=how)
    assert workers_left() == []


SECONDS_UNTIL_STACKS = 90
"""A rank that hangs shows its Python stack in the log and fails the run."""

CELLS = [
    "import torch\nimport torch.distributed as dist\nfrom torch import nn",
    "hyperparameters = {'lr': 0.05, 'steps': 3}",
    """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x)
""",
    """
def make_data(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(16, 4, generator=generator), torch.ones(16, 1)
""",
    """
def train(lr):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    x, y = make_data(rank)
    for _ in range(hyperparameters["steps"]):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    gathered = [torch.zeros_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, weights)
    return torch.stack(gathered).numpy()
""",
]


@pytest.mark.parametrize("np", [-1, 2])
def test_somebody_elses_function_for_torch_distributor_from_notebook_cells(np: int) -> None:
    notebook: dict[str, Any] = {"__name__": "__main__"}
    for cell in CELLS:
        exec(cell, notebook)

    def watched(train: Any, lr: float) -> Any:
        import faulthandler

        faulthandler.dump_traceback_later(SECONDS_UNTIL_STACKS, exit=True)
        return train(lr)

    runner = HorovodRunner(np=np, driver_log_verbosity="all")
    weights = runner.run(watched, train=notebook["train"], lr=0.05)
    assert weights.shape == (abs(np), 5)
    assert (weights == weights[0]).all()
