"""Reads numeric rows with Mosaic Streaming, in an environment of its own; see benchmarks/data.py.

Run as a program: ``mosaic.py DIRECTORY ROWS``. It writes random rows once; then it answers each
line on its standard input, the number of loader processes, with a line of JSON: rows a second.
"""

from __future__ import annotations

import json
import sys
import time
import types

import numpy as np
from torch.utils.data import DataLoader

# the images' part needs torchvision, whose plain wheel does not load beside a torch without CUDA
sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
from streaming import MDSWriter, StreamingDataset, __version__  # noqa: E402


def write(directory: str, rows: int) -> None:
    """Write rows of 32 float32 and a label."""
    numbers = np.random.default_rng(0).random((rows, 32), np.float32)
    columns = {"features": "ndarray:float32:32", "label": "int64"}
    with MDSWriter(out=directory, columns=columns) as writer:
        for number in range(rows):
            writer.write({"features": numbers[number], "label": number % 10})


def rate(directory: str, workers: int) -> float:
    """Return the rows a second of an epoch in random order, batches of 256."""
    rows = StreamingDataset(local=directory, shuffle=True, batch_size=256)
    began = time.perf_counter()
    count = sum(len(batch["label"]) for batch in DataLoader(rows, 256, num_workers=workers))
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"mosaicml-streaming": __version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(rate(sys.argv[1], int(line))), flush=True)
