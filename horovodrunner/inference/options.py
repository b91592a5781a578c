"""What predict and predict_udf have in common: their options, checked. Runs in: the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError
from horovodrunner.inference.inputs import InputPlan
from horovodrunner.inference.loading import ModelHandle
from horovodrunner.inference.model import Model
from horovodrunner.inference.outputs import arrow_type
from horovodrunner.inference.scoring import Scoring
from horovodrunner.inference.transforming import Transform

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from pyspark.sql.types import DataType

__all__ = ["Options", "Shapes", "handle_of", "spark_type"]

SAFE_CASTS = "spark.sql.execution.pandas.convertToArrowArraySafely"
"""Spark's own setting for the same question."""

Shapes = Sequence[Sequence[int] | None] | Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Options:
    """The options; the parameters are those of :func:`horovodrunner.inference.predict`."""

    batch_size: int
    input_tensor_shapes: Shapes | None
    on_error: Literal["raise", "null"]
    nulls: Literal["pass", "null", "raise"]
    key_columns: Sequence[str]
    batch_transform: Transform | None
    transform_workers: int
    prefetch: int

    def __post_init__(self) -> None:
        for name, value in (
            ("batch_size", checked.integer("batch_size", self.batch_size, 1)),
            ("transform_workers", checked.integer("transform_workers", self.transform_workers, 0)),
            ("prefetch", checked.integer("prefetch", self.prefetch, 1)),
            ("on_error", checked.choice("on_error", self.on_error, ("raise", "null"))),
            ("nulls", checked.choice("nulls", self.nulls, ("pass", "null", "raise"))),
            ("key_columns", tuple(checked.names("key_columns", self.key_columns))),
        ):
            object.__setattr__(self, name, value)
        if self.batch_transform is not None and not callable(self.batch_transform):
            raise ArgumentTypeError(
                f"batch_transform={self.batch_transform!r}: give a function that takes a dict of "
                "arrays and gives one"
            )
        if self.batch_transform is not None:
            checked.runs_at_once("batch_transform", self.batch_transform)
        if self.batch_transform is None and self.transform_workers:
            raise ArgumentValueError(
                f"transform_workers={self.transform_workers}: there is no batch_transform for them"
            )
        if self.batch_transform is not None and self.input_tensor_shapes is not None:
            raise ArgumentValueError(
                "input_tensor_shapes and batch_transform: the arrays that the transform gives "
                "are the model's inputs and have a shape; let it reshape them"
            )
        InputPlan.of(self.input_tensor_shapes, self.nulls)

    def scoring(
        self,
        spark: SparkSession,
        handle: ModelHandle,
        return_type: DataType,
        names: Sequence[str],
    ) -> Scoring:
        """Say what the Python workers are to do.

        Parameters
        ----------
        spark
            The session, whose settings hold for dates and for casts.
        handle
            The model.
        return_type
            Spark's type of the predictions.
        names
            Names of the input columns.

        Returns
        -------
        Scoring
            What travels to them.
        """
        return Scoring(
            model=handle,
            target=arrow_type(return_type, spark.conf.get("spark.sql.session.timeZone")),
            safe=spark.conf.get(SAFE_CASTS) == "true",
            batch_size=self.batch_size,
            plan=InputPlan.of(self.input_tensor_shapes, self.nulls),
            names=tuple(names),
            keys=tuple(self.key_columns),
            on_error=self.on_error,
            transform=self.batch_transform,
            transform_workers=self.transform_workers,
            prefetch=self.prefetch,
        )


def handle_of(model: Model | Callable[[], Callable[..., Any]], spark: SparkSession) -> ModelHandle:
    """Get a model ready for the session's executors.

    Parameters
    ----------
    model
        A model, or a function that loads one, as ``predict_batch_udf`` takes it.
    spark
        The session.

    Returns
    -------
    ModelHandle
        What travels to them.

    Raises
    ------
    ArgumentTypeError
        If it is neither.
    """
    if isinstance(model, Model):
        return model.handle(spark)
    kind = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    for package, name in (("torch", "torch"), ("keras", "keras"), ("tf_keras", "keras")):
        if package in kind:
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
    """Read a type that may be written as DDL.

    Parameters
    ----------
    return_type
        The type, or text such as ``"array<float>"`` or ``"label int, score float"``.
    spark
        The session, whose parser reads it.

    Returns
    -------
    pyspark.sql.types.DataType
        The type.

    Raises
    ------
    ArgumentTypeError
        If it is neither.
    ArgumentValueError
        If Spark cannot read it.
    """
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
