"""Training functions with sharded models, on CPUs with gloo."""

from __future__ import annotations

from typing import Any

import numpy as np

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


ROWS = 4096
COLUMNS = 256


def save_large(step: int) -> None:
    """Save four mebibytes, in two tensors."""
    import torch

    torch.manual_seed(0)
    model = _large()
    checkpoint.save_torch(step, model=model)
    leave_group()


def _large() -> Any:
    import torch
    import torch.distributed as dist

    model: Any = torch.nn.Linear(COLUMNS, ROWS)
    dist.init_process_group("gloo")
    _divide(model, "fsdp", dist.get_world_size())
    return model


def read_large(batch_bytes: int) -> list[int]:
    """Load it, and return the bytes that each rank read."""
    import torch
    import torch.distributed as dist

    from horovodrunner.flows.checkpoints.worker.shard_reader import ShardReader, load_into

    class Counting:
        def __init__(self, source: Any) -> None:
            self._source = source
            self.total = self.most = 0

        def files(self) -> Any:
            return self._source.files()

        def content_of(self, path: str) -> str:
            return str(self._source.content_of(path))

        def read(self, ranges: Any) -> Any:
            size = sum(length for _, _, length in ranges)
            self.total, self.most = self.total + size, max(self.most, size)
            return self._source.read(ranges)

    model = _large()
    latest = checkpoint.latest()
    assert latest is not None
    counting = Counting(latest.source())
    reader = ShardReader(counting, batch_bytes=batch_bytes)
    load_into({"model": model.state_dict()}, reader, reader.read_metadata())
    assert counting.most <= max(batch_bytes, 4096), counting.most
    totals: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(totals, counting.total)
    torch.manual_seed(0)
    expected = torch.nn.Linear(COLUMNS, ROWS)
    for got, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(got.full_tensor(), wanted)
    leave_group()
    return totals


def save_with_dcp(step: int) -> None:
    """Save the way a user of torch.distributed.checkpoint does, each rank into its directory."""
    import torch.distributed.checkpoint as dcp

    model, _, _ = build("fsdp", seed=1)
    with checkpoint.save(step, ranks="all") as directory:
        state = {"model": model.state_dict(), "note": {"epoch": 7}}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(directory / "dcp"))
    leave_group()


def load_with_dcp(directory: str) -> tuple[dict[str, Any], Any]:
    """Load with dcp.load() and our reader what either way has saved."""
    import torch.distributed.checkpoint as dcp

    model, optimizer, schedule = build("fsdp", seed=2)
    latest = checkpoint.latest()
    assert latest is not None
    state: dict[str, Any] = {"model": model.state_dict()}
    if directory:
        state["note"] = {"epoch": 0}
    dcp.load(state, storage_reader=checkpoint.torch_reader(latest, directory))
    found = whole(model, optimizer, schedule)[0]
    leave_group()
    return found, state.get("note")


def save_plainly(step: int, seed: int) -> dict[str, Any]:
    model, optimizer, schedule = build("plain", seed)
    checkpoint.save_torch(step, model=model, optimizer=optimizer)
    return dict(whole(model, optimizer, schedule)[0])


def load_others(ways: list[str]) -> dict[str, str]:
    """Load into what does not fit, and return what the errors say."""
    return {how: _load_other(how) for how in ways}


def _load_other(how: str) -> str:
    import torch

    from horovodrunner import ArgumentValueError, CheckpointError

    model, optimizer, _ = build("fsdp", seed=2)
    objects: dict[str, Any] = {"model": model}
    if how == "no module":
        objects = {"optimizer": optimizer}
    elif how == "other name":
        objects = {"net": model}
    elif how == "other size":
        model.last = torch.nn.Linear(3, 2)
    elif how == "more":
        model.more = torch.nn.Linear(1, 1)
    elif how == "less":
        del model.last
    elif how == "other groups":
        parameters = [p for p in model.parameters() if p.requires_grad]
        objects["optimizer"] = torch.optim.AdamW(parameters)
    elif how == "meta":
        objects = {"model": model.to("meta")}
    try:
        checkpoint.load_torch(**objects)
    except (ArgumentValueError, CheckpointError) as error:
        leave_group()
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it was loaded")


def save_flattened(step: int) -> str:
    """Save a module of FSDP1, whose state rank 0 gathers, and then its optimizer, too."""
    import warnings

    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    from horovodrunner import ArgumentValueError

    dist.init_process_group("gloo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 has many
        model = FullyShardedDataParallel(torch.nn.Linear(5, 3), device_id=torch.device("cpu"))
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        checkpoint.save_torch(step, model=model)
        try:
            checkpoint.save_torch(step, model=model, optimizer=optimizer)
        except ArgumentValueError as error:
            leave_group()
            return str(error)
    raise AssertionError("it was saved")


def save_or_load_wrapped(step: int, wraps: bool, loads: bool) -> list[float]:
    """Save or load a model that DistributedDataParallel and torch.compile wrap, or nothing."""
    import torch
    import torch.distributed as dist

    torch.manual_seed(step)
    model: Any = torch.nn.Linear(2, 1)
    weights = model.weight
    if wraps:
        dist.init_process_group("gloo")
        model = torch.compile(torch.nn.parallel.DistributedDataParallel(model))
    if loads:
        assert checkpoint.load_torch(model=model) == step
    else:
        checkpoint.save_torch(step, model=model)
    leave_group()
    return list(weights.flatten().tolist())


class Sampler:
    """An object with NumPy's random state and a number of NumPy's, as a sampler may have."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.RandomState(seed)
        self.place: Any = np.int64(seed)

    def state_dict(self) -> dict[str, Any]:
        return {"random": self.random.get_state(), "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.random.set_state(state["random"])
        self.place = state["place"]


def save_or_load_sampler(seed: int, loads: bool) -> tuple[int, float]:
    sampler = Sampler(seed)
    if loads:
        checkpoint.load_torch(sampler=sampler)
    else:
        checkpoint.save_torch(1, sampler=sampler)
    return int(sampler.place), sampler.random.random_sample()


def stages(step: int, ranks: str | None, loads: bool = False, second: str = "fsdp") -> Any:
    """Save or load the stages of a pipeline: the first on rank 0, the second on ranks 1 and 2.

    `second` is "fsdp" where the second stage is sharded over its ranks, "plain" where each of them
    has a stage of its own.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(step)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh: Any = DeviceMesh("cpu", [1, 2]) if second == "fsdp" else None
    stage: Any = torch.nn.Sequential()
    number = min(rank, 1) if second == "fsdp" else rank
    stage.add_module(f"layer{number}", torch.nn.Linear(3 + number, 5))
    if rank > 0 and second == "fsdp":
        fully_shard(stage, mesh=mesh)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(number)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1 + number)
    objects = {"stage": stage, "optimizer": optimizer}
    if loads:
        assert checkpoint.load_torch(**objects) > 0
    else:
        checkpoint.save_torch(step, ranks=ranks, **objects)
    whole = list(stage.state_dict().values())
    values = [getattr(each, "full_tensor", lambda each=each: each)().tolist() for each in whole]
    dist.barrier()  # the first save is refused when the last rank has saved it
    leave_group()
    return list(stage.state_dict()), values, optimizer.param_groups[0]["lr"]


class _Own:
    """Something that every rank has another one of."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def save_or_load_own(ranks: str | None = None) -> int:
    import os

    own = _Own(int(os.environ["RANK"]) if ranks else -1)
    if ranks:
        checkpoint.save_torch(1, ranks=ranks, own=own)
    else:
        checkpoint.load_torch(own=own)
    return own.value


def load_whole(names: list[str]) -> tuple[int, list[Any]]:
    """Load plain objects of what was sharded; return the bytes that came to this rank alone."""
    from horovodrunner.flows.checkpoints.worker.ranges import TaskSource

    parts = build("plain", seed=9)
    objects = dict(zip(("model", "optimizer", "schedule"), parts, strict=True))
    read, total = TaskSource.read, 0

    def counting(self: Any, ranges: Any) -> Any:
        nonlocal total
        total += sum(size for path, _, size in ranges if path.endswith(".bin"))
        return read(self, ranges)

    TaskSource.read = counting  # type: ignore[method-assign]
    checkpoint.load_torch(**{name: objects[name] for name in names})
    return total, [value.tolist() for value in parts[0].state_dict().values()]


def stages_of_one_name(loads: bool, together: bool = False) -> list[float]:
    """Save or load a model of FSDP for each rank, all of which have the same names.

    `together` makes it one model over all ranks.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    ranks = range(dist.get_world_size())
    meshes = [DeviceMesh("cpu", list(ranks) if together else [rank]) for rank in ranks]
    model: Any = torch.nn.Linear(2, 3, bias=False)
    torch.nn.init.constant_(model.weight, -9.0 if loads else 10.0 + dist.get_rank())
    fully_shard(model, mesh=meshes[dist.get_rank()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if loads else 1.0 + dist.get_rank())
    if loads:
        checkpoint.load_torch(model=model, optimizer=optimizer)
    else:
        checkpoint.save_torch(0, model=model, optimizer=optimizer)
    leave_group()
    return [model.weight.to_local()[0, 0].item(), optimizer.param_groups[0]["lr"]]


def save_half_of_it() -> None:
    """Save a model of all ranks on rank 0 only, and something else on the others."""
    import os

    import torch
    import torch.distributed as dist

    model, _, _ = build("fsdp", seed=1)
    if os.environ["RANK"] == "0":
        checkpoint.save_torch(0, ranks="all", model=model)
    else:
        checkpoint.save_torch(0, ranks="all", other=torch.nn.Linear(1, 1))
    dist.barrier()
    leave_group()


def save_and_change_types(loads: bool) -> list[Any]:
    """Change all types right after a save; return the weights that were saved, or are loaded."""
    import torch

    model, _, _ = build("fsdp", seed=1 + loads)
    if loads:
        checkpoint.load_torch(model=model)
        weights = [gathered.full_tensor().tolist() for gathered in model.parameters()]
    else:
        weights = [gathered.full_tensor().tolist() for gathered in model.parameters()]
        checkpoint.save_torch(0, asynchronous=True, model=model)
        model.to(torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0)
        checkpoint.wait()
    leave_group()
    return weights
