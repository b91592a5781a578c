"""Train a small CNN on handwritten digits: HorovodRunner(np=2) on a two-executor Spark cluster.

The digits are 1797 real scans of 8 x 8 pixels that ship with scikit-learn. Everything below
`main` is what one would write for a single process, plus the four Horovod lines marked so.
Run it with `make demo`, or `python examples/digits.py`.
"""

import os
import sys
import time

import numpy as np
import torch
from pyspark.sql import SparkSession
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from horovodrunner import HorovodRunner, log_to_driver


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return three quarters of the scans to train on and a held-out quarter to test with."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = (torch.from_numpy(part) for part in parts)
    return TensorDataset(x_train, y_train), TensorDataset(x_test, y_test)


def build_model() -> nn.Module:
    """Build the CNN: two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(32 * 4 * 4, 10),
    )


def main(epochs: int, batch_size: int, learning_rate: float) -> dict[str, torch.Tensor]:
    """Train on this rank's shard and give back the model's weights."""
    import horovod.torch as hvd

    hvd.init()  # Horovod: learn rank and size
    torch.manual_seed(0)
    torch.set_num_threads(1)  # one core per slot
    train_set, _ = digits()
    sampler = DistributedSampler(train_set, num_replicas=hvd.size(), rank=hvd.rank(), seed=0)
    loader = DataLoader(train_set, batch_size=batch_size, sampler=sampler)
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())  # Horovod: average
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)  # Horovod: start from equal weights
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / len(loader):.4f} on {len(sampler)} scans")
    mean = hvd.allreduce(torch.tensor(total / len(loader)), name="loss")  # Horovod: mean of ranks
    if hvd.rank() == 0:
        log_to_driver(f"final loss, averaged over {hvd.size()} ranks: {mean.item():.4f}")
    return model.state_dict()


def start_spark() -> SparkSession:
    """Start a cluster of two executor JVMs with one core each on this machine."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    fast_start = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # these JVMs live for seconds
    return (
        SparkSession.builder.master("local-cluster[2,1,1024]")
        .appName("horovodrunner demo")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.log.level", "ERROR")
        .config("spark.driver.extraJavaOptions", fast_start)
        .config("spark.executor.extraJavaOptions", fast_start)
        .getOrCreate()
    )


def accuracy(weights: dict[str, torch.Tensor]) -> float:
    """Test the model that came back, here on the driver."""
    model = build_model()
    model.load_state_dict(weights)
    model.eval()
    _, test_set = digits()
    images, labels = test_set.tensors
    with torch.no_grad():
        return (model(images).argmax(dim=1) == labels).float().mean().item()


if __name__ == "__main__":
    began = time.monotonic()
    spark = start_spark()
    try:
        session_ready = time.monotonic()
        runner = HorovodRunner(np=2, driver_log_verbosity="all")
        weights = runner.run(main, epochs=12, batch_size=32, learning_rate=0.003)
        trained = time.monotonic()
        score = accuracy(weights)
        tested = time.monotonic()
    finally:
        spark.stop()
    stopped = time.monotonic()
    print(f"accuracy on the held-out quarter, computed on the driver: {score:.4f}")
    if score < 0.95:
        sys.exit(f"the accuracy {score:.4f} is below 0.95: something is wrong")
    phases = {
        "Spark session": session_ready - began,
        "HorovodRunner.run": trained - session_ready,
        "test": tested - trained,
        "Spark's end": stopped - tested,
        "together": stopped - began,
    }
    print(", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in phases.items()))
