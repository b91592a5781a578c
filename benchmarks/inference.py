"""Scoring a DataFrame beside other ways to apply the same model to it, interleaved in one run.

The cases, of which ``--cases`` chooses some:

- ``mlp``: rows of 32 float32 in an array column, and a network of three layers;
- ``images``: RGB images as PNG in a binary column, decoded and put through a small CNN;
- ``first``: milliseconds until ``take(1)`` has a row of the ``mlp`` case from fresh Python workers,
  counted from the trained network on the driver.

The ways, of which ``--ways`` chooses some; each case has its own:

- ``ceiling``: the same model on the same NumPy arrays or PNGs in one process per core, no Spark;
- ``scan`` and ``identity``: the columns as they are to the sink, directly and by ``mapInArrow``;
- ``predict_batch_udf``: Spark's own; ``mlflow``: ``mlflow.pyfunc.spark_udf``, no ``--batch-size``;
- ``hand_written``: a pandas UDF with broadcast weights and a ``DataLoader`` in it, as notebooks
  have it (on images also ``hand_written_2``, with two processes that decode);
- ``predict_udf``, ``predict``, ``predict_files``: ours; the last two are ``predict`` with
  ``read_files`` False and True (on images also ``predict_files_2``: two processes that decode).

All that predict hand the columns ``id`` and ``prediction`` to Spark's ``noop`` sink. Before it is
measured each way scores a small table, and its predictions must be those of the model.
Prints medians of all rounds, and ratios that are medians of the rounds' ratios.
Run it with ``.venv/bin/python -m benchmarks.inference --rounds 5 --json inference.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from benchmarks import data as shared

WIDTH = 32
FILES = 4
ROW_GROUP = 128 * 1024
CHECKED = 1500
"""Rows of the small table: more than one batch in each of its files."""
TOLERANCE = 1e-4

Figures = dict[str, Any]
Score = Callable[[Any], Any]
"""Takes the DataFrame of a table, gives the one that goes to the sink."""


class SkippedError(Exception):
    """A way cannot be measured here."""


@dataclass(frozen=True)
class Case:
    """What is measured, and beside what."""

    net: Any
    ways: dict[str, Callable[[Job], Score]]
    alone: Callable[[int], list[float]]
    """Takes the number of processes, gives each one's rows a second."""
    big: str
    rows: int
    small: str
    wanted: Any
    """What the model predicts for the small table."""
    beside: str


@dataclass(frozen=True)
class Job:
    """What a way gets to make its ``Score`` of."""

    session: Any
    net: Any
    batch_size: int
    directory: Path


# ---- the models


def build_mlp() -> Any:
    """Make the network of the ``mlp`` case; its weights are always the same."""
    import torch

    torch.manual_seed(0)
    layers = torch.nn.Linear(WIDTH, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    return torch.nn.Sequential(*layers).eval()


def build_cnn() -> Any:
    """Make the network of the ``images`` case, which takes pixels as Pillow gives them."""
    import torch

    class Pixels(torch.nn.Module):
        def forward(self, images: Any) -> Any:
            return images.permute(0, 3, 1, 2).float() / 255

    torch.manual_seed(0)
    return torch.nn.Sequential(
        Pixels(),
        torch.nn.Conv2d(3, 16, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 10),
    ).eval()


# ---- the rows


def numbers(seed: int, rows: int) -> Any:
    """Make random features."""
    return np.random.default_rng(seed).random((rows, WIDTH), np.float32)


def pngs(count: int, pixels: int, different: int = 500) -> list[bytes]:
    """Make images: noise over a gradient. Some hundred of them, repeated."""
    from PIL import Image

    random = np.random.default_rng(0)
    ramp = np.linspace(0, 200, pixels)[:, None, None]
    made = []
    for _ in range(min(different, count)):
        image = ramp * random.random(3) + random.integers(0, 40, (pixels, pixels, 3))
        sink = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(sink, "PNG")
        made.append(sink.getvalue())
    return list(itertools.islice(itertools.cycle(made), count))


def decoded(encoded: Any) -> Any:
    """Decode one image."""
    from PIL import Image

    return np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))


def write(directory: Path, name: str, column: str, values: Callable[[int], pa.Array]) -> str:
    """Write a table of several files with several row groups; ``values`` gives those of a file."""
    place = directory / name
    place.mkdir()
    first = 0
    for number in range(FILES):
        array = values(number)
        ids = np.arange(first, first + len(array))
        table = pa.table({"id": ids, column: array})
        pyarrow.parquet.write_table(table, place / f"{number}.parquet", row_group_size=ROW_GROUP)
        first += len(array)
    return str(place)


def write_numbers(directory: Path, name: str, rows: int) -> str:
    """Write the table of the ``mlp`` case."""

    def values(number: int) -> pa.Array:
        features = numbers(number, rows // FILES)
        ends = np.arange(0, features.size + 1, WIDTH, dtype=np.int32)
        return pa.ListArray.from_arrays(ends, features.ravel())

    return write(directory, name, "features", values)


def write_images(directory: Path, name: str, encoded: list[bytes]) -> str:
    """Write the table of the ``images`` case."""
    each = len(encoded) // FILES
    return write(
        directory,
        name,
        "image",
        lambda number: pa.array(encoded[number * each : (number + 1) * each], pa.binary()),
    )


# ---- ways for both cases


def scan(job: Job) -> Score:
    """Let Spark read the columns."""
    return lambda df: df


def identity(job: Job) -> Score:
    """Send the columns through the Python workers."""
    return lambda df: df.mapInArrow(lambda batches: batches, df.schema)


def applied(udf: Any, column: str) -> Score:
    """Apply a UDF to a column."""
    return lambda df: df.select("id", udf(column).alias("prediction"))


def ours(column: str, options: dict[str, Any], read_files: bool) -> Callable[[Job], Score]:
    """Score the whole DataFrame."""

    def way(job: Job) -> Score:
        from horovodrunner.inference import Model, predict

        return functools.partial(
            predict,
            model=Model.from_torch(job.net),
            inputs=[column],
            output="prediction",
            return_type="array<float>",
            batch_size=job.batch_size,
            keep_columns=["id"],
            read_files=read_files,
            **options,
        )

    return way


def ours_udf(column: str, options: dict[str, Any]) -> Callable[[Job], Score]:
    """Apply our UDF."""

    def way(job: Job) -> Score:
        from horovodrunner.inference import Model, predict_udf

        model = Model.from_torch(job.net)
        score = predict_udf(model, return_type="array<float>", batch_size=job.batch_size, **options)
        return applied(score, column)

    return way


# ---- the ways of the case mlp


def mlp_predict_batch_udf(job: Job) -> Score:
    """Apply Spark's own UDF."""
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql.types import ArrayType, FloatType

    net = job.net

    def make_predict_fn() -> Callable[[Any], Any]:
        import torch

        def predict(features: Any) -> Any:
            with torch.no_grad():
                return net(torch.from_numpy(features)).numpy()

        return predict

    score = predict_batch_udf(
        make_predict_fn,
        return_type=ArrayType(FloatType()),
        batch_size=job.batch_size,
        input_tensor_shapes=[[WIDTH]],
    )
    return applied(score, "features")


def mlp_hand_written(job: Job) -> Score:
    """Apply what notebooks have."""
    from pyspark.sql.functions import pandas_udf

    weights = job.session.sparkContext.broadcast(job.net.state_dict())
    batch_size = job.batch_size

    @pandas_udf("array<float>")
    def score(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        net = build_mlp()
        net.load_state_dict(weights.value)
        with torch.no_grad():
            for features in batches:
                rows = TensorDataset(torch.from_numpy(np.stack(features.to_numpy())))
                predictions = [
                    net(inputs).numpy() for (inputs,) in DataLoader(rows, batch_size=batch_size)
                ]
                yield pd.Series(list(np.concatenate(predictions)))

    return applied(score, "features")


def mlp_mlflow(job: Job) -> Score:
    """Log the model, and apply mlflow's UDF."""
    os.environ["MLFLOW_TRACKING_URI"] = (job.directory / "mlruns").as_uri()
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    try:
        import mlflow.pytorch
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec
    except ImportError as error:
        raise SkippedError(f"{error}; pip install mlflow-skinny") from error

    number = np.dtype(np.float32)
    signature = ModelSignature(
        Schema([TensorSpec(number, (-1, WIDTH))]), Schema([TensorSpec(number, (-1, 10))])
    )
    with mlflow.start_run():
        logged = mlflow.pytorch.log_model(
            job.net,
            name="net",
            signature=signature,
            input_example=numbers(0, 2),
            pip_requirements=["torch"],
        )
    score = mlflow.pyfunc.spark_udf(
        job.session, logged.model_uri, result_type="array<float>", env_manager="local"
    )
    return applied(score, "features")


def mlp_alone(number: int, rows: int, batch_size: int) -> float:
    """Return the rows a second of one process that has its rows in memory."""
    import torch

    torch.set_num_threads(1)
    net, features = build_mlp(), numbers(number, rows)
    shared._barrier.wait()
    began = time.perf_counter()
    with torch.no_grad():
        for start in range(0, rows, batch_size):
            net(torch.from_numpy(features[start : start + batch_size])).numpy()
    return rows / (time.perf_counter() - began)


SHAPES = {"input_tensor_shapes": [[WIDTH]]}
MLP_WAYS: dict[str, Callable[[Job], Score]] = {
    "scan": scan,
    "identity": identity,
    "hand_written": mlp_hand_written,
    "mlflow": mlp_mlflow,
    "predict_batch_udf": mlp_predict_batch_udf,
    "predict_udf": ours_udf("features", SHAPES),
    "predict": ours("features", SHAPES, read_files=False),
    "predict_files": ours("features", SHAPES, read_files=True),
}


# ---- the ways of the case images


def images_predict_batch_udf(job: Job) -> Score:
    """Apply Spark's own UDF, which decodes before it predicts."""
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql.types import ArrayType, FloatType

    net = job.net

    def make_predict_fn() -> Callable[[Any], Any]:
        import torch

        def predict(encoded: Any) -> Any:
            images = np.stack([decoded(each) for each in encoded])
            with torch.no_grad():
                return net(torch.from_numpy(images)).numpy()

        return predict

    score = predict_batch_udf(
        make_predict_fn, return_type=ArrayType(FloatType()), batch_size=job.batch_size
    )
    return applied(score, "image")


def images_hand_written(workers: int) -> Callable[[Job], Score]:
    """Apply what notebooks have."""

    def way(job: Job) -> Score:
        from pyspark.sql.functions import pandas_udf

        weights = job.session.sparkContext.broadcast(job.net.state_dict())
        batch_size = job.batch_size

        @pandas_udf("array<float>")
        def score(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
            import torch
            from torch.utils.data import DataLoader, Dataset

            class Images(Dataset):
                def __init__(self, encoded: pd.Series) -> None:
                    self._encoded = encoded.to_numpy()

                def __len__(self) -> int:
                    return len(self._encoded)

                def __getitem__(self, place: int) -> Any:
                    return torch.from_numpy(decoded(self._encoded[place]))

            net = build_cnn()
            net.load_state_dict(weights.value)
            with torch.no_grad():
                for encoded in batches:
                    loader = DataLoader(Images(encoded), batch_size=batch_size, num_workers=workers)
                    predictions = [net(images).numpy() for images in loader]
                    yield pd.Series(list(np.concatenate(predictions)))

        return applied(score, "image")

    return way


def images_alone(number: int, rows: int, pixels: int, batch_size: int) -> float:
    """Return the images a second of one process that has their bytes in memory."""
    import torch

    torch.set_num_threads(1)
    net, encoded = build_cnn(), pngs(rows, pixels)
    shared._barrier.wait()
    began = time.perf_counter()
    with torch.no_grad():
        for start in range(0, rows, batch_size):
            images = np.stack([decoded(each) for each in encoded[start : start + batch_size]])
            net(torch.from_numpy(images)).numpy()
    return rows / (time.perf_counter() - began)


def image_ways() -> dict[str, Callable[[Job], Score]]:
    """List the ways."""
    from horovodrunner.data import decode_images

    decoding = {"batch_transform": decode_images("image")}
    return {
        "scan": scan,
        "identity": identity,
        "hand_written": images_hand_written(0),
        "hand_written_2": images_hand_written(2),
        "predict_batch_udf": images_predict_batch_udf,
        "predict_udf": ours_udf("image", {**decoding, "input_names": ["image"]}),
        "predict": ours("image", decoding, read_files=False),
        "predict_files": ours("image", decoding, read_files=True),
        "predict_files_2": ours("image", {**decoding, "transform_workers": 2}, read_files=True),
    }


# ---- the cases


@contextlib.contextmanager
def spark(options: argparse.Namespace, directory: Path) -> Iterator[Any]:
    """Start a session whose Python workers are fresh."""
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ["SPARK_LOCAL_DIRS"] = str(directory)
    session = (
        SparkSession.builder.master(options.master)
        .config("spark.driver.memory", "2g")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )
    try:
        yield session
    finally:
        session.stop()


def chosen(names: Any, options: argparse.Namespace) -> list[str]:
    """Leave out what ``--ways`` does not name."""
    return [name for name in names if options.ways is None or name in options.ways]


def check(name: str, scored: Any, wanted: Any) -> None:
    """Compare a way's predictions with those of the model; fail if they differ."""
    rows = sorted(scored.collect())
    if [row.id for row in rows] != list(range(len(wanted))):
        raise AssertionError(f"{name} gives other rows than the table has: {len(rows)}")
    if name in ("scan", "identity"):
        return
    if scored.columns != ["id", "prediction"]:
        raise AssertionError(f"{name} gives the columns {scored.columns}")
    found = np.array([row.prediction for row in rows])
    np.testing.assert_allclose(found, wanted, TOLERANCE, TOLERANCE, err_msg=name)


def rate(score: Score, session: Any, case: Case) -> float:
    """Score the table and throw the result away; return rows a second."""
    began = time.perf_counter()
    score(session.read.parquet(case.big)).write.format("noop").mode("overwrite").save()
    return case.rows / (time.perf_counter() - began)


def measured(options: argparse.Namespace, directory: Path, case: Case) -> Figures:
    """Measure rows a second of all ways."""
    with spark(options, directory) as session:
        job = Job(session, case.net, options.batch_size, directory)
        runs: dict[str, Callable[[], float]] = {}
        skipped = {}
        for name in chosen(case.ways, options):
            try:
                score = case.ways[name](job)
            except SkippedError as reason:
                skipped[name] = str(reason)
                print(f"  {name} is left out: {reason}")
                continue
            check(name, score(session.read.parquet(case.small)), case.wanted)
            runs[name] = functools.partial(rate, score, session, case)
        if chosen(["ceiling"], options):
            cores = session.sparkContext.defaultParallelism
            runs["ceiling"] = lambda: sum(case.alone(cores))
        ratios = dict.fromkeys(runs.keys() - {case.beside}, case.beside)
        if case.beside not in runs:
            ratios = {}
        return {**shared.interleaved(runs, options.rounds, ratios), "skipped": skipped}


def mlp(options: argparse.Namespace, directory: Path) -> Figures:
    """Measure rows of numbers a second."""
    import torch

    rows, batch_size = options.rows // FILES * FILES, options.batch_size
    net = build_mlp()
    features = np.concatenate([numbers(number, CHECKED // FILES) for number in range(FILES)])
    with torch.no_grad():
        wanted = net(torch.from_numpy(features)).numpy()
    case = Case(
        net,
        MLP_WAYS,
        lambda cores: shared.in_processes(cores, mlp_alone, rows // cores, batch_size),
        write_numbers(directory, "big", rows),
        rows,
        write_numbers(directory, "small", CHECKED),
        wanted,
        "predict_batch_udf",
    )
    return measured(options, directory, case)


def images(options: argparse.Namespace, directory: Path) -> Figures:
    """Measure images a second."""
    import torch

    rows, pixels, batch_size = options.images // FILES * FILES, options.pixels, options.batch_size
    encoded = pngs(rows, pixels)
    few = encoded[:CHECKED]
    print(f"  {rows:,} images of {sum(map(len, encoded)) / rows:,.0f} bytes")
    net = build_cnn()
    with torch.no_grad():
        wanted = net(torch.from_numpy(np.stack([decoded(each) for each in few]))).numpy()
    case = Case(
        net,
        image_ways(),
        lambda cores: shared.in_processes(cores, images_alone, rows // cores, pixels, batch_size),
        write_images(directory, "big", encoded),
        rows,
        write_images(directory, "small", few),
        wanted,
        "hand_written",
    )
    return measured(options, directory, case)


def first(options: argparse.Namespace, directory: Path) -> Figures:
    """Measure the time to the first row."""
    net = build_mlp()
    path = write_numbers(directory, "big", options.rows // FILES * FILES)

    def run(way: Callable[[Job], Score]) -> float:
        with spark(options, directory) as session:
            session.read.parquet(path).take(1)
            began = time.perf_counter()
            score = way(Job(session, net, options.batch_size, directory))
            score(session.read.parquet(path)).take(1)
            return (time.perf_counter() - began) * 1000

    names = ["hand_written", "predict_batch_udf", "predict_udf", "predict", "predict_files"]
    runs: dict[str, Callable[[], float]] = {
        name: functools.partial(run, MLP_WAYS[name]) for name in chosen(names, options)
    }
    beside = "predict_batch_udf"
    ratios = dict.fromkeys(runs.keys() - {beside}, beside) if beside in runs else {}
    return shared.interleaved(runs, options.rounds, ratios)


# ---- the command

CASES = {"mlp": mlp, "images": images, "first": first}
WAYS = {"ceiling", "hand_written_2", "predict_files_2", *MLP_WAYS}


def names_in(known: Any) -> Callable[[str], list[str]]:
    """Read names with commas in between."""

    def names(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(
                f"{', '.join(sorted(unknown))}: there are {', '.join(sorted(known))}"
            )
        return text.split(",")

    return names


def machine() -> Figures:
    """Return where this was measured, and with what."""
    found = shared.machine()
    for name in ("pandas", "mlflow-skinny"):
        with contextlib.suppress(PackageNotFoundError):
            found["versions"][name] = version(name)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=names_in(CASES), default=list(CASES))
    parser.add_argument("--ways", type=names_in(WAYS), help="names with commas in between")
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--pixels", type=int, default=32, help="height and width of an image")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--master", default="local[2]")
    parser.add_argument("--directory", type=Path, help="where all files are, on a local disk")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    result = {"machine": machine(), "options": vars(options)}
    print(json.dumps(result["machine"]))
    for name in options.cases:
        print(f"{name}:", flush=True)
        directory = Path(tempfile.mkdtemp(dir=options.directory))
        try:
            began = time.perf_counter()
            result[name] = CASES[name](options, directory)
            print(f"  ({time.perf_counter() - began:.0f} s)")
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
