"""One partition: rows in, predictions out. Runs in: Spark's Python workers.

A thread reads Spark's batches and converts them, one or two ahead; another one, where there is a
transform, makes the model's batches; and this one computes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa

from horovodrunner.errors import HorovodRunnerError, PredictionError
from horovodrunner.inference.ahead import ReadAhead
from horovodrunner.inference.batching import Arrays, Batch, Piece, expanded, rebatched
from horovodrunner.inference.inputs import (
    BadRows,
    InputError,
    InputPlan,
    UsualShape,
    as_one_array,
    is_vector,
    null_rows,
    numpy_inputs,
    to_numpy,
)
from horovodrunner.inference.loading import ModelHandle, Predictor, load
from horovodrunner.inference.outputs import OutputError, to_arrow, to_arrow_by_row
from horovodrunner.inference.transforming import Transform, transformed
from horovodrunner.memory_limit import memory_hint

__all__ = ["Scored", "Scoring", "score"]

PIECES_AHEAD = 2
"""Batches of Spark's that are converted and wait; usually 10,000 rows each."""

Predictions: TypeAlias = "np.ndarray | pa.Array"

Scored = tuple[pa.RecordBatch, pa.Array, "pa.Array | None"]
"""Rows as they came, their predictions, and with on_error="null" what is wrong with them."""


@dataclass(frozen=True)
class Scoring:
    """What is to be done; travels in the pickled function.

    Parameters
    ----------
    model
        The model.
    target
        Type of the predictions.
    safe
        Whether a prediction that the type cannot hold is an error, rather than cut.
    batch_size
        Rows that the model gets at once.
    plan
        How columns become the model's inputs.
    names
        Names of the input columns: the first ones of each batch.
    keys
        Names of the columns after them, which name a row in errors.
    on_error
        Whether a row that cannot be scored ends the job, or is null.
    transform
        Makes the model's inputs of a batch.
    transform_workers
        Processes that call it; 0: a thread of this one.
    prefetch
        Transformed batches that may wait for the model.
    """

    model: ModelHandle
    target: pa.DataType
    safe: bool
    batch_size: int
    plan: InputPlan
    names: tuple[str, ...]
    keys: tuple[str, ...] = ()
    on_error: Literal["raise", "null"] = "raise"
    transform: Transform | None = None
    transform_workers: int = 0
    prefetch: int = 2


def score(scoring: Scoring, batches: Iterator[pa.RecordBatch]) -> Iterator[Scored]:
    """Apply the model to the rows of a partition.

    Parameters
    ----------
    scoring
        What is to be done.
    batches
        The partition's rows: input columns first, then those of the keys, then any others.

    Yields
    ------
    tuple
        Each batch of rows again, with as many predictions.

    Raises
    ------
    PredictionError
        If a row cannot be scored.
    """
    first = next(batches, None)
    if first is None:
        return  # no rows, no model
    _, names, _ = _inputs(first, scoring.names)
    try:
        yield from _Partition(scoring, names).scored(itertools.chain([first], batches))
    except HorovodRunnerError:
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        if hint := memory_hint(error):
            raise PredictionError(
                f"memory ran out in Spark's Python worker: {type(error).__name__}: {error}{hint}"
            ) from error
        raise


class _Partition:
    def __init__(self, scoring: Scoring, names: Sequence[str]) -> None:
        self._scoring = scoring
        self._names = names
        self._model: Future[Predictor] = Future()
        self._open: deque[Piece] = deque()
        self._predictions: deque[Predictions] = deque()
        self._reasons: dict[int, str] = {}
        self._lengths = UsualShape() if scoring.on_error == "null" else None

    def scored(self, batches: Iterable[pa.RecordBatch]) -> Iterator[Scored]:
        scoring = self._scoring
        with ReadAhead(self._stretches(batches), PIECES_AHEAD) as stretches:
            try:
                self._model.set_result(load(scoring.model))
            except BaseException:
                self._model.cancel()
                raise
            raw = rebatched(stretches, scoring.batch_size, may_differ=self._lengths is not None)
            if scoring.transform is None:
                yield from self._results(Batch(each, len(each[0])) for each in raw)
                return
            with transformed(
                raw,
                scoring.transform,
                self._names,
                workers=scoring.transform_workers,
                prefetch=scoring.prefetch,
                find_all=scoring.on_error == "null",
            ) as made:
                yield from self._results(made)

    # ---- in the thread that reads

    def _stretches(self, batches: Iterable[pa.RecordBatch]) -> Iterator[Arrays]:
        before = first = 0
        for batch in batches:
            piece = Piece(batch, before, first)
            arrays = self._converted(piece)
            before += batch.num_rows
            first = piece.end
            self._open.append(piece)
            if piece.end > piece.first:
                yield arrays

    def _converted(self, piece: Piece) -> Arrays:
        scoring = self._scoring
        columns, names, is_group = _inputs(piece.batch, scoring.names)
        while True:
            rows = np.arange(piece.batch.num_rows) if piece.good is None else piece.good
            try:
                absent = null_rows(columns, names, scoring.plan)
                if absent is None:
                    return self._as_numpy(columns, names, is_group)
                left = np.flatnonzero(~absent)
            except BadRows as bad:
                reasons = {int(rows[row]): reason for row, reason in bad.rows.items()}
                left = np.setdiff1d(np.arange(len(rows)), list(bad.rows))
                if scoring.on_error == "raise":
                    row, reason = next(iter(reasons.items()))
                    raise PredictionError(
                        f"{self._name(piece, row)} cannot be scored: {reason}"
                    ) from None
                piece.reasons.update(reasons)
            piece.good = rows[left]
            columns = [each.take(pa.array(left)) for each in columns]

    def _as_numpy(self, columns: list[pa.Array], names: Sequence[str], is_group: bool) -> Arrays:
        if self._scoring.transform is not None:
            return tuple(map(to_numpy, columns, names))
        model = self._model.result()
        inputs = numpy_inputs(
            columns,
            names,
            self._scoring.plan,
            expected=model.expected_inputs,
            stacks_scalars=model.stacks_scalars,
            grouped=is_group,
            lengths=self._lengths,
        )
        if len(inputs) < len(columns) and model.scalar_dtype is not None:  # stacked scalars
            return tuple(each.astype(model.scalar_dtype, copy=False) for each in inputs)
        return inputs

    # ---- in the thread that computes

    def _results(self, batches: Iterable[Batch]) -> Iterator[Scored]:
        done = 0
        for batch in batches:
            self._predict(batch, done)
            done += batch.rows
            yield from self._complete_pieces(done)
        yield from self._complete_pieces(done)  # those without a good row

    def _predict(self, batch: Batch, first: int) -> None:
        """Append the predictions of a batch, of which the first row has that number."""
        if batch.reasons and self._scoring.on_error == "raise":
            row, reason = next(iter(batch.reasons.items()))
            raise PredictionError(f"{self._name_good(first + row)} cannot be scored: {reason}")
        self._reasons.update({first + row: reason for row, reason in batch.reasons.items()})
        rows = batch.rows if batch.kept is None else len(batch.kept)
        numbers = first + (np.arange(rows) if batch.kept is None else batch.kept)
        inputs = batch.inputs
        if self._scoring.on_error == "null":
            inputs = _cut(inputs, slice(None))
        predictions = self._predicted(inputs, numbers)
        if batch.kept is not None:
            predictions = expanded(self._as_arrow([predictions], numbers), batch.kept, batch.rows)
        self._predictions.append(predictions)

    def _predicted(self, inputs: Arrays, numbers: np.ndarray) -> Predictions:
        if not len(numbers):
            return pa.nulls(0, self._scoring.target)
        try:
            return self._called(inputs, numbers)
        except (OutputError, InputError):
            raise
        except Exception as error:
            if self._scoring.on_error == "raise":
                raise self._refusal(inputs, numbers, error) from error
            if len(numbers) == 1:
                hint = memory_hint(error)
                self._reasons[int(numbers[0])] = f"{type(error).__name__}: {error}{hint}"
                return pa.nulls(1, self._scoring.target)
            half = len(numbers) // 2
            parts = (slice(None, half), slice(half, None))
            halves = [self._predicted(_cut(inputs, part), numbers[part]) for part in parts]
            return pa.concat_arrays(
                [
                    self._as_arrow([each], numbers[part])
                    for each, part in zip(halves, parts, strict=True)
                ]
            )

    def _called(self, inputs: Arrays, numbers: np.ndarray) -> Predictions:
        model = self._model.result()
        if model.expected_inputs not in {None, len(inputs)}:
            raise InputError(
                f"the model takes {model.expected_inputs} inputs and was given {len(inputs)}"
            )
        # A copy: a model may write to its inputs, and they may be needed again, to find bad rows.
        found = model(*(each.copy() for each in inputs))
        rows = len(inputs[0])
        if isinstance(found, np.ndarray) and found.ndim and len(found) == rows:
            return found  # several batches are converted at once
        return self._to_arrow(found, numbers)

    def _refusal(self, inputs: Arrays, numbers: np.ndarray, error: Exception) -> PredictionError:
        """Find the first row with which the model fails, in as many calls as the rows have bits."""
        cause: Exception = error
        while len(numbers) > 1:
            half = len(numbers) // 2
            for part in (slice(None, half), slice(half, None)):
                try:
                    self._called(_cut(inputs, part), numbers[part])
                except Exception as narrower:  # noqa: BLE001 - whatever the model raises
                    inputs, numbers, cause = _cut(inputs, part), numbers[part], narrower
                    break
            else:
                return PredictionError(
                    f"the model failed on {len(numbers)} rows at once, and with neither half of "
                    f"them: {type(error).__name__}: {error}{memory_hint(error)}"
                )
        return PredictionError(
            f"the model failed on {self._name_good(int(numbers[0]))}: "
            f"{type(cause).__name__}: {cause}{memory_hint(cause)}"
        )

    def _complete_pieces(self, done: int) -> Iterator[Scored]:
        while self._open and self._open[0].end <= done:
            piece = self._open.popleft()
            yield self._completed(piece)

    def _completed(self, piece: Piece) -> Scored:
        rows = piece.batch.num_rows
        predictions = self._take(piece.first, piece.end)
        if piece.good is not None:
            predictions = expanded(predictions, piece.good, rows)
        if self._scoring.on_error == "raise":
            return piece.batch, predictions, None
        reasons = dict(piece.reasons)
        for number in [each for each in self._reasons if each < piece.end]:
            reasons[piece.row_of(number)] = self._reasons.pop(number)
        if not reasons:
            return piece.batch, predictions, pa.nulls(rows, pa.string())
        places = sorted(reasons)
        texts = pa.array([reasons[row] for row in places], pa.string())
        return piece.batch, predictions, expanded(texts, np.array(places), rows)

    def _take(self, first: int, end: int) -> pa.Array:
        """Take the next predictions, which are those of these good rows."""
        taken: list[Predictions] = []
        count = end - first
        while count:
            values = self._predictions.popleft()
            if len(values) > count:
                self._predictions.appendleft(values[count:])
                values = values[:count]
            count -= len(values)
            taken.append(values)
        return self._as_arrow(taken, np.arange(first, end))

    def _as_arrow(self, parts: Sequence[Predictions], numbers: np.ndarray) -> pa.Array:
        """Convert predictions, those together that the model gave as arrays of one kind."""
        found: list[pa.Array] = []
        start = 0
        for kind, group in itertools.groupby(parts, _kind):
            alike = list(group)
            stop = start + sum(map(len, alike))
            if kind is None:
                found += alike
            else:
                array = alike[0] if len(alike) == 1 else np.concatenate(alike)
                found.append(self._to_arrow(array, numbers[start:stop]))
            start = stop
        if len(found) == 1:
            return found[0]
        return pa.concat_arrays(found) if found else pa.nulls(0, self._scoring.target)

    def _to_arrow(self, found: Any, numbers: np.ndarray) -> pa.Array:
        """Convert what the model gave for some rows; those that the type cannot hold are bad."""
        target, safe = self._scoring.target, self._scoring.safe
        try:
            return to_arrow(found, len(numbers), target, safe=safe)
        except OutputError:
            if self._scoring.on_error == "raise" or _rows_in(found) != len(numbers):
                raise
            converted, bad = to_arrow_by_row(found, len(numbers), target, safe=safe)
            self._reasons.update({int(numbers[row]): reason for row, reason in bad.items()})
            return converted

    # ---- naming rows

    def _name_good(self, number: int) -> str:
        piece = next(each for each in self._open if each.first <= number < each.end)
        return self._name(piece, piece.row_of(number))

    def _name(self, piece: Piece, row: int) -> str:
        from pyspark import TaskContext

        if self._scoring.keys:
            start = len(self._scoring.names)
            values = (piece.batch.column(start + n)[row].as_py() for n in itertools.count())
            pairs = zip(self._scoring.keys, values)  # noqa: B905 - the values go on
            return f"the row with {', '.join(f'{key}={value!r}' for key, value in pairs)}"
        context = TaskContext.get()
        where = "" if context is None else f" of partition {context.partitionId()}"
        return f"row {piece.before + row}{where} (key_columns would name it)"


def _inputs(batch: pa.RecordBatch, names: Sequence[str]) -> tuple[list[pa.Array], list[str], bool]:
    """Give the input columns with their names; a single struct is as many columns as fields."""
    columns = batch.columns[: len(names)]
    kind = columns[0].type
    if len(columns) > 1 or not pa.types.is_struct(kind) or is_vector(kind):
        return columns, list(names), False
    return columns[0].flatten(), [field.name for field in kind], True


def _rows_in(found: Any) -> int | None:
    """Count the rows that a model gave predictions for; None where they are no rows."""
    values = list(found.values()) if isinstance(found, Mapping) else [found]
    try:
        counts = {len(each) for each in values}
    except TypeError:
        return None
    return counts.pop() if len(counts) == 1 else None


def _kind(predictions: Predictions) -> tuple[Any, ...] | None:
    is_array = isinstance(predictions, np.ndarray)
    return (predictions.dtype, predictions.shape[1:]) if is_array else None


def _cut(inputs: Arrays, part: slice) -> Arrays:
    return tuple(as_one_array(each[part]) for each in inputs)
