"""A network of PyTorch's, on torch.distributed: gradients are averaged by DDP."""

from __future__ import annotations

from typing import Any

from horovodrunner import checkpoint, metrics
from houses import data


def train(steps: int, lr: float = 0.05) -> dict[str, Any]:
    """Return the weights after so many steps; go on from a checkpoint if there is one."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        return _train(steps, lr)
    finally:
        dist.destroy_process_group()


def _train(steps: int, lr: float) -> dict[str, Any]:
    """Train in a function of its own: DDP has to be gone before its process group is destroyed.

    Otherwise torch may wait for ever: the group's threads want the GIL that their end holds.
    """
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    rank, size = dist.get_rank(), dist.get_world_size()
    x, y = (torch.from_numpy(array) for array in data.load())
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    start = checkpoint.load_torch(model=model, optimizer=optimizer)
    parallel = DistributedDataParallel(model)
    for step in range(start, steps):
        rows = data.batch(step)
        mine, prices = x[rows][rank::size], y[rows][rank::size]  # this rank's share
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(parallel(mine), prices)
        loss.backward()
        optimizer.step()
        metrics.report(step=step, loss=loss.item())
        checkpoint.save_torch(step, model=model, optimizer=optimizer)
    return model.state_dict()
