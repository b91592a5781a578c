"""What predict and predict_udf have in common: their options, checked. Runs in: the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError
from horovodrunner.inference.inputs import InputPlan
from horovodrunner.inference.loading import ModelHandle
from horovodrunner.inference.model import Model
from horovodrunner.inference.outputs import arrow_type
from horovodrunner.inference.scoring import Options, Scoring
from horovodrunner.inference.transforming import Transform

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from pyspark.sql.types import DataType

__all__ = ["AnyModel", "Shapes", "checked_options", "make_scoring", "spark_type"]

SAFE_CASTS = "spark.sql.execution.pandas.convertToArrowArraySafely"
"""Spark's own setting for the same question."""

AnyModel = Model | Callable[[], Callable[..., Any]]
Shapes = Sequence[Sequence[int] | None] | Mapping[int, Sequence[int]]


def checked_options(
    *,
    batch_size: int,
    input_tensor_shapes: Shapes | None,
    on_error: str,
    nulls: str,
    key_columns: Sequence[str],
    batch_transform: Transform | None,
    transform_workers: int,
    prefetch: int,
) -> Options:
    options = Options(
        batch_size=checked.integer("batch_size", batch_size, 1),
        plan=InputPlan.of(input_tensor_shapes, nulls),
        on_error=checked.choice("on_error", on_error, ("raise", "null")),
        keys=tuple(checked.names("key_columns", key_columns)),
        transform=batch_transform,
        transform_workers=checked.integer("transform_workers", transform_workers, 0),
        prefetch=checked.integer("prefetch", prefetch, 1),
    )
    if batch_transform is None:
        if transform_workers:
            raise ArgumentValueError(
                f"transform_workers={transform_workers}: there is no batch_transform for them"
            )
        return options
    if not callable(batch_transform):
        raise ArgumentTypeError(
            f"batch_transform={batch_transform!r}: give a function that takes a dict of arrays and "
            "gives one"
        )
    checked.runs_at_once("batch_transform", batch_transform)
    if input_tensor_shapes is not None:
        raise ArgumentValueError(
            "input_tensor_shapes and batch_transform: the arrays that the transform gives are the "
            "model's inputs and have a shape; let it reshape them"
        )
    return options


def make_scoring(
    options: Options,
    model: AnyModel,
    return_type: DataType | str,
    names: Sequence[str],
    spark: SparkSession,
) -> tuple[Scoring, DataType]:
    """Send the model, and return what the Python workers are to do, and the predictions' type."""
    kind = spark_type(return_type, spark)
    scoring = Scoring(
        **vars(options),
        model=_sent(model, spark),
        target=arrow_type(kind, spark.conf.get("spark.sql.session.timeZone")),
        safe=spark.conf.get(SAFE_CASTS) == "true",
        names=tuple(names),
    )
    return scoring, kind


def _sent(model: AnyModel, spark: SparkSession) -> ModelHandle:
    if isinstance(model, Model):
        return model.handle(spark)
    packages = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    for package, name in (("torch", "torch"), ("keras", "keras"), ("tf_keras", "keras")):
        if package in packages:
            raise ArgumentTypeError(
                f"model={type(model).__name__}: wrap it, Model.from_{name}(...), once for all "
                "DataFrames it is applied to"
            )
    if not callable(model):
        raise ArgumentTypeError(
            f"model={model!r}: give a Model, or a function that loads a model and returns its "
            "predict function"
        )
    checked.runs_at_once("model", model)
    return ModelHandle.of_make_predict_fn(model)


def spark_type(return_type: DataType | str, spark: SparkSession) -> DataType:
    """Return a type that may be written as DDL, such as ``"label int, score float"``."""
    from pyspark.errors import PySparkException
    from pyspark.sql.types import DataType

    if isinstance(return_type, DataType):
        return return_type
    if not isinstance(return_type, str):
        raise ArgumentTypeError(
            f"return_type={return_type!r}: give a type of pyspark.sql.types, or text such as "
            "'array<float>'"
        )
    for text in (f"prediction {return_type}", f"prediction struct<{return_type}>"):
        try:
            return spark.createDataFrame([], text).schema["prediction"].dataType
        except PySparkException as error:
            problem = error
    raise ArgumentValueError(
        f"return_type={return_type!r} is no type that Spark knows: {str(problem).splitlines()[0]}"
    )
