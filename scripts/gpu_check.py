"""Check what needs a GPU, and print rows for docs/compatibility.md. Runs in: the command line.

scripts/gpu_check.sh prepares a machine for it. Runs have np < 0, so neither Spark nor Java is
needed. Without a GPU the same code runs on the CPU where it can, and the rest is skipped.
"""
# ruff: noqa: D103, T201

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from horovodrunner import HorovodRunner, HorovodRunnerError, checkpoint

# Without torch.cuda: the driver is not to touch the GPU.
DEVICE = "cuda" if torch.version.cuda and shutil.which("nvidia-smi") else "cpu"


def gpu_count() -> int:
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return len(subprocess.check_output(query, text=True).split()) if DEVICE == "cuda" else 0


def used_mib() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(int, subprocess.check_output(query, text=True).split()))


class Skipped(Exception):  # noqa: N818 - it is no error
    """Raised by a check that this machine cannot run."""


def run(np: int, main: Callable[..., Any], **kwargs: Any) -> Any:
    return HorovodRunner(np=np, stall_timeout=60).run(main, **kwargs)


def require(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(text)


def require_horovod() -> None:
    if importlib.util.find_spec("horovod") is None:
        raise Skipped("Horovod is not installed")


def require_gpus(number: int) -> None:
    if gpu_count() < number:
        raise Skipped(f"{gpu_count()} GPUs, {number} needed")


def horovod_reduces(np: int, device: str) -> str:
    require_horovod()

    def main(device: str) -> tuple[list[float], bool]:
        import horovod.torch as hvd

        hvd.init()
        where = f"cuda:{hvd.local_rank()}" if device == "cuda" else "cpu"
        total = hvd.allreduce(torch.ones(1 << 20, device=where), op=hvd.Sum)
        return total.unique().tolist(), hvd.nccl_built()

    values, has_nccl = run(np, main, device=device)
    require(values == [float(-np)], f"the sum is {values}")
    require(bool(has_nccl) or device == "cpu", "Horovod was built without NCCL")
    return f"sum over {-np} ranks on {device}, {'NCCL' if device == 'cuda' else 'Gloo'}"


def torch_trains_with_ddp(np: int, device: str) -> str:
    def main(device: str) -> tuple[list[float], list[list[float]]]:
        import torch.distributed as dist

        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        rank = int(os.environ["LOCAL_RANK"])
        where = f"cuda:{rank}" if device == "cuda" else "cpu"
        torch.manual_seed(1)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1).to(where))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(rank)).to(where)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        own = [value for p in model.parameters() for value in p.detach().cpu().flatten().tolist()]
        weights: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(weights, own)
        # A group that is freed with the model after it was destroyed may wait for the GIL for ever.
        del loss, optimizer, model
        dist.destroy_process_group()
        return losses, weights

    losses, weights = run(np, main, device=device)
    require(losses[-1] < losses[0], f"the loss went from {losses[0]} to {losses[-1]}")
    require(all(each == weights[0] for each in weights), "the ranks have different weights")
    backend = "nccl" if device == "cuda" else "gloo"
    return f"{-np} ranks, {backend}, loss {losses[0]:.2f} to {losses[-1]:.2f}"


def main_finds_its_gpu() -> str:
    require_gpus(1)

    def main() -> tuple[bool, int, str, str | None]:
        untouched = not torch.cuda.is_initialized()
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        name = torch.cuda.get_device_name()
        return untouched, torch.cuda.device_count(), name, os.environ.get("CUDA_VISIBLE_DEVICES")

    untouched, count, name, visible = run(-1, main)
    require(untouched, "CUDA was initialized before main")
    require(count == gpu_count(), f"main sees {count} GPUs of {gpu_count()}")
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    try:
        _, count, _, visible = run(-1, main)
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    require((count, visible) == (1, "0"), f"CUDA_VISIBLE_DEVICES={visible} gives {count} GPUs")
    return f"{name}; CUDA untouched before main; CUDA_VISIBLE_DEVICES is kept"


def memory_is_freed() -> str:
    require_gpus(1)

    def main(gib: int) -> tuple[int, str]:
        held = torch.empty(gib << 30, dtype=torch.uint8, device="cuda")
        try:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            return held.numel() >> 30, str(error).partition(".")[0]
        return 0, ""

    before = used_mib()
    gib, refused = run(-1, main, gib=2)
    deadline = time.monotonic() + 10
    while (after := used_mib()) > before + 50 and time.monotonic() < deadline:
        time.sleep(0.2)
    require(gib == 2 and "out of memory" in refused, "an allocation of 1 PiB was not refused")
    require(after <= before + 50, f"{before} MiB used before the run, {after} MiB after it")
    require(not torch.cuda.is_initialized(), "the driver has initialized CUDA")
    return f"{gib} GiB held by a rank are free after the run; the driver holds none"


def horovod_trains(np: int, device: str) -> str:
    require_horovod()

    def main(device: str) -> tuple[float, float, float]:
        import horovod.torch as hvd

        hvd.init()
        where = f"cuda:{hvd.local_rank()}" if device == "cuda" else "cpu"
        torch.manual_seed(2)
        model: Any = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Linear(16 * 32 * 32, 10),
        ).to(where)  # fmt: skip
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        x, y = torch.randn(64, 3, 32, 32, device=where), torch.arange(64, device=where) % 10
        losses, began = [], 0.0
        for step in range(22):
            if step == 2:  # the first ones load what they need
                began = time.monotonic()
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], losses[-1], (time.monotonic() - began) / 20

    first, last, seconds = run(np, main, device=device)
    require(last < first, f"the loss went from {first} to {last}")
    return (
        f"{-np} ranks on {device}: loss {first:.2f} to {last:.2f}, {1000 * seconds:.1f} ms a step"
    )


def results_and_checkpoints_travel(device: str) -> str:
    def main(device: str) -> torch.Tensor:
        tensor = torch.arange(1 << 20, device=device)
        with checkpoint.save(step=1) as directory:
            torch.save({"tensor": tensor}, directory / "state.pt")
        return tensor.cpu()

    def restored(device: str) -> float:
        latest = checkpoint.latest()
        assert latest is not None  # noqa: S101 - the run before has saved one
        return float(torch.load(latest / "state.pt", map_location=device)["tensor"].sum())

    with tempfile.TemporaryDirectory() as kept:
        result = HorovodRunner(np=-1, checkpoint_dir=kept).run(main, device=device)
        total = HorovodRunner(np=-1, checkpoint_dir=kept).run(restored, device=device)
    require(total == float(result.sum()), "the checkpoint has another tensor than the result")
    return f"a tensor on {device} as result (moved to the CPU) and in a checkpoint"


def checks() -> dict[str, Callable[[], str]]:
    several = -min(2, gpu_count()) if gpu_count() else -2
    found = {
        "allreduce, one rank": lambda: horovod_reduces(-1, DEVICE),
        "allreduce, two ranks beside each other": lambda: horovod_reduces(-2, "cpu"),
        "training step": lambda: horovod_trains(several, DEVICE),
        "DistributedDataParallel": lambda: torch_trains_with_ddp(several, DEVICE),
        "DistributedDataParallel, two ranks on CPUs": lambda: torch_trains_with_ddp(-2, "cpu"),
        "device choice": main_finds_its_gpu,
        "memory": memory_is_freed,
        "results and checkpoints": lambda: results_and_checkpoints_travel(DEVICE),
    }
    if gpu_count() > 1:  # NCCL takes no two ranks on one GPU
        found["allreduce, a GPU for each rank"] = lambda: horovod_reduces(several, DEVICE)
    return found


def main() -> int:
    """Run every check, print the report, and return how many failed."""
    rows, failed = [], 0
    for name, check in checks().items():
        began = time.monotonic()
        try:
            outcome = check()
        except Skipped as reason:
            outcome = f"skipped: {reason}"
        except (AssertionError, HorovodRunnerError) as error:
            outcome = f"**failed**: {str(error).splitlines()[0]}"
            failed += 1
        rows.append(f"| {name} | {outcome} | {time.monotonic() - began:.0f} s |")
        print(rows[-1], flush=True)
    print(
        f"\nPython {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}\n"
    )
    print("\n".join(["| what | seen | took |", "| --- | --- | --- |", *rows]))
    return failed


if __name__ == "__main__":
    sys.exit(main())
