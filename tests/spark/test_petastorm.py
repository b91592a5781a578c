"""Petastorm's converter from real DataFrames; tests/corpus trains with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from horovodrunner.compat.petastorm.spark import SparkDatasetConverter, make_spark_converter
from horovodrunner.errors import DataError

pytestmark = pytest.mark.spark


@pytest.fixture
def cache_dir(spark: Any, tmp_path: Path) -> Any:
    """A directory that the conf names."""
    path = tmp_path / "cache"
    spark.conf.set(SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF, path.as_uri())
    yield path
    spark.conf.unset(SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF)


def batch_of(converter: SparkDatasetConverter) -> Any:
    with converter.make_torch_dataloader(
        batch_size=100, num_epochs=1, shuffle_row_groups=False
    ) as loader:
        [batch] = loader
    return batch


def test_what_a_data_frame_becomes(spark: Any, cache_dir: Path) -> None:
    rows = [(float(row), [0.1, None if row == 2 else 0.2], row) for row in range(5)]
    rows[1] = (None, *rows[1][1:])  # type: ignore[assignment]
    df = spark.createDataFrame(rows, "x double, pair array<double>, n long").coalesce(1)

    converter = make_spark_converter(df)
    assert make_spark_converter(df).cache_dir_url == converter.cache_dir_url
    assert converter.cache_dir_url.startswith(cache_dir.as_uri())
    batch = batch_of(converter)
    assert [str(batch[name].dtype) for name in ("x", "pair", "n")] == [
        "torch.float32", "torch.float32", "torch.int64"]  # fmt: skip
    assert [math.isnan(x) for x in batch["x"].tolist()] == [False, True, False, False, False]
    assert math.isnan(batch["pair"][2, 1])

    # a task of Spark, without a run, reads it, too; the class is found there by its own name
    def mean(_: int) -> float:
        with converter.make_torch_dataloader(num_epochs=1, schema_fields=["n"]) as loader:
            return float(next(iter(loader))["n"].float().mean())

    assert spark.sparkContext.parallelize([0], 1).map(mean).collect() == [2.0]

    parquet = (cache_dir.parent / "parquet").as_uri()
    df.write.parquet(parquet)
    doubles = make_spark_converter(parquet, dtype=None, compression_codec="gzip")
    assert str(batch_of(doubles)["x"].dtype) == "torch.float64"
    for each in (converter, doubles):
        each.delete()
    assert list(cache_dir.iterdir()) == []
    assert (cache_dir.parent / "parquet").exists()


def test_what_it_cannot_become_is_told(spark: Any, cache_dir: Path) -> None:
    df = spark.createDataFrame([(1,), (None,)], "n long")
    with pytest.raises(DataError, match="column 'n' has 1 nulls"):
        make_spark_converter(df)
    spark.conf.set(SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF, "file:///proc/1/dbfs")
    with pytest.raises(DataError, match="cannot be written to /proc/1/dbfs/horovodrunner"):
        make_spark_converter(df.dropna())
