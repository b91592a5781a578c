"""Check what needs a GPU, and print rows for docs/compatibility.md. Runs in: the command line.

scripts/gpu_check.sh prepares a machine for it. Runs have np < 0, so neither Spark nor Java is
needed. Without a GPU the same code runs on the CPU where it can, and the rest is skipped.
"""
# ruff: noqa: D103, T201

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from horovodrunner import HorovodRunner, HorovodRunnerError, artifacts, checkpoint

# Without torch.cuda: the driver is not to touch the GPU.
DEVICE = "cuda" if torch.version.cuda and shutil.which("nvidia-smi") else "cpu"


def gpu_count() -> int:
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return len(subprocess.check_output(query, text=True).split()) if DEVICE == "cuda" else 0


def used_mib() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(int, subprocess.check_output(query, text=True).split()))


def gpu_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.check_output(query, text=True).splitlines()[0]


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


def gpu_tensors_come_back() -> str:
    require_gpus(1)

    def main() -> tuple[Any, str]:
        torch.manual_seed(3)
        net = torch.nn.Linear(1024, 1024, device="cuda")
        net.register_buffer("tied", net.weight.detach()[1:])
        net.register_buffer("empty", torch.zeros(0, device="cuda"))
        return net, str(net.weight.sum().item())

    net, total = run(-1, main)
    require(str(net.weight.sum().item()) == total, "the weights came back as others")
    require(net.empty.device == net.weight.device, "an empty tensor came back elsewhere")
    net.tied.zero_()
    require(not net.weight[1:].any(), "memory that was shared is not shared any more")
    device = str(net.weight.device)
    without = (
        "import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''; from scripts.gpu_check import *; "
    )
    code = without + "net = run(-1, on_a_gpu); print('DEVICE', net.weight.device)"
    environ = {name: v for name, v in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False
    )
    require("DEVICE cpu" in done.stdout, f"a driver without GPUs: {done.stderr[-300:]}")
    return f"a model on {device} comes back there, and on the CPU of a driver that sees no GPU"


def on_a_gpu() -> Any:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # the driver's
    return torch.nn.Linear(4, 4, device="cuda")


def warm_workers_use_the_gpu() -> str:
    require_gpus(1)

    def main() -> float:
        return float(torch.ones(8, device="cuda").sum())

    runner = HorovodRunner(np=-1, keep_warm=True)
    took = []
    for _ in range(3):
        began = time.monotonic()
        require(runner.run(main) == 8.0, "another sum")
        took.append(time.monotonic() - began)
    return "runs of " + ", ".join(f"{seconds:.2f} s" for seconds in took) + ", forked workers"


def failures_are_told() -> str:
    require_gpus(1)

    def asserts_on_the_device() -> None:
        torch.arange(4, device="cuda")[torch.tensor([9], device="cuda")].sum().item()

    def takes_too_much() -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    def wants_another_gpu() -> None:
        torch.cuda.set_device(torch.cuda.device_count())

    told = []
    for main in (asserts_on_the_device, takes_too_much, wants_another_gpu):
        try:
            run(-1, main)
        except HorovodRunnerError as error:
            told.append(str(error).splitlines()[0])
            require(main.__name__ in str(error), f"no source line of main: {error}")
        else:
            raise AssertionError(f"{main.__name__} did not fail")
    return "<br>".join(text[:160] for text in told)


def preflight_names_the_gpu() -> str:
    require_gpus(1)

    def with_torch() -> float:
        torch.distributed.init_process_group("nccl")
        torch.cuda.set_device(0)
        x = torch.ones(4, device="cuda")
        torch.distributed.all_reduce(x)
        total = float(x.sum())
        torch.distributed.destroy_process_group()
        return total

    def with_horovod() -> float:
        import horovod.torch as hvd

        hvd.init()
        return float(hvd.allreduce(torch.ones(4, device="cuda"), op=hvd.Sum).sum())

    names = []
    mains = [with_torch, *([with_horovod] if importlib.util.find_spec("horovod") else [])]
    for main in mains:
        with tempfile.TemporaryDirectory() as kept:
            runner = HorovodRunner(np=-1, preflight=True, run_dir=kept)
            require(runner.run(main) == 4.0, "another sum")
            log = [*Path(str(runner.record)).rglob("*.log")]
            lines = [line for each in log for line in each.read_text().splitlines()]
            names += [line for line in lines if gpu_name() in line][:1]
    return "; ".join(names) or "no file of the record names the GPU; its notes do"


def two_ranks_on_one_gpu_are_told() -> str:
    require_horovod()
    require_gpus(1)

    def main() -> float:
        import horovod.torch as hvd

        hvd.init()
        torch.cuda.set_device(0)
        return float(hvd.allreduce(torch.ones(4, device="cuda"), op=hvd.Sum).sum())

    try:
        return f"the sum is {run(-2, main)}"
    except HorovodRunnerError as error:
        return f"refused by NCCL: {str(error).splitlines()[0]}"


def other_collectives(device: str) -> str:
    require_horovod()

    def main(device: str) -> list[str]:
        import horovod.torch as hvd

        hvd.init()
        x = torch.arange(8.0, device=device)
        seen = {
            "fp16": hvd.allreduce(x, op=hvd.Sum, compression=hvd.Compression.fp16),
            "int64": hvd.allreduce(x.long(), op=hvd.Sum),
            "grouped": hvd.grouped_allreduce([x, x], op=hvd.Sum)[1],
            "allgather": hvd.allgather(x),
            "broadcast": hvd.broadcast(x, root_rank=0),
            "alltoall": hvd.alltoall(x, splits=None),
            "reducescatter": hvd.reducescatter(x, op=hvd.Sum),
        }
        seen["alltoall"] = (
            seen["alltoall"][0] if isinstance(seen["alltoall"], tuple) else seen["alltoall"]
        )
        wrong = [name for name, y in seen.items() if not torch.equal(y.float(), x)]
        return [*seen, *(f"WRONG {name}" for name in wrong)]

    seen = run(-1, main, device=device)
    require(not any(name.startswith("WRONG") for name in seen), str(seen))
    return ", ".join(seen)


def use_and_traces_are_recorded() -> str:
    require_gpus(1)

    def main(seconds: float) -> None:
        x = torch.randn(4096, 4096, device="cuda")
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            (x @ x).sum().item()
        with artifacts.torch_profiler(wait=0, warmup=0, active=1) as profiler:
            (x @ x).sum().item()
            profiler.step()

    with tempfile.TemporaryDirectory() as kept:
        runner = HorovodRunner(np=-1, run_dir=kept)
        runner.run(main, seconds=13.0)
        record = Path(str(runner.record))
        uses = [json.loads(line) for line in (record / "usage.jsonl").read_text().splitlines()]
        busy = [gpu for use in uses for gpu in use.get("gpus", ())]
        files = runner.artifacts
        traces = [] if files is None else [*files.rglob("trace-*.json")]
        kernels = sum(trace.read_text().count('"cat": "kernel"') for trace in traces)
        page = (record / "report.html").read_text()
    require(bool(busy), f"no GPU in usage.jsonl: {uses[:1]}")
    require(kernels > 0, f"no kernels in {traces}")
    return f"use {busy[-1]}; {kernels} kernels in the trace; {len(page) // 1000} kB of report"


def lightning_trains() -> str:
    require_gpus(1)
    if importlib.util.find_spec("lightning") is None:
        raise Skipped("lightning is not installed")

    def main() -> tuple[str, float]:
        import lightning

        class Net(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(8, 1)

            def training_step(self, batch: Any, _: int) -> Any:
                loss = (self.layer(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
                self.last = float(loss)
                return loss

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.05)

        net = Net()
        data = torch.utils.data.TensorDataset(torch.randn(256, 8))
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="gpu", devices=1, strategy="ddp", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(net, torch.utils.data.DataLoader(data, 32))
        return type(trainer.strategy).__name__, net.last

    strategy, loss = run(-1, main)
    require(loss < 1.0, f"the loss is {loss}")
    return f"Trainer with {strategy}, loss {loss:.3f}"


def compiled_model_trains() -> str:
    require_gpus(1)

    def main() -> tuple[float, float]:
        torch.manual_seed(4)
        net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
        net = torch.compile(net.cuda())
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        x = torch.randn(512, 64, device="cuda")
        losses = []
        for _ in range(30):
            with torch.autocast("cuda", torch.bfloat16):
                loss = (net(x) - x.sum(1, keepdim=True)).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], losses[-1]

    first, last = run(-1, main)
    require(last < first, f"the loss went from {first} to {last}")
    return f"torch.compile and bfloat16: loss {first:.1f} to {last:.1f}"


def predicts_on_the_gpu() -> str:
    require_gpus(1)

    def main() -> float:
        import numpy

        from horovodrunner.inference.devices import Device
        from horovodrunner.inference.predictors import torch_predictor

        torch.manual_seed(5)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten())
        x = numpy.random.default_rng(1).normal(size=(64, 3, 16, 16)).astype("float32")
        on_cpu = torch_predictor(net, False, device=Device(None, 0))(x)
        on_gpu = torch_predictor(net, False, device=Device(0, 0))(x)
        return float(numpy.abs(on_cpu - on_gpu).max())

    difference = run(-1, main)
    require(difference < 1e-2, f"the predictions differ by {difference}")
    return f"predictions differ from the CPU's by at most {difference:.1e}"


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
        "tensors on a GPU as results": gpu_tensors_come_back,
        "other collectives, one rank": lambda: other_collectives(DEVICE),
        "two ranks on one GPU": two_ranks_on_one_gpu_are_told,
        "preflight": preflight_names_the_gpu,
        "failures": failures_are_told,
        "warm workers": warm_workers_use_the_gpu,
        "inference": predicts_on_the_gpu,
        "torch.compile": compiled_model_trains,
        "Lightning": lightning_trains,
        "use and traces in the record": use_and_traces_are_recorded,
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
        except Exception as error:  # noqa: BLE001 - the others are to be tried, too
            print(error, flush=True)
            outcome = f"**failed**: {(str(error) or repr(error)).splitlines()[0]}"
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
