"""Memory and load time of a PyTorch model in 1, 2 and 4 Python workers of Spark's.

The ways, interleaved:

- ``imports``: only imports torch, for comparison;
- ``ours``: :class:`horovodrunner.inference.Model`, whose weights are there once;
- ``predict_batch_udf``: Spark's, with a function that reads a file with ``torch.load``;
- ``broadcast``: a broadcast ``state_dict`` and ``load_state_dict``, as people write it by hand.

Every figure is from a session of its own. Memory is the sum of the Python workers' proportional
set size (PSS) after they have predicted, so what they share counts once. Sent: seconds on the
driver. Loaded: seconds in the slowest Python worker.
Run it with ``.venv/bin/python -m benchmarks.weights --rounds 3 --json weights.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 3600
LAYERS = 4
WAYS = ("imports", "ours", "predict_batch_udf", "broadcast")
WORKERS = (1, 2, 4)


def network() -> Any:
    """About 200 MB of weights."""
    import torch

    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def timed_load(load: Callable[[], Any], directory: str, workers: int) -> Any:
    """Load in all Python workers at once, and write down how long it took in this one."""
    import torch

    torch.set_num_threads(1)
    Path(directory, f"{os.getpid()}.ready").touch()
    while len(list(Path(directory).glob("*.ready"))) < workers:
        time.sleep(0.01)
    began = time.perf_counter()
    predict = load()
    seconds = time.perf_counter() - began
    predict(np.ones((2, WIDTH), np.float32))  # every weight is needed once
    Path(directory, f"{os.getpid()}.loaded").write_text(str(seconds))
    return predict


def predictor(net: Any) -> Callable[[Any], Any]:
    import torch

    def predict(inputs: Any) -> Any:
        with torch.inference_mode():
            return net(torch.from_numpy(inputs)).numpy()[:, 0]

    return predict


def measure(way: str, workers: int) -> dict[str, float]:
    """Use the model one way, in this process's own session."""
    import pyarrow as pa
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import array_repeat, lit
    from pyspark.sql.types import FloatType

    spark = (
        SparkSession.builder.master(f"local[{workers}]")
        .config("spark.driver.memory", "3g")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )
    import torch

    net = network().eval()
    rows = spark.range(0, workers, 1, workers)
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/model.pt"
        began = time.perf_counter()
        load: Callable[[], Any]
        if way == "imports":

            def load() -> Any:
                return lambda inputs: inputs[:, 0]

        elif way == "ours":
            from horovodrunner.inference import loading
            from horovodrunner.inference.model import Model

            handle = Model.from_torch(net).handle(spark)

            def load() -> Any:
                return loading.load(handle)

        elif way == "predict_batch_udf":
            torch.save(net.state_dict(), path)

            def load() -> Any:
                made = network()
                made.load_state_dict(torch.load(path))
                return predictor(made)

        else:
            sent_state = spark.sparkContext.broadcast(net.state_dict())

            def load() -> Any:
                made = network()
                made.load_state_dict(sent_state.value)
                return predictor(made)

        sent = time.perf_counter() - began

        def in_worker() -> Any:
            return timed_load(load, directory, workers)

        if way == "predict_batch_udf":
            score = predict_batch_udf(
                in_worker, return_type=FloatType(), batch_size=2, input_tensor_shapes=[[WIDTH]]
            )
            rows.select(score(array_repeat(lit(1.0).cast("float"), WIDTH))).collect()
        else:

            def score_batches(batches: Iterator[Any]) -> Iterator[Any]:
                predict = in_worker()
                for batch in batches:
                    values = predict(np.ones((len(batch), WIDTH), np.float32))
                    values = values.reshape(len(batch), -1)[:, 0]
                    yield pa.RecordBatch.from_pydict({"value": values})

            rows.mapInArrow(score_batches, "value float").collect()
        loaded = {each.stem: float(each.read_text()) for each in Path(directory).glob("*.loaded")}
        assert len(loaded) == workers
        memory = sum(proportional_bytes(int(process)) for process in loaded)
        spark.stop()
    return {"memory": memory / 2**20, "sent": sent, "loaded": max(loaded.values())}


def proportional_bytes(process: int) -> int:
    """What a process has in memory; of what it shares, its share."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, workers = arguments.measure
        print(json.dumps(measure(way, int(workers))))
        return
    figures: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for workers in arguments.workers:
            for way in WAYS:
                command = [sys.executable, "-m", "benchmarks.weights", "--measure", way]
                done = subprocess.run(
                    [*command, str(workers)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    check=True,
                    env={**os.environ, "PYSPARK_PYTHON": sys.executable},
                )
                found = json.loads(done.stdout.splitlines()[-1])
                figures.setdefault(f"{workers} {way}", []).append(found)
    size = LAYERS * (WIDTH + 1) * WIDTH * 4 / 2**20
    print(f"{size:.0f} MiB of weights, medians of {arguments.rounds} rounds")
    print(f"  {'Python workers':<36}{'memory, MiB':>14}{'sent, s':>10}{'loaded, s':>11}")
    for name, rounds in figures.items():
        memory, sent, loaded = (
            statistics.median(each[key] for each in rounds) for key in ("memory", "sent", "loaded")
        )
        print(f"  {name:<36}{memory:>14,.0f}{sent:>10.2f}{loaded:>11.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
