"""How long save_torch(asynchronous=True) holds main, beside a bare copy of the same bytes.

Two ranks hold a model of FSDP2, ``MEBIBYTES`` each, in memory of the CPU:

- ``bare copy``: every local tensor is cloned, one after the other, and nothing else;
- ``held``: the call of save_torch(asynchronous=True);
- ``no bytes``: the same call with as many tensors of a few elements each, in milliseconds: what it
  takes beyond the copy, which varies by more than that from one copy to the next;
- ``no bytes, 2000 tensors``: the same with so many, for large models;
- ``written``: from then on until the files are written, in the background.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.report import Case, Figures
from horovodrunner import HorovodRunner

RANKS = 2
MEBIBYTES = 256
LAYERS = 16


def saving() -> Callable[..., dict[str, list[float]]]:
    """Return a main that measures on rank 0; it travels by value."""
    layers, width, ranks = LAYERS, 1024, RANKS
    rows = MEBIBYTES * 2**20 * ranks // (4 * width * layers)

    def model_of(width: int, rows: int, layers: int = layers) -> Any:
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = torch.nn.Sequential(*(torch.nn.Linear(width, rows) for _ in range(layers)))
        return fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))

    def main(repeat: int) -> dict[str, list[float]]:
        import time

        import torch
        import torch.distributed as dist

        from horovodrunner import checkpoint

        dist.init_process_group("gloo")
        torch.set_num_threads(1)
        model, small, many = (
            model_of(width, rows),
            model_of(ranks, ranks),
            model_of(ranks, ranks, 1000),
        )
        names = ("bare copy", "held", "no bytes", "no bytes, 2000 tensors", "written")
        found: dict[str, list[float]] = {name: [] for name in names}
        for step in range(-1, repeat):  # the first round warms up
            dist.barrier()
            began = time.perf_counter()
            copies = [p.detach().to_local().clone() for p in model.parameters()]
            copied = time.perf_counter()
            del copies
            dist.barrier()
            called = time.perf_counter()
            checkpoint.save_torch(3 * step + 3, asynchronous=True, model=model)
            left = time.perf_counter()
            checkpoint.wait()
            written = time.perf_counter()
            dist.barrier()
            empty = []
            for number, other in enumerate((small, many)):
                called_again = time.perf_counter()
                checkpoint.save_torch(3 * step + 4 + number, asynchronous=True, model=other)
                empty.append(1000 * (time.perf_counter() - called_again))
                checkpoint.wait()
            figures = (copied - began, left - called, *empty, written - left)
            if step >= 0:
                for name, figure in zip(names, figures, strict=True):
                    found[name].append(figure)
        dist.barrier()
        dist.destroy_process_group()
        return found

    return main


def measure(rounds: int) -> Case:
    """Measure both in turn.

    Parameters
    ----------
    rounds
        How many checkpoints.

    Returns
    -------
    Case
        The table.
    """
    folder = os.environ.get("BENCHMARK_DIRECTORY")
    with (
        tempfile.TemporaryDirectory(dir=folder) as directory,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        runner = HorovodRunner(np=-RANKS, checkpoint_dir=directory, keep_checkpoints=1)
        values = runner.run(saving(), repeat=rounds)
    lines = [
        Figures(name, "ms", figures)
        if name.startswith("no bytes")
        else Figures(name, "s", figures, "bare copy")
        for name, figures in values.items()
    ]
    title = f"saving {MEBIBYTES} MiB of each of {RANKS} ranks asynchronously"
    return Case("sharded", title, lines)
