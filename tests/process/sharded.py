"""Training functions with sharded models, on CPUs with gloo."""

from __future__ import annotations

from typing import Any

from horovodrunner import checkpoint


def build(kind: str, seed: int) -> tuple[Any, Any, Any]:
    """Return a model with odd sizes, divided as `kind` says, its optimizer and a schedule.

    Rows are 10, 3, 3 and 1: over four ranks some parts are smaller, and some empty.
    """
    import torch
    import torch.distributed as dist

    class Net(torch.nn.Module):  # type: ignore[misc]  # torch is not looked into
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(4, 10)
            self.norm = torch.nn.BatchNorm1d(10)
            self.second = torch.nn.Linear(10, 3, bias=False)
            self.last = torch.nn.Linear(3, 1)
            self.frozen = torch.nn.Parameter(torch.randn(5), requires_grad=False)

        def forward(self, x: Any) -> Any:
            return self.last(self.second(torch.relu(self.norm(self.first(x)))))

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model: Any = Net()
    if kind != "plain":
        dist.init_process_group("gloo")
        _divide(model, kind, dist.get_world_size())
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": parameters[:2], "lr": 0.01}, {"params": parameters[2:]}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.9), amsgrad=True)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def _divide(model: Any, kind: str, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {
        "first": ColwiseParallel(output_layouts=Replicate()),
        "second": RowwiseParallel(input_layouts=Replicate()),
    }
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    elif kind == "hsdp":
        names = ("copies", "parts")
        fully_shard(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=names))
    elif kind == "tp":
        parallelize_module(model, init_device_mesh("cpu", (size,)), plan)
    else:
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])


def train(model: Any, optimizer: Any, schedule: Any, steps: int) -> None:
    import torch

    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        (model(torch.randn(6, 4)) ** 2).mean().backward()
        optimizer.step()
        schedule.step()


def whole(model: Any, optimizer: Any, schedule: Any) -> list[Any]:
    """Return all that is known of them, as values that can be compared; all ranks call this."""
    import torch

    def gathered(value: Any) -> Any:
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        return value.tolist() if isinstance(value, torch.Tensor) else value

    names = {id(p): name for name, p in model.named_parameters()}
    return [
        {key: gathered(value) for key, value in model.state_dict().items()},
        {
            names[id(p)]: {key: gathered(value) for key, value in state.items()}
            for p, state in optimizer.state.items()
        },
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        schedule.state_dict(),
    ]


def leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()  # gloo of torch 2.13 may hang without it
        dist.destroy_process_group()


def train_and_save(kind: str, step: int, steps: int, asynchronous: bool = False) -> list[Any]:
    """Go on from the latest checkpoint, if there is one, train and save."""
    import warnings

    warnings.simplefilter("error")
    parts = build(kind, seed=step)
    names = ("model", "optimizer", "schedule")
    objects = dict(zip(names, parts, strict=True))
    start = checkpoint.load_torch(**objects)
    assert start == step, start
    train(*parts, steps)
    found = whole(*parts)
    checkpoint.save_torch(step, asynchronous=asynchronous, **objects)
    if asynchronous:
        train(*parts, 1)  # what is being written has the old ones
        assert whole(*parts) != found
    leave_group()
    return found
