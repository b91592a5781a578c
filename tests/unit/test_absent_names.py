"""What others' packages have and ours have not says what to use, to imports alone."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import sparkdl

petastorm: Any = importlib.import_module("petastorm")


@pytest.mark.parametrize(
    ("module", "name", "text"),
    [
        ("petastorm.unischema", "Unischema", "make_spark_converter"),
        ("petastorm.codecs", "ScalarCodec", "make_spark_converter"),
        ("petastorm.etl.dataset_metadata", "materialize_dataset", "make_spark_converter"),
        ("petastorm.predicates", "in_lambda", r"df\.where"),
        ("petastorm.ngram", "NGram", "collect_list"),
        ("petastorm.local_disk_cache", "LocalDiskCache", "leave the cache out"),
        ("petastorm.hdfs.namenode", "HdfsNamenodeResolver", "give hdfs:// URLs"),
        ("petastorm.workers_pool.thread_pool", "ThreadPool", "workers_count"),
        ("petastorm.spark.spark_dataset_converter", "make_spark_converter", "petastorm.spark$"),
        ("petastorm.no_such_thing", "Name", "has spark, reader, .*pip install petastorm"),
        ("petastorm.tf_utils", "tf_tensors", r"make_petastorm_dataset\(reader\)"),
        ("petastorm.pytorch", "InMemBatchedDataLoader", "BatchedDataLoader"),
        ("petastorm", "unischema", "make_spark_converter"),
        ("petastorm", "NoSuchThing", "has spark, reader, .*pip install petastorm"),
        ("sparkdl.xgboost", "XgboostRegressor", "xgboost.spark"),
        ("sparkdl", "xgboost", "xgboost.spark"),
        ("sparkdl", "KerasTransformer", "horovodrunner.inference.predict"),
        ("sparkdl.image", "imageIO", "horovodrunner.inference.predict"),
        ("sparkdl", "log_to_driver", "from sparkdl.horovod import log_to_driver"),
        ("sparkdl.horovod", "HorovodRunner", "from sparkdl import HorovodRunner"),
        ("sparkdl.horovod.runner_base", "HorovodRunner", "from sparkdl import HorovodRunner"),
        ("sparkdl.horovod.tensorflow", "LogCallback", "sparkdl.horovod.tensorflow.keras import"),
        ("sparkdl.horovod.keras", "LogCallback", "sparkdl.horovod.tensorflow.keras import"),
    ],
)
def test_an_import_says_what_to_use_instead(module: str, name: str, text: str) -> None:
    with pytest.raises(ImportError, match=f"^(No module named|cannot import name) .*{text}"):
        exec(f"from {module} import {name}")


def test_hasattr_and_find_spec_say_that_it_is_not_there() -> None:
    assert not hasattr(petastorm, "unischema")
    assert not hasattr(importlib.import_module("petastorm.tf_utils"), "tf_tensors")
    assert not hasattr(sparkdl, "xgboost")
    assert getattr(sparkdl, "KerasTransformer", None) is None
    assert importlib.util.find_spec("petastorm.unischema") is None
    assert importlib.util.find_spec("sparkdl.xgboost") is None
    with pytest.raises(AttributeError, match="has no attribute 'codecs': Petastorm's own format"):
        _ = petastorm.codecs
    with pytest.raises(ModuleNotFoundError, match=r"'petastorm\.codecs': Petastorm") as caught:
        importlib.import_module("petastorm.codecs")
    assert caught.value.name == "petastorm.codecs"


def test_what_is_there_is_imported_as_ever() -> None:
    for name in ("petastorm.spark", "petastorm.reader", "sparkdl.horovod.tensorflow.keras"):
        assert importlib.util.find_spec(name) is not None
        importlib.import_module(name)

    exec("from petastorm import TransformSpec, make_batch_reader, make_reader")
    exec("from petastorm.pytorch import BatchedDataLoader, DataLoader")
    assert petastorm.__version__
    assert sparkdl.__version__
