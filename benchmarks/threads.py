"""What it costs when ranks on one machine start a thread for every core each.

Trains a small convolutional network on two ranks of this machine, interleaved:

- ``own``: as the package does it, each rank with its share of the cores (``OMP_NUM_THREADS``);
- ``all``: each rank with a thread for every core, which is what the frameworks do by themselves.

Prints the milliseconds of a training step, medians of all steps, and their ratio.
Run it with ``.venv/bin/python -m benchmarks.threads --ranks 2 --repeat 5``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

from horovodrunner import HorovodRunner


def train(steps: int) -> list[float]:
    """Return the milliseconds of each step after the first ones, gradients averaged."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = [torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU()]
    layers += [torch.nn.Conv2d(32, 32, 3), torch.nn.ReLU(), torch.nn.Flatten()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(32 * 28 * 28, 10))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters()
    )
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        times.append((time.perf_counter() - began) * 1000)
    return times[5:]


def with_threads(threads: int | None) -> Callable[[int, int], list[float]]:
    """Return a function that trains with so many threads a rank; None for the package's choice."""

    def run(ranks: int, steps: int) -> list[float]:
        os.environ.pop("OMP_NUM_THREADS", None)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        times: list[float] = HorovodRunner(np=-ranks).run(train, steps=steps)
        return times

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    ways = {"own": with_threads(None), "all": with_threads(cores)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeat):
        for name, run in ways.items():
            times[name] += run(arguments.ranks, arguments.steps)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{arguments.ranks} ranks on {cores} cores, median of a step:")
    for name, median in medians.items():
        print(f"  {name}: {median:.1f} ms")
    print(f"  all / own: {medians['all'] / medians['own']:.2f}")


if __name__ == "__main__":
    main()
