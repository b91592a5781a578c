"""Names that others' packages have and our stand-ins have not. Runs in: every process.

Importing one says what to use instead. ``hasattr`` and ``find_spec`` say that it is not there, as
they do anywhere: only an import statement gets the advice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from opcode import opmap
from types import ModuleType
from typing import Any

__all__ = ["PETASTORM", "SPARKDL", "advise", "refuse_names"]

_FORMAT = (
    "Petastorm's own format is not known to horovodrunner: read plain Parquet with "
    "petastorm.make_batch_reader, or a DataFrame with petastorm.spark.make_spark_converter"
)
_IN_SPARK = "choose rows in Spark, df.where(...), before petastorm.spark.make_spark_converter(df)"

PETASTORM: Mapping[str, str] = {
    "petastorm": (
        "horovodrunner's has spark, reader, pytorch, tf_utils and transform; for all of it pip "
        "install petastorm"
    ),
    **dict.fromkeys(("petastorm.unischema", "petastorm.codecs", "petastorm.etl"), _FORMAT),
    **dict.fromkeys(("petastorm.spark_utils", "petastorm.tools", "petastorm.generator"), _FORMAT),
    **dict.fromkeys(("petastorm.predicates", "petastorm.selectors"), _IN_SPARK),
    "petastorm.ngram": "make the windows in Spark: collect_list(...).over(Window...)",
    "petastorm.weighted_sampling_reader": "sample in Spark, df.sampleBy(...)",
    **dict.fromkeys(
        ("petastorm.local_disk_cache", "petastorm.cache"),
        "leave the cache out: petastorm.spark.make_spark_converter stores the rows once",
    ),
    **dict.fromkeys(
        ("petastorm.hdfs", "petastorm.fs_utils"), "give hdfs:// URLs, which fsspec opens"
    ),
    "petastorm.workers_pool": "give workers_count=... to the reader",
    "petastorm.errors": "what fails here is a horovodrunner.DataError",
    "petastorm.spark.spark_dataset_converter": "import it from petastorm.spark",
    "petastorm.tf_utils.tf_tensors": (
        "use petastorm.tf_utils.make_petastorm_dataset(reader), whose elements are the same rows"
    ),
    "petastorm.pytorch.InMemBatchedDataLoader": (
        "use petastorm.pytorch.BatchedDataLoader, or data.from_dataframe(df).torch(...)"
    ),
}
"""What to use instead of something of Petastorm's; the first is for all that is not named."""

_PIPELINES = (
    "Deep Learning Pipelines are not part of it: horovodrunner.inference.predict applies a model "
    "to a DataFrame"
)

SPARKDL: Mapping[str, str] = {
    "sparkdl": "horovodrunner's has HorovodRunner and horovod.log_to_driver",
    "sparkdl.xgboost": "use xgboost.spark (pip install xgboost)",
    **dict.fromkeys(
        (
            *(f"sparkdl.{each}" for each in ("image", "graph", "estimators", "param", "udf")),
            *(f"sparkdl.{each}" for each in ("transformers", "utils", "imageIO", "readImages")),
            *(f"sparkdl.DeepImage{each}" for each in ("Featurizer", "Predictor")),
            *(f"sparkdl.KerasImageFile{each}" for each in ("Estimator", "Transformer")),
            *(f"sparkdl.{each}Transformer" for each in ("Keras", "TF", "TFImage")),
            *(f"sparkdl.{each}" for each in ("registerKerasImageUDF", "imageSchema")),
        ),
        _PIPELINES,
    ),
    "sparkdl.log_to_driver": "from sparkdl.horovod import log_to_driver",
    **dict.fromkeys(
        ("sparkdl.horovod.runner_base", "sparkdl.horovod.HorovodRunner"),
        "from sparkdl import HorovodRunner",
    ),
    **dict.fromkeys(
        (
            *("sparkdl.LogCallback", "sparkdl.horovod.LogCallback", "sparkdl.horovod.keras"),
            "sparkdl.horovod.tensorflow.LogCallback",
        ),
        "from sparkdl.horovod.tensorflow.keras import LogCallback",
    ),
    **dict.fromkeys(
        ("sparkdl.horovod.torch", "sparkdl.horovod.pytorch", "sparkdl.horovod.lightning"),
        "horovodrunner.callbacks has callbacks for PyTorch and Lightning",
    ),
}
"""The same for Databricks' package."""


def advise(advice: Mapping[str, str]) -> None:
    """Let imports of modules that are not there raise an error that names what to use instead."""
    if not any(isinstance(each, _Finder) and each.advice is advice for each in sys.meta_path):
        sys.meta_path.append(_Finder(advice))


class _Finder:
    """Comes last: what reaches it is not there."""

    def __init__(self, advice: Mapping[str, str]) -> None:
        self.advice = advice
        self._package = next(iter(advice)) + "."

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        # importlib.util.find_spec asks in the same way as an import does
        asks = sys._getframe(2).f_code.co_name
        if name.startswith(self._package) and asks == "_find_and_load_unlocked":
            raise ModuleNotFoundError(
                f"No module named {name!r}: {_advice_for(name, self.advice)}", name=name
            )
        return None


def refuse_names(module: str, advice: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__``, which names what to use instead of what is not there."""

    def look_up(name: str) -> Any:
        instead = "" if name.startswith("__") else f": {_advice_for(f'{module}.{name}', advice)}"
        caller = sys._getframe(1)
        if instead and caller.f_code.co_code[caller.f_lasti] == opmap["IMPORT_FROM"]:
            raise ImportError(f"cannot import name {name!r} from {module!r}{instead}", name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}{instead}")

    return look_up


def _advice_for(name: str, advice: Mapping[str, str]) -> str:
    return advice.get(name) or next(iter(advice.values()))
