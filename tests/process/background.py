"""Training functions that save while they go on."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path
from typing import Any

from horovodrunner import checkpoint
from horovodrunner.processes.worker.context import current_context

opened = threading.Event()
"""What the writing thread waits for."""


class Gate:
    """An object whose state cannot be written before the gate is open."""

    def __init__(self) -> None:
        self.steps = [1]

    def state_dict(self) -> dict[str, Any]:
        return {"gate": self, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def __reduce__(self) -> Any:
        if threading.current_thread() is not threading.main_thread():
            assert opened.wait(60)
        return Gate, ()


def save_and_go_on() -> None:
    """Change everything while the checkpoint is being written."""
    import torch

    gate, model = Gate(), torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
    tied = torch.nn.ModuleList([model, model])
    checkpoint.save_torch(1, asynchronous=True, gate=gate, model=model, tied=tied)
    with torch.no_grad():
        model.weight.fill_(2.0)
    gate.steps.append(2)
    opened.set()
    checkpoint.wait()


def load() -> tuple[list[float], list[int], bool]:
    import torch

    latest = checkpoint.latest()
    assert latest is not None
    state = torch.load(latest / "tied.pt")
    is_tied = state["0.weight"].data_ptr() == state["1.weight"].data_ptr()
    model, gate = torch.nn.Linear(2, 2), Gate()
    state = torch.load(latest / "gate.pt", weights_only=False)
    gate.load_state_dict(state)
    checkpoint.load_torch(model=model)
    return model.weight.flatten().tolist(), gate.steps, is_tied


def open_later() -> None:
    """Open the gate in a while, in a thread that no process waits for."""
    timer = threading.Timer(1.0, opened.set)
    timer.daemon = True
    timer.start()


def return_before_it_is_written(how: str) -> None:
    """Return, or leave, while the thread still waits at the gate; a child is not to wait there."""
    checkpoint.save_torch(1, asynchronous=True, gate=Gate())
    child = os.fork()  # noqa: TID251 - a rank may
    if not child:
        checkpoint.wait()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    if how == "raise":
        raise ValueError("main does not go on")
    open_later()
    if how == "exit":
        raise SystemExit(0)


order: list[str] = []
"""What happened when."""


class Noted(Gate):
    def __reduce__(self) -> Any:
        super().__reduce__()
        if threading.current_thread() is not threading.main_thread():
            order.append("written")
        return Noted, ()


def save_twice() -> list[str]:
    """Save at once again: that waits for the first one."""
    checkpoint.save_torch(1, asynchronous=True, gate=Noted())
    open_later()
    checkpoint.save_torch(2, gate=Noted())
    order.append("saved")
    checkpoint.wait()
    return order


def save_otherwise() -> None:
    """Save files of main's own after a checkpoint that is still being written."""
    checkpoint.save_torch(1, asynchronous=True, gate=Gate())
    open_later()
    with checkpoint.save(2) as directory:
        (directory / "state").write_text("newer")


def cannot_write(sharded: bool, has_directory: bool) -> None:
    """No file may be longer than a few bytes while the checkpoint is written, or none made."""
    import torch
    import torch.distributed as dist

    model: Any = torch.nn.Linear(300, 300)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo")
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    if has_directory:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    else:
        context = current_context()
        assert context is not None
        scratch = Path(context.spec.scratch)
        away = scratch.rename(scratch.with_name(f"{scratch.name}-away"))
    checkpoint.save_torch(4, asynchronous=True, model=model)
    checkpoint.wait()
    if has_directory:
        unlimited = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    else:
        away.rename(scratch)
    if sharded:
        dist.barrier()
        dist.destroy_process_group()
