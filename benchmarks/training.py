"""Training steps a second, under HorovodRunner and under the bare horovodrun command.

One fixed network (seeded, 9 MB of gradients) on two ranks with hvd.DistributedOptimizer, on
processors, one thread a rank. Each way runs the same file's code, and each rank takes the median
of its steps' seconds, so that a slow moment of the machine counts once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.cluster import session
from benchmarks.report import Case, Figures, interleaved
from horovodrunner import HorovodRunner

SIZE = 2
STEPS = 200
WARM = 20
THREADS = {"OMP_NUM_THREADS": "1"}

_TRAIN = f"""
def train():
    import statistics
    import time

    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.manual_seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(512, 1024),
        torch.nn.ReLU(),
        torch.nn.Linear(1024, 1024),
        torch.nn.ReLU(),
        torch.nn.Linear(1024, 512),
        torch.nn.ReLU(),
        torch.nn.Linear(512, 10),
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), named_parameters=model.named_parameters()
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    inputs, labels = torch.randn(64, 512), torch.randint(0, 10, (64,))
    seconds = []
    for _ in range({WARM + STEPS}):
        began = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    threads = torch.get_num_threads()
    assert threads == 1, threads
    return statistics.median(seconds[{WARM}:])
"""


def _train() -> Callable[[str], float]:
    def main(code: str) -> float:
        names: dict[str, Callable[[], float]] = {}
        exec(code, names)
        return names["train"]()

    return main


def horovod_runner(np: int) -> float:
    """Train under HorovodRunner.

    Parameters
    ----------
    np
        As it takes it.

    Returns
    -------
    float
        Steps a second.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return 1 / float(HorovodRunner(np=np).run(_train(), code=_TRAIN))


def _horovodrun() -> float:
    with tempfile.TemporaryDirectory() as directory:
        script, result = Path(directory, "train.py"), Path(directory, "result.json")
        script.write_text(
            f"{_TRAIN}\n\nimport horovod.torch as hvd, json, pathlib\nseconds = train()\n"
            "if hvd.rank() == 0:\n"
            f"    pathlib.Path({str(result)!r}).write_text(json.dumps(seconds))\n"
        )
        command = [str(Path(sys.executable).with_name("horovodrun")), "-np", str(SIZE), "--gloo"]
        subprocess.run(
            [*command, sys.executable, str(script)],
            check=True,
            capture_output=True,
            env={**os.environ, **THREADS},
        )
        return 1 / float(json.loads(result.read_text()))


def measure(rounds: int) -> Case:
    """Measure all ways in turn.

    Parameters
    ----------
    rounds
        How often each is measured.

    Returns
    -------
    Case
        The table.
    """
    os.environ.update(THREADS)
    spark = session()
    ways: dict[str, Callable[[], float]] = {
        "horovodrun": _horovodrun,
        "np=2": lambda: horovod_runner(SIZE),
        "np=-2": lambda: horovod_runner(-SIZE),
    }
    values = interleaved(ways, rounds)
    spark.stop()
    lines = [Figures(name, "steps/s", values[name], "horovodrun") for name in ways]
    title = f"a torch network of 9 MB on two ranks, median of {STEPS} steps"
    return Case("training", title, lines)
