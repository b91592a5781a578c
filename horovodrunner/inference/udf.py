"""predict_udf: a model as a function of columns. Runs in: the driver, and Spark's Python workers.

Spark 4.1 hands a user's function Arrow arrays. Before, it hands it pandas objects, which are
made Arrow arrays again: right, and slower.
"""

from __future__ import annotations

import functools
import itertools
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, PredictionError
from horovodrunner.inference.options import AnyModel, Shapes, checked_options, make_scoring
from horovodrunner.inference.scoring import Scoring, score
from horovodrunner.inference.transforming import Transform
from horovodrunner.spark.column_names import literal
from horovodrunner.spark.errors import told_as
from horovodrunner.spark.session import find_session

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import Column
    from pyspark.sql.types import DataType

__all__ = ["PredictUdf", "predict_batch_udf", "predict_udf"]

ERROR_FIELD = "error"
VALUE_FIELD = "prediction"


def predict_udf(
    model: AnyModel,
    *,
    return_type: DataType | str,
    batch_size: int,
    input_tensor_shapes: Shapes | None = None,
    on_error: Literal["raise", "null"] = "raise",
    nulls: Literal["pass", "null", "raise"] = "pass",
    key_columns: Sequence[str] = (),
    batch_transform: Transform | None = None,
    input_names: Sequence[str] | None = None,
    transform_workers: int = 0,
    prefetch: int = 2,
) -> PredictUdf:
    """Make a model a function of columns, as ``pyspark.ml.functions.predict_batch_udf`` does.

    Parameters
    ----------
    model
        A :class:`Model`; or a function that loads a model and returns its predict function, which
        takes NumPy arrays and gives an array, a dict of arrays, or a list of dicts.
    return_type
        Spark's type of a prediction, or its DDL: ``"float"``, ``"array<float>"``,
        ``"label int, score float"`` for a struct.
    batch_size
        Rows that the model gets at once, whatever Spark's batches are; only the last ones of a
        partition may be fewer.
    input_tensor_shapes
        Shape of each input without the batch's dimension, None for scalar columns; or a dict of
        shapes by the input's number. An array column holds the values in row-major order. Without
        it arrays of one length are ``(batch, length)``.
    on_error
        ``"raise"``: a row that cannot be scored ends the job, and the error names it. ``"null"``:
        its prediction is null, and the value is a struct with the field ``error`` beside
        ``prediction``, or beside the fields of a struct.
    nulls
        What becomes of rows with a null input. ``"pass"``: the model gets NaN in the place of a
        number and None in that of text; a null array cannot be scored. ``"null"``: the prediction
        is null. ``"raise"``: they cannot be scored.
    key_columns
        Columns whose values name a row in errors; they are appended to the columns of each call.
    batch_transform
        Called with a dict of a batch's arrays by column name; the values of the dict it gives are
        the model's inputs. The same functions as in ``data`` sets: ``data.decode_images("image")``.
    input_names
        Names of the columns for `batch_transform` and errors; None: those the call gives as text.
    transform_workers
        Processes for each Python worker of Spark's that call `batch_transform`; 0: a thread, which
        is right for what does not hold the interpreter (Pillow, NumPy).
    prefetch
        Transformed batches that may wait for the model.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If an option cannot work.
    PredictionError
        In the job, within Spark's ``PythonException``, if a row cannot be scored.

    Examples
    --------
    >>> def with_probabilities(df, net):  # net: a torch.nn.Module
    ...     model = Model.from_torch(net)
    ...     score = predict_udf(model, return_type="array<float>", batch_size=512)
    ...     return df.withColumn("probabilities", score("features"))
    """
    options = checked_options(
        batch_size=batch_size,
        input_tensor_shapes=input_tensor_shapes,
        on_error=on_error,
        nulls=nulls,
        key_columns=key_columns,
        batch_transform=batch_transform,
        transform_workers=transform_workers,
        prefetch=prefetch,
    )
    names = () if input_names is None else checked.names("input_names", input_names)
    spark = find_session()
    with told_as(PredictionError, "the model cannot be sent to the executors"):
        scoring, kind = make_scoring(options, model, return_type, names, spark)
    return PredictUdf(scoring, kind if options.on_error == "raise" else _with_error(kind))


def predict_batch_udf(
    make_predict_fn: Callable[[], Callable[..., Any]],
    *,
    return_type: DataType | str,
    batch_size: int,
    input_tensor_shapes: Shapes | None = None,
) -> PredictUdf:
    """Return what ``pyspark.ml.functions.predict_batch_udf`` does, whose parameters these are.

    Parameters
    ----------
    make_predict_fn
        Loads a model and returns its predict function; called once in each Python worker.
    return_type, batch_size, input_tensor_shapes
        As for :func:`predict_udf`.
    """
    return predict_udf(
        make_predict_fn,
        return_type=return_type,
        batch_size=batch_size,
        input_tensor_shapes=input_tensor_shapes,
    )


class PredictUdf:
    """A model as a function of columns; made by :func:`predict_udf`.

    It is what ``spark.udf.register`` takes, too.
    """

    def __init__(self, scoring: Scoring, return_type: DataType) -> None:
        self._scoring = scoring
        self._return_type = return_type
        functools.update_wrapper(self, self._function(scoring.names))

    def __call__(self, *columns: Column | str) -> Column:
        """Apply the model to columns, which are its inputs in their order; or to a struct of them.

        Parameters
        ----------
        *columns
            Columns, or their names.
        """
        keys = self._scoring.keys
        names = self._scoring.names or tuple(
            literal(each) if isinstance(each, str) else f"input {number}"
            for number, each in enumerate(columns)
        )
        if len(names) != len(columns):
            raise ArgumentTypeError(
                f"the function was given {len(columns)} columns, and input_names has "
                f"{len(names)} ({', '.join(names)}): give one name for each"
            )
        found: Column = self._function(names)(*columns, *keys)
        return found

    def _function(self, names: tuple[str, ...]) -> Any:
        from pyspark.sql import functions

        scoring = replace(self._scoring, names=names)
        has_arrow_udf = hasattr(functions, "arrow_udf")  # since Spark 4.1
        score_calls = _score_arrays if has_arrow_udf else _score_pandas

        def predict(batches: Iterator[Any]) -> Iterator[Any]:
            return score_calls(scoring, batches)

        # Spark finds out by the annotations what the function takes.
        given: Any = pa.Array
        returned: Any = pa.Array
        if not has_arrow_udf:
            import pandas as pd

            given = typing.Union[pd.Series, pd.DataFrame]  # noqa: UP007 - what Spark knows
            returned = pd.DataFrame
        predict.__annotations__ = {
            "batches": typing.Iterator[given],
            "return": typing.Iterator[returned],
        }
        make_udf = functions.arrow_udf if has_arrow_udf else functions.pandas_udf
        return make_udf(predict, self._return_type)


def _with_error(kind: DataType) -> DataType:
    from pyspark.sql.types import StringType, StructField, StructType

    fields = kind.fields if isinstance(kind, StructType) else [StructField(VALUE_FIELD, kind)]
    return StructType([*fields, StructField(ERROR_FIELD, StringType())])


# ---- in Spark's Python workers


def _score_arrays(
    scoring: Scoring, calls: Iterator[pa.Array | tuple[pa.Array, ...]]
) -> Iterator[pa.Array]:
    """Score what Spark gives: the arrays of a batch, not in a tuple if there is one column."""
    arrays = (each if isinstance(each, tuple) else (each,) for each in calls)
    first = next(arrays, None)
    if first is None:
        return
    names = scoring.names or tuple(f"input {n}" for n in range(len(first) - len(scoring.keys)))
    batches = (
        pa.RecordBatch.from_arrays(list(each), [*names, *scoring.keys])
        for each in itertools.chain([first], arrays)
    )
    for _, predictions, errors in score(replace(scoring, names=names), batches):
        yield predictions if errors is None else _beside(predictions, errors)


def _beside(predictions: pa.Array, errors: pa.Array) -> pa.Array:
    if not pa.types.is_struct(predictions.type):
        return pa.StructArray.from_arrays([predictions, errors], [VALUE_FIELD, ERROR_FIELD])
    fields = [predictions.type.field(number).name for number in range(predictions.type.num_fields)]
    return pa.StructArray.from_arrays([*predictions.flatten(), errors], [*fields, ERROR_FIELD])


def _score_pandas(scoring: Scoring, calls: Iterator[Any]) -> Iterator[Any]:
    """Do the same with pandas objects, in which a null number is NaN."""
    convert = functools.partial(_from_pandas, nan_is_null=scoring.plan.nulls != "pass")
    arrow = (
        tuple(map(convert, each)) if isinstance(each, tuple) else convert(each) for each in calls
    )
    for values in _score_arrays(scoring, arrow):
        found = values
        if pa.types.is_struct(values.type):
            found = pa.RecordBatch.from_struct_array(values)
        yield found.to_pandas(integer_object_nulls=True)


def _from_pandas(values: pd.Series[Any] | pd.DataFrame, nan_is_null: bool) -> pa.Array:
    import pandas as pd

    if isinstance(values, pd.DataFrame):
        return pa.RecordBatch.from_pandas(values, preserve_index=False).to_struct_array()
    return pa.array(values.array, from_pandas=nan_is_null)
