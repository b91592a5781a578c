"""The data layer beside other ways to read the same rows, interleaved in one run.

The cases, of which ``--cases`` chooses some:

- ``numeric``: rows of 32 float32 and a label in batches of 256, in stored and in random order,
  beside a memory-mapped Arrow file (the ceiling), ``pyarrow.dataset``, a random gather from one
  NumPy array, and Mosaic Streaming if its environment is there (``--mosaic`` makes it);
- ``images``: JPEGs of about 10 KB, beside decoding the same bytes with nothing else to do;
- ``first``: the time to the first batch in a process that has imported torch;
- ``waiting``: how long the demo's training loop waits for its batches;
- ``memory``: what a process that reads a shuffled epoch holds, for tables of different sizes;
- ``shuffle``: how far apart rows come that were neighbours in the table;
- ``spark``: storing a DataFrame beside ``df.write.parquet``, memory of the processes that do it,
  and TorchDistributor's own (private) way to read a DataFrame.

Prints medians of all rounds, and ratios that are medians of the rounds' ratios.
Run it with ``.venv/bin/python -m benchmarks.data --rows 10000000 --rounds 5 --json data.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from horovodrunner import data
from horovodrunner.data.dataset import SHUFFLE_WINDOW
from horovodrunner.data.order import EpochOrder
from horovodrunner.data.writing import BLOCK_BYTES, REPORT_SCHEMA, write_rows

WIDTH = 32
ROW_BYTES = 4 * WIDTH + 8
BLOCK_ROWS = BLOCK_BYTES // ROW_BYTES
BATCH = 256
MOSAIC = Path("build", "mosaic")
CASES = ("numeric", "images", "first", "waiting", "memory", "shuffle", "spark")

Way = Callable[[], Iterable[Any]]
Figures = dict[str, Any]
_barrier: Any = None


# ---- measuring


def rate(way: Way, rows_of: Callable[[Any], int], most_seconds: float) -> float:
    """Return rows a second; the slow ones are stopped when the time is up."""
    began = time.perf_counter()
    rows = 0
    batches = iter(way())
    while some := list(itertools.islice(batches, 16)):
        rows += sum(map(rows_of, some))
        if time.perf_counter() - began > most_seconds:
            break
    seconds = time.perf_counter() - began
    if hasattr(batches, "close"):
        batches.close()
    return rows / seconds


def interleaved(
    ways: dict[str, Callable[[], float]], rounds: int, beside: dict[str, str]
) -> Figures:
    """Run every way once a round, and print medians and ratios to others."""
    values: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            values[name].append(run())
    figures: Figures = {}
    for name, each in values.items():
        figures[name] = {"median": statistics.median(each), "each": each}
        text = f"  {name:<34}{figures[name]['median']:>14,.0f}"
        if other := beside.get(name):
            ratios = [a / b for a, b in zip(each, values[other], strict=True)]
            figures[name]["ratio"] = statistics.median(ratios)
            figures[name]["beside"] = other
            text += f"   {figures[name]['ratio']:>8.2f} x {other}"
        print(text, flush=True)
    return figures


def in_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function in so many fresh processes at once, with each one's number as well."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    with ProcessPoolExecutor(count, context, _set_barrier, (barrier,)) as pool:
        running = [pool.submit(function, number, *arguments) for number in range(count)]
        return [each.result() for each in running]


def _set_barrier(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def anonymous_memory() -> int:
    """Return the bytes of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024


# ---- the rows


def write_numbers(path: Path, rows: int) -> None:
    """Write random rows as an Arrow file, in blocks as large as those of a data set."""
    random = np.random.default_rng(0)
    number_list = pa.list_(pa.float32(), WIDTH)
    schema = pa.schema([("features", number_list), ("label", pa.int64())])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as sink:
        for start in range(0, rows, BLOCK_ROWS):
            count = min(BLOCK_ROWS, rows - start)
            numbers = pa.array(random.random(count * WIDTH, np.float32))
            features = pa.FixedSizeListArray.from_arrays(numbers, WIDTH)
            labels = pa.array(random.integers(0, 10, count))
            sink.write(pa.record_batch([features, labels], schema=schema))


def mapped(path: Path) -> pa.Table:
    """Open an Arrow file without reading it."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def numbers_of(batch: Any) -> tuple[Any, Any]:
    """Return the two columns of an Arrow batch as NumPy arrays, nothing copied."""
    features, labels = batch.column("features"), batch.column("label")
    start, count = features.offset * WIDTH, len(features) * WIDTH
    numbers = features.values.slice(start, count).to_numpy().reshape(-1, WIDTH)
    return numbers, labels.to_numpy()


# ---- numeric


def ceiling(path: Path, convert: Callable[[Any], Any]) -> Iterator[Any]:
    """Slice the blocks of a mapped file: nothing can hand out these batches with less to do."""
    source = pa.ipc.open_file(pa.memory_map(str(path)))
    for number in range(source.num_record_batches):
        features, labels = map(convert, numbers_of(source.get_batch(number)))
        for start in range(0, len(labels), BATCH):
            end = start + BATCH
            yield {"features": features[start:end], "label": labels[start:end]}


def scan(path: Path, kind: str) -> Iterator[Any]:
    """Let pyarrow.dataset make the batches."""
    source = pyarrow.dataset.dataset(path, format=kind)
    for batch in source.to_batches(batch_size=BATCH):
        features, labels = numbers_of(batch)
        yield {"features": features, "label": labels}


def gather(features: Any, labels: Any, order: Any) -> Iterator[Any]:
    """Take random rows of arrays that are in memory as a whole."""
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        yield {"features": features.take(chosen, axis=0), "label": labels.take(chosen)}


def length(batch: Any) -> int:
    """Count a batch's rows, and look at none."""
    return len(batch["label"])


def length_and_sum(batch: Any) -> int:
    """Count a batch's rows, and read all its numbers."""
    batch["features"].sum()
    return len(batch["label"])


def half(rank: int, numbers: data.DataSet, shuffle: bool, seconds: float) -> tuple[float, int]:
    """Read one of two ranks' parts at the same time as the other one."""
    batches = numbers.torch(BATCH, shuffle=shuffle, rank=rank, size=2)
    batches.first()
    _barrier.wait()
    return rate(lambda: batches, length_and_sum, seconds), len(batches)


def numeric(options: argparse.Namespace, directory: Path) -> Figures:
    """Measure how many rows a second each way hands out."""
    import torch

    torch.set_num_threads(1)
    source, parquet = directory / "numbers.arrow", directory / "numbers.parquet"
    write_numbers(source, options.rows)
    pyarrow.parquet.write_table(mapped(source).slice(0, 10**6), parquet, BLOCK_ROWS)
    began = time.perf_counter()
    numbers = data.from_arrow(mapped(source), directory)
    print(f"  from_arrow: {options.rows / (time.perf_counter() - began):,.0f} rows a second")
    features = np.empty((options.rows, WIDTH), np.float32)
    labels = np.empty(options.rows, np.int64)
    at = 0
    for batch in mapped(source).to_batches():
        features[at : at + len(batch)], labels[at : at + len(batch)] = numbers_of(batch)
        at += len(batch)
    order = np.random.default_rng(1).permutation(options.rows)

    def same(value: Any) -> Any:
        return value

    handed: dict[str, Way] = {
        "mapped Arrow -> numpy": lambda: ceiling(source, same),
        "ours numpy": lambda: numbers.numpy(BATCH),
        "ours arrow": lambda: numbers.arrow(BATCH),
        "mapped Arrow -> torch": lambda: ceiling(source, torch.from_numpy),
        "ours torch": lambda: numbers.torch(BATCH),
        "pyarrow.dataset, Arrow": lambda: scan(source, "arrow"),
        "pyarrow.dataset, Parquet": lambda: scan(parquet, "parquet"),
        "random gather": lambda: gather(features, labels, order),
        "ours numpy shuffled": lambda: numbers.numpy(BATCH, shuffle=True),
        "ours torch shuffled": lambda: numbers.torch(BATCH, shuffle=True),
    }
    seconds = options.seconds
    ways: dict[str, Callable[[], float]] = {
        name: functools.partial(rate, way, length, seconds) for name, way in handed.items()
    }
    for name in ("mapped Arrow -> numpy", "ours numpy", "mapped Arrow -> torch", "ours torch"):
        ways[f"{name}, read"] = functools.partial(rate, handed[name], length_and_sum, seconds)
    with contextlib.suppress(ImportError):
        import tensorflow  # noqa: F401

        for name, shuffle in (("ours tf", False), ("ours tf shuffled", True)):
            way = functools.partial(numbers.tf, BATCH, shuffle=shuffle)
            ways[name] = functools.partial(rate, way, lambda b: BATCH, seconds)
    arrow, tensors = "mapped Arrow -> numpy", "mapped Arrow -> torch"
    beside = {"ours numpy": arrow, "ours arrow": arrow, "ours torch": tensors, "ours tf": tensors}
    beside |= {"ours numpy, read": f"{arrow}, read", "ours torch, read": f"{tensors}, read"}
    beside |= dict.fromkeys(("pyarrow.dataset, Arrow", "pyarrow.dataset, Parquet"), arrow)
    shuffled = [name for name in ways if name.endswith("shuffled")]
    beside |= dict.fromkeys(shuffled, "random gather")
    with mosaic(directory, min(options.rows, 20_000)) as streaming:
        if streaming:
            for workers in (0, 2):
                name = f"Mosaic Streaming, {workers} processes"
                ways[name] = functools.partial(streaming, workers)
                beside[name] = "ours torch shuffled"
        figures = interleaved(ways, options.rounds, beside)
    for shuffle in (False, True):
        rates = in_processes(2, half, numbers, shuffle, seconds)
        name = "two ranks, torch" + (" shuffled" if shuffle else "")
        figures[name] = {"each": [rows for rows, _ in rates], "batches": [n for _, n in rates]}
        print(f"  {name:<34}{sum(figures[name]['each']):>14,.0f}   together, read")
    numbers.delete()
    return figures


@contextlib.contextmanager
def mosaic(directory: Path, rows: int) -> Iterator[Callable[[int], float] | None]:
    """Start Mosaic Streaming in its own environment; None where there is none."""
    python = MOSAIC / "bin" / "python"
    if not python.exists():
        print(f"  Mosaic Streaming is left out: {MOSAIC} is not there, --mosaic makes it")
        yield None
        return
    script = Path(__file__).with_name("mosaic.py")
    command = [str(python), str(script), str(directory / "mosaic"), str(rows)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    ) as process:
        print(f"  {process.stdout.readline().strip()}")

        def run(workers: int) -> float:
            process.stdin.write(f"{workers}\n")
            process.stdin.flush()
            return float(json.loads(process.stdout.readline()))

        yield run
        process.stdin.close()


def make_mosaic() -> None:
    """Make the environment, which needs older packages than this one."""
    if not (MOSAIC / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(MOSAIC)], check=True)
    torch = version("torch").partition("+")[0]
    packages = [f"torch=={torch}", "mosaicml-streaming==0.13.0", "numpy<2.2"]
    pip = [str(MOSAIC / "bin" / "python"), "-m", "pip", "install", "-q", *packages]
    subprocess.run(pip, check=True)


# ---- images


def jpegs(count: int, different: int = 500) -> list[bytes]:
    """Make images of about 10 KB: noise over a gradient. Some hundred of them, repeated."""
    from PIL import Image

    random = np.random.default_rng(0)
    ramp = np.linspace(0, 160, 128)[:, None, None]
    made = []
    for _ in range(min(different, count)):
        pixels = ramp + random.integers(0, 95, (128, 128, 3))
        sink = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(sink, "JPEG", quality=85)
        made.append(sink.getvalue())
    return list(itertools.islice(itertools.cycle(made), count))


def decoded(encoded: Iterable[bytes]) -> Any:
    """Decode some images into one array."""
    from PIL import Image

    return np.stack([np.asarray(Image.open(io.BytesIO(each))) for each in encoded])


def decoded_batch(batch: Any) -> Any:
    """Do so with a batch, as its ``batch_transform``."""
    return {"image": decoded(batch["image"]), "label": batch["label"]}


def decode_some(number: int, encoded: list[bytes], seconds: float) -> float:
    """Decode for some seconds and nothing else; return the images a second."""
    _barrier.wait()
    parts = (encoded[at : at + 64] for at in range(0, len(encoded), 64))
    return rate(lambda: map(decoded, parts), len, seconds)


def images(options: argparse.Namespace, directory: Path) -> Figures:
    """Measure whether decoding is what limits the reading of images."""
    import torch

    torch.set_num_threads(1)
    encoded = jpegs(min(options.images, 4000))
    print(f"  {options.images:,} images of {sum(map(len, encoded)) / len(encoded):,.0f} bytes")
    batch = pa.table({"image": pa.array(encoded, pa.binary()), "label": np.arange(len(encoded))})
    repeats = -(-options.images // len(encoded))
    table = pa.concat_tables([batch] * repeats).slice(0, options.images)
    stored = data.from_arrow(table, directory)
    seconds = options.seconds

    def in_threads() -> Iterator[Any]:
        parts = [encoded[at : at + 64] for at in range(0, len(encoded), 64)]
        with ThreadPoolExecutor(2) as pool:
            for _ in range(repeats):
                yield from pool.map(decoded, parts)

    def alone() -> float:
        return sum(in_processes(2, decode_some, encoded, seconds))

    read = functools.partial(stored.torch, 64, shuffle=True)
    transformed = functools.partial(read, batch_transform=decoded_batch)
    ways: dict[str, Callable[[], float]] = {
        "decoding in 2 threads": lambda: rate(in_threads, len, seconds),
        "ours, threads=2": lambda: rate(lambda: transformed(threads=2), length, seconds),
        "decoding in 2 processes": alone,
        "ours, num_workers=2": lambda: rate(lambda: transformed(num_workers=2), length, seconds),
        "ours, bytes alone": lambda: rate(read, length, seconds),
    }
    beside = {"ours, threads=2": "decoding in 2 threads"}
    beside["ours, num_workers=2"] = "decoding in 2 processes"
    beside["ours, bytes alone"] = "decoding in 2 threads"
    figures = interleaved(ways, options.rounds, beside)
    stored.delete()
    return figures


# ---- the first batch, and waiting


def time_to_first(number: int, numbers: data.DataSet) -> float:
    """Return the seconds until there is a batch, torch being imported."""
    import torch  # noqa: F401

    began = time.perf_counter()
    next(iter(numbers.torch(BATCH, shuffle=True)))
    return time.perf_counter() - began


def first(options: argparse.Namespace, directory: Path) -> Figures:
    """Measure the time to the first batch, in fresh processes."""
    write_numbers(directory / "numbers.arrow", options.rows)
    with data.from_arrow(mapped(directory / "numbers.arrow"), directory) as numbers:
        each = [in_processes(1, time_to_first, numbers)[0] for _ in range(options.rounds)]
    median = statistics.median(each)
    print(f"  first batch after {median * 1000:,.0f} ms (up to {max(each) * 1000:,.0f} ms)")
    return {"median": median, "each": each}


def waiting(options: argparse.Namespace, directory: Path) -> Figures:
    """Train the demo's network, and see how much of a step is waiting for its batch."""
    import torch
    from torch.utils.data import DataLoader

    from examples.digits import build_model, digits

    torch.set_num_threads(1)
    train_set, _ = digits()
    repeats = 40
    pixels, labels = (each.numpy() for each in train_set.tensors)
    pixel_lists = pa.FixedSizeListArray.from_arrays(pa.array(np.tile(pixels.ravel(), repeats)), 64)
    table = pa.table({"image": pixel_lists, "label": np.tile(labels, repeats)})

    def with_demo() -> Iterator[tuple[Any, Any]]:
        yield from DataLoader(train_set, batch_size=32, shuffle=True)

    def with_ours() -> Iterator[tuple[Any, Any]]:
        for batch in stored.torch(32, shuffle=True):
            yield batch["image"].view(-1, 1, 8, 8), batch["label"]

    def train(batches: Iterator[tuple[Any, Any]], steps: int = 400) -> tuple[float, float]:
        model = build_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        waits, times = [], []
        began = time.perf_counter()
        for inputs, wanted in itertools.islice(batches, steps):
            waits.append(time.perf_counter() - began)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), wanted).backward()
            optimizer.step()
            times.append(time.perf_counter() - began)
            began = time.perf_counter()
        batches.close()  # type: ignore[attr-defined]
        return sum(waits[1:]) / sum(times[1:]), statistics.median(times)

    with data.from_arrow(table, directory) as stored:
        figures: Figures = {"ours": [], "the demo's DataLoader": []}
        for _ in range(options.rounds):
            figures["ours"].append(train(with_ours()))
            figures["the demo's DataLoader"].append(train(with_demo()))
    for name, each in figures.items():
        share = statistics.median(one for one, _ in each)
        step = statistics.median(one for _, one in each)
        print(f"  {name}: {share:.1%} of a step of {step * 1000:.2f} ms is waiting")
    return figures


# ---- memory


def memory_of_epoch(number: int, numbers: data.DataSet) -> dict[str, int]:
    """Read a shuffled epoch; return the anonymous memory before, and the most there was."""
    batches = numbers.numpy(BATCH, shuffle=True)
    before = most = anonymous_memory()
    for count, _ in enumerate(batches):
        if count % 200 == 0:
            most = max(most, anonymous_memory())
    return {"before": before, "most": most}


def memory(options: argparse.Namespace, directory: Path) -> Figures:
    """Measure what reading holds in memory."""
    figures: Figures = {}
    write_numbers(directory / "numbers.arrow", options.rows // 4)
    table = mapped(directory / "numbers.arrow")
    for times in (1, 4, 16):
        rows = times * len(table)
        with data.from_arrow(pa.concat_tables([table] * times), directory) as numbers:
            (found,) = in_processes(1, memory_of_epoch, numbers)
        held = (found["most"] - found["before"]) / 2**20
        figures[f"{rows} rows"] = found
        print(f"  a table of {rows * ROW_BYTES / 1e9:.1f} GB: {held:.0f} MiB while it is read")
    return figures


# ---- shuffle


def shuffle(options: argparse.Namespace, directory: Path) -> Figures:
    """Measure how good the order is; the expectation of a full permutation is 1, 0 and 1."""
    window = SHUFFLE_WINDOW // ROW_BYTES
    figures: Figures = {}
    for windows in (0.5, 1, 4, 16):
        rows = int(windows * window)
        blocks = [BLOCK_ROWS] * (rows // BLOCK_ROWS)
        order = EpochOrder(blocks, shuffle=True, window_rows=window)
        starts = np.concatenate([[0], np.cumsum(blocks)])
        stored = np.empty(order.rows, np.int32)
        for start in range(0, order.rows, 2**20):
            positions = np.arange(start, min(order.rows, start + 2**20))
            blocks, chosen = order.by_block(positions)
            stored[positions] = np.concatenate([starts[at] + rows for at, rows in blocks])[chosen]
        place = np.empty_like(stored)
        place[stored] = np.arange(order.rows, dtype=np.int32)
        distances = np.abs(np.diff(place))
        batches = place // BATCH
        together = float(np.mean(batches[1:] == batches[:-1]))
        found = {
            "distance": float(distances.mean() / (order.rows / 3)),
            "correlation": float(np.corrcoef(place, np.arange(order.rows))[0, 1]),
            "same batch": together / ((BATCH - 1) / (order.rows - 1)),
        }
        figures[f"{windows} windows"] = found
        print(
            f"  {windows:>4} windows: neighbours {found['distance']:.3f} of a full permutation's "
            f"distance apart, correlation {found['correlation']:+.4f}, "
            f"{found['same batch']:.1f} times as often in the same batch"
        )
    return figures


# ---- Spark


def measured_write(location: str, columns: Any, batches: Iterator[Any]) -> Iterator[Any]:
    """Write a partition; report the process's greatest memory before and after instead."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in write_rows(location, columns, {}, batches):
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield pa.RecordBatch.from_pydict({"report": [json.dumps([before * 1024, after * 1024])]})


def rate_in_rank(rows: int, workers: int) -> float:
    """Return the rows a second of TorchDistributor's data loader. Runs in its worker."""
    import time

    from pyspark.ml.torch.distributor import _get_spark_partition_data_loader

    began = time.perf_counter()
    loader = _get_spark_partition_data_loader(rows, 256, workers)
    count = sum(len(labels) for _, labels in loader)
    return count / (time.perf_counter() - began)


def spark(options: argparse.Namespace, directory: Path) -> Figures:
    """Measure storing a DataFrame, and Spark's own way to hand one to training code."""
    from pyspark.ml.torch.distributor import TorchDistributor
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import array, rand

    from horovodrunner.data.schema import prepared

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ["SPARK_LOCAL_DIRS"] = str(directory)
    session = (
        SparkSession.builder.master("local-cluster[2,1,1024]")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )
    try:
        rows = options.rows // 10
        columns = [rand(number).cast("float") for number in range(WIDTH)]
        made = session.range(0, rows, 1, 4).select(
            array(*columns).alias("features"), (rand(99) * 10).cast("long").alias("label")
        )
        made.write.parquet(str(directory / "source.parquet"))
        frame = session.read.parquet(str(directory / "source.parquet"))

        def store() -> float:
            began = time.perf_counter()
            data.from_dataframe(frame, directory, reuse=False).delete()
            return rows / (time.perf_counter() - began)

        def copy() -> float:
            began = time.perf_counter()
            frame.write.mode("overwrite").parquet(str(directory / "copy.parquet"))
            return rows / (time.perf_counter() - began)

        distributor = TorchDistributor(num_processes=1, local_mode=False, use_gpu=False)
        few = frame.limit(rows // 10).coalesce(1)

        def torch_distributor() -> float:
            with contextlib.redirect_stdout(io.StringIO()):
                found = distributor._train_on_dataframe(rate_in_rank, few, rows // 10, 1)
            return float(found)

        ways = {
            "df.write.parquet": copy,
            "from_dataframe": store,
            "TorchDistributor's data loader": torch_distributor,
        }
        beside = {"from_dataframe": "df.write.parquet"}
        figures = interleaved(ways, options.rounds, beside)
        source, described = prepared(frame, None)
        for files in (1, 4):
            place = directory / f"memory-{files}"
            place.mkdir()
            write = functools.partial(measured_write, str(place), described)
            before = anonymous_memory()
            parts = source.unionAll(source.limit(0))
            for _ in range(files - 1):
                parts = parts.unionAll(source)
            found = parts.coalesce(1).mapInArrow(write, REPORT_SCHEMA).collect()
            held = [json.loads(row["report"]) for row in found]
            driver = anonymous_memory() - before
            figures[f"memory of writing {files * rows} rows"] = {"task": held, "driver": driver}
            most = max(after for _, after in held)
            print(
                f"  writing {files * rows * ROW_BYTES / 1e9:.2f} GB in one task: at most "
                f"{most / 2**20:.0f} MiB in its Python process, {driver / 2**20:+.0f} MiB here"
            )
            shutil.rmtree(place)
        return figures
    finally:
        session.stop()


# ---- the command


def machine() -> Figures:
    """Return where this was measured, and with what."""
    names = ("numpy", "pyarrow", "torch", "tensorflow-cpu", "tensorflow", "pyspark", "pillow")
    versions = {}
    for name in names:
        with contextlib.suppress(ImportError):
            versions[name] = version(name)
    return {
        "machine": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": versions,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="names with commas in between")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="at most, for one way in a round")
    parser.add_argument("--directory", type=Path, help="where all files are, such as /dev/shm")
    parser.add_argument("--mosaic", action="store_true", help="make Mosaic's environment first")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    unknown = set(options.cases.split(",")) - set(CASES)
    if unknown:
        parser.error(f"--cases: {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    if options.mosaic:
        make_mosaic()
    result = {"machine": machine(), "options": vars(options)}
    print(json.dumps(result["machine"]))
    for name in options.cases.split(","):
        print(f"{name}:", flush=True)
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            began = time.perf_counter()
            result[name] = globals()[name](options, Path(directory))
            print(f"  ({time.perf_counter() - began:.0f} s)")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
