"""predict: a model for a whole DataFrame. Runs in: the driver, and Spark's Python workers."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentValueError, DataError
from horovodrunner.flows.logs.showing import show_text
from horovodrunner.inference.files import FileScan, parts_dataframe, plain_scan, read_parts
from horovodrunner.inference.options import AnyModel, Shapes, checked_options, make_scoring
from horovodrunner.inference.scoring import Scoring, score
from horovodrunner.inference.transforming import Transform
from horovodrunner.spark.arrow import map_in_arrow
from horovodrunner.spark.column_names import fields_twice, numbered
from horovodrunner.spark.dataframes import check_dataframe
from horovodrunner.spark.errors import told_as
from horovodrunner.usage import explained

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from pyspark.sql.types import DataType

__all__ = ["predict"]

_SEVERAL = ": join on that name, or give the columns names by their places (df.toDF(...))"


@explained(keep="keep_columns")
def predict(
    df: DataFrame,
    model: AnyModel,
    *,
    inputs: str | Sequence[str],
    return_type: DataType | str,
    batch_size: int,
    output: str = "prediction",
    keep_columns: Sequence[str] | None = None,
    input_tensor_shapes: Shapes | None = None,
    on_error: Literal["raise", "null"] = "raise",
    error_column: str = "error",
    nulls: Literal["pass", "null", "raise"] = "pass",
    key_columns: Sequence[str] = (),
    batch_transform: Transform | None = None,
    transform_workers: int = 0,
    prefetch: int = 2,
    read_files: bool | Literal["auto"] = "auto",
) -> DataFrame:
    """Apply a model to the rows of a DataFrame.

    It is faster than a column function, because only what the model needs travels to Python; and
    where the DataFrame is nothing but a scan of Parquet files that the executors' Python can read,
    the rows do not go through the JVM at all.

    Parameters
    ----------
    df
        The rows; a streaming DataFrame, too.
    model
        A :class:`Model`; or a function that loads a model and returns its predict function.
    inputs
        Columns that are the model's inputs, in their order.
    return_type, batch_size, input_tensor_shapes, nulls, key_columns
        As for :func:`predict_udf`.
    output
        Name of the column of predictions.
    keep_columns
        Columns of `df` that the result has; None: all. Fewer is faster.
    on_error
        ``"raise"``: a row that cannot be scored ends the job, and the error names it. ``"null"``:
        its prediction is null, and `error_column` says why.
    error_column
        Name of that column; it is null where a row was scored.
    batch_transform, transform_workers, prefetch
        As for :func:`predict_udf`.
    read_files
        Whether the executors' Python reads the files of a plain Parquet scan itself. ``"auto"``:
        where that is safe, and a line says so. False: never. True: an error where it is not.

    Returns
    -------
    DataFrame
        The kept columns and the predictions; computed when it is used, as all DataFrames are.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, DataError
        If an option cannot work, or Spark cannot analyze the DataFrame.
    PredictionError
        In the job, within Spark's ``PythonException``, if a row cannot be scored.

    Examples
    --------
    >>> def score(df, net):  # net: a torch.nn.Module
    ...     options = {"return_type": "array<float>", "batch_size": 512, "keep_columns": ["id"]}
    ...     return predict(df, Model.from_torch(net), inputs="features", **options)
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
    reads = checked.boolean_or("auto", "read_files", read_files)
    output = checked.text("output", output)
    error_column = checked.text("error_column", error_column)
    is_one = isinstance(checked.plain(inputs), str)
    input_names = [checked.text("inputs", inputs)] if is_one else checked.names("inputs", inputs)
    check_dataframe(df, takes_streams=True)
    with told_as(DataError, "predict cannot use the DataFrame"):
        kept = list(df.columns)
        if keep_columns is not None:
            kept = checked.names("keep_columns", keep_columns)
        needed = [*input_names, *options.keys]
        added = [output, error_column] if options.on_error == "null" else [output]
        _check_names(df, [*needed, *kept], kept, added)
        if not input_names:
            raise ArgumentValueError("inputs=[]: name the columns that are the model's inputs")

        scoring, kind = make_scoring(options, model, return_type, input_names, df.sparkSession)
        # A column may be an input twice, or an input and a key: Spark is asked for it once.
        columns = list(dict.fromkeys([*needed, *kept]))
        call = functools.partial(
            _score_batches,
            scoring,
            [columns.index(name) for name in needed],
            {name: columns.index(name) for name in kept},
            added,
        )
        schema = _schema(df, kept, kind, added)
        scan = plain_scan(df, columns) if reads else "read_files=False"
        if isinstance(scan, FileScan):
            show_text(
                f"HorovodRunner: predict reads {scan.files:,} Parquet files ({scan.rows:,} rows) "
                "in Python, past the JVM; read_files=False switches this off\n"
            )
            parts = parts_dataframe(df.sparkSession, scan)
            return map_in_arrow(parts, functools.partial(_score_files, call), schema)
        if reads is True:
            raise ArgumentValueError(f"read_files=True: {scan}")
        return map_in_arrow(numbered(df, columns), call, schema)


def _check_names(
    df: DataFrame, used: Sequence[str], kept: Sequence[str], added: Sequence[str]
) -> None:
    for name in used:
        if df.columns.count(name) != 1:
            found = "there is none" if name not in df.columns else "there are several"
            remedy = "" if name not in df.columns else _SEVERAL
            raise ArgumentValueError(
                f"the column {name!r}: {found} among {', '.join(df.columns)}{remedy}"
            )
        kind = df.schema[name].dataType
        if twice := fields_twice(kind):
            raise ArgumentValueError(
                f"the column {name!r} has a struct with two fields {twice!r}, which cannot reach "
                "Python: rename one (cast it to a struct with other names), or leave it out "
                "(keep_columns=)"
            )
    for number, name in enumerate(added):
        if name in kept or name in added[:number]:
            raise ArgumentValueError(
                f"the result would have two columns {name!r}: name the new one otherwise "
                "(output=, error_column=), or leave the old one out (keep_columns=)"
            )


def _schema(df: DataFrame, kept: Sequence[str], kind: DataType, added: Sequence[str]) -> Any:
    from pyspark.sql.types import StringType, StructField, StructType

    kinds = [kind, StringType()]
    new = [StructField(name, each) for name, each in zip(added, kinds, strict=False)]
    return StructType([*(df.schema[name] for name in kept), *new])


# ---- in Spark's Python workers


def _score_files(call: Any, parts: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield from call(read_parts(parts))


def _score_batches(
    scoring: Scoring,
    needed: Sequence[int],
    kept: Mapping[str, int],
    added: Sequence[str],
    batches: Iterator[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Score batches: some columns are the model's inputs and the keys, some are kept."""
    arranged = (
        pa.RecordBatch.from_arrays(
            [*(each.column(place) for place in needed), *each.columns],
            [f"_{number}" for number in range(len(needed) + each.num_columns)],
        )
        for each in batches
    )
    for batch, predictions, errors in score(scoring, arranged):
        columns = [batch.column(len(needed) + place) for place in kept.values()]
        columns += [predictions] if errors is None else [predictions, errors]
        yield pa.RecordBatch.from_arrays(columns, [*kept, *added])
