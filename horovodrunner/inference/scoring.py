"""One partition: rows in, predictions out. Runs in: Spark's Python workers.

A thread reads Spark's batches and converts them, one or two ahead; another one, where there is a
transform, makes the model's batches; and this one computes.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from horovodrunner.errors import HorovodRunnerError, PredictionError
from horovodrunner.inference.batching import Arrays, Batch, Piece, expanded, joined, rebatched
from horovodrunner.inference.halving import halves, narrowed
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
from horovodrunner.inference.loading import ModelHandle, load
from horovodrunner.inference.outputs import OutputError, to_arrow, to_arrow_by_row
from horovodrunner.inference.predictors import Predictor
from horovodrunner.inference.transforming import Transform, Transforming, transformed
from horovodrunner.memory_limit import memory_hint
from horovodrunner.prefetch import read_ahead

__all__ = ["Options", "Scored", "Scoring", "score"]

PIECES_AHEAD = 2
"""Batches of Spark's that are converted and wait; usually 10,000 rows each."""

Predictions: TypeAlias = "np.ndarray | pa.Array"

Scored = tuple[pa.RecordBatch, pa.Array, "pa.Array | None"]
"""Rows as they came, their predictions, and with on_error="null" what is wrong with them."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asked for, checked: see :func:`horovodrunner.inference.predict_udf`."""

    batch_size: int
    plan: InputPlan
    on_error: str = "raise"
    keys: tuple[str, ...] = ()
    transform: Transform | None = None
    transform_workers: int = 0
    prefetch: int = 2


@dataclass(frozen=True, kw_only=True)
class Scoring(Options):
    """What is to be done; travels in the pickled function."""

    model: ModelHandle
    target: pa.DataType
    safe: bool
    """Whether a prediction that the type cannot hold is an error, rather than cut."""
    names: tuple[str, ...]
    """Names of the input columns: the first ones of each batch, before those of the keys."""


def score(scoring: Scoring, batches: Iterator[pa.RecordBatch]) -> Iterator[Scored]:
    """Apply the model to a partition, whose columns are inputs, then keys, then any others."""
    first = next(batches, None)
    if first is None:
        return  # no rows, no model
    try:
        model = load(scoring.model)
        yield from _Partition(scoring, model).scored(first, batches)
    except HorovodRunnerError:
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        if hint := memory_hint(error):
            raise PredictionError(
                f"memory ran out in Spark's Python worker: {type(error).__name__}: {error}{hint}"
            ) from error
        raise


class _Partition:
    def __init__(self, scoring: Scoring, model: Predictor) -> None:
        self._scoring = scoring
        self._model = model
        self._finds_all = scoring.on_error == "null"
        self._usual_shape = UsualShape() if self._finds_all else None
        self._open: deque[Piece] = deque()
        self._predictions: deque[tuple[np.ndarray, Predictions]] = deque()

    def scored(self, first: pa.RecordBatch, others: Iterator[pa.RecordBatch]) -> Iterator[Scored]:
        scoring = self._scoring
        stretches = self._stretches(itertools.chain([first], others))
        with read_ahead(stretches, PIECES_AHEAD) as ahead:
            rows = rebatched(ahead, scoring.batch_size, may_differ=self._finds_all)
            if scoring.transform is None:
                yield from self._results(Batch(each[0], each[1:]) for each in rows)
                return
            with transformed(
                rows,
                Transforming(
                    scoring.transform, _inputs(first, scoring.names)[1], find_all=self._finds_all
                ),
                workers=scoring.transform_workers,
                prefetch=scoring.prefetch,
            ) as batches:
                yield from self._results(batches)

    # ---- in the thread that reads

    def _stretches(self, batches: Iterable[pa.RecordBatch]) -> Iterator[Arrays]:
        """Yield the arrays of each batch of Spark's, the rows' numbers before the inputs."""
        start = 0
        for batch in batches:
            piece = Piece(batch, start)
            self._open.append(piece)
            arrays = self._converted(piece)
            start = piece.stop
            if len(arrays[0]):
                yield arrays

    def _converted(self, piece: Piece) -> Arrays:
        columns, names, is_group = _inputs(piece.batch, self._scoring.names)
        numbers = np.arange(piece.start, piece.stop)
        while True:
            try:
                absent = null_rows(columns, names, self._scoring.plan)
                if absent is None:
                    return (numbers, *self._as_numpy(columns, names, is_group))
                left = np.flatnonzero(~absent)
            except BadRows as bad:
                self._note({int(numbers[row]): reason for row, reason in bad.rows.items()})
                left = np.setdiff1d(np.arange(len(numbers)), list(bad.rows))
            numbers = numbers[left]
            columns = [each.take(pa.array(left)) for each in columns]

    def _as_numpy(self, columns: list[pa.Array], names: Sequence[str], is_group: bool) -> Arrays:
        if self._scoring.transform is not None:
            return tuple(map(to_numpy, columns, names))
        inputs = numpy_inputs(
            columns,
            names,
            self._scoring.plan,
            expected=self._model.expected_inputs,
            stacks_scalars=self._model.stacks_scalars,
            grouped=is_group,
            usual_shape=self._usual_shape,
        )
        if len(inputs) < len(columns) and self._model.scalar_dtype is not None:  # stacked scalars
            return tuple(each.astype(self._model.scalar_dtype, copy=False) for each in inputs)
        return inputs

    # ---- in the thread that computes

    def _results(self, batches: Iterable[Batch]) -> Iterator[Scored]:
        for batch in batches:
            self._note(batch.reasons)
            if len(batch.numbers):
                predictions = self._predicted(batch.numbers, batch.inputs)
                self._predictions.append((batch.numbers, predictions))
            yield from self._completed(batch.stop)
        yield from self._completed(math.inf)  # those whose last rows were left out

    def _predicted(self, numbers: np.ndarray, inputs: Arrays) -> Predictions:
        def attempt(part: slice) -> Predictions:
            return self._called(numbers[part], tuple(as_one_array(each[part]) for each in inputs))

        fatal = (OutputError, InputError)
        if self._finds_all:
            parts = []
            for part, found in halves(len(numbers), attempt, fatal=fatal):
                if isinstance(found, Exception):
                    reason = f"{type(found).__name__}: {found}{memory_hint(found)}"
                    self._note({int(numbers[part.start]): reason})
                    found = pa.nulls(1, self._scoring.target)  # noqa: PLW2901
                parts.append((numbers[part], found))
            return parts[0][1] if len(parts) == 1 else self._as_arrow(parts)
        try:
            return self._called(numbers, inputs)
        except fatal:
            raise
        except Exception as error:
            part, cause = narrowed(len(numbers), attempt, error)
            if (rows := part.stop - part.start) == 1:
                what = self._name(int(numbers[part.start]))
            else:
                what, cause = f"{rows} rows at once, and with neither half of them", error
            raise PredictionError(
                f"the model failed on {what}: {type(cause).__name__}: {cause}{memory_hint(cause)}"
            ) from error

    def _called(self, numbers: np.ndarray, inputs: Arrays) -> Predictions:
        if self._model.expected_inputs not in {None, len(inputs)}:
            raise InputError(
                f"the model takes {self._model.expected_inputs} inputs and was given {len(inputs)}"
            )
        # A copy: a model may write to its inputs, and they may be needed again, to find bad rows.
        found = self._model(*(each.copy() for each in inputs))
        if isinstance(found, np.ndarray) and found.ndim and len(found) == len(numbers):
            return found  # several batches are converted at once
        return self._to_arrow(numbers, found)

    def _completed(self, stop: float) -> Iterator[Scored]:
        """Yield the pieces of which all rows before that number are scored."""
        while self._open and self._open[0].stop <= stop:
            piece = self._open[0]
            rows = piece.batch.num_rows
            numbers, predictions = self._take(piece.stop)
            if len(numbers) < rows:
                predictions = expanded(predictions, numbers - piece.start, rows)
            errors = None
            if self._finds_all:
                bad = sorted(piece.reasons)
                texts = pa.array([piece.reasons[number] for number in bad], pa.string())
                errors = expanded(texts, np.array(bad, np.int64) - piece.start, rows)
            self._open.popleft()
            yield piece.batch, predictions, errors

    def _take(self, stop: int) -> tuple[np.ndarray, pa.Array]:
        """Take the next predictions, up to the row with that number."""
        taken = []
        while self._predictions and self._predictions[0][0][0] < stop:
            numbers, values = self._predictions.popleft()
            if numbers[-1] >= stop:
                count = np.searchsorted(numbers, stop)
                self._predictions.appendleft((numbers[count:], values[count:]))
                numbers, values = numbers[:count], values[:count]
            taken.append((numbers, values))
        numbers = np.concatenate([np.arange(0), *(each for each, _ in taken)])
        return numbers, self._as_arrow(taken)

    def _as_arrow(self, parts: Sequence[tuple[np.ndarray, Predictions]]) -> pa.Array:
        """Convert predictions, those together that the model gave as arrays of one kind."""
        found: list[pa.Array] = []
        for kind, group in itertools.groupby(parts, lambda part: _kind(part[1])):
            if kind is None:
                found += [values for _, values in group]
            else:
                found.append(self._to_arrow(*joined(list(group))))
        if len(found) == 1:
            return found[0]
        return pa.concat_arrays(found) if found else pa.nulls(0, self._scoring.target)

    def _to_arrow(self, numbers: np.ndarray, found: Any) -> pa.Array:
        """Convert what the model gave for some rows; those that the type cannot hold are bad."""
        target, safe = self._scoring.target, self._scoring.safe
        try:
            return to_arrow(found, len(numbers), target, safe=safe)
        except OutputError:
            if not self._finds_all or _rows_in(found) != len(numbers):
                raise
            converted, bad = to_arrow_by_row(found, len(numbers), target, safe=safe)
            self._note({int(numbers[row]): reason for row, reason in bad.items()})
            return converted

    # ---- in both

    def _note(self, reasons: Mapping[int, str]) -> None:
        """Keep why rows cannot be scored, or raise that."""
        for number, reason in reasons.items():
            if not self._finds_all:
                raise PredictionError(f"{self._name(number)} cannot be scored: {reason}") from None
            self._piece_of(number).reasons[number] = reason

    def _piece_of(self, number: int) -> Piece:
        # a copy, which takes no notice of the other thread
        return next(each for each in tuple(self._open) if each.start <= number < each.stop)

    def _name(self, number: int) -> str:
        from pyspark import TaskContext

        piece = self._piece_of(number)
        if keys := self._scoring.keys:
            columns = piece.batch.columns[len(self._scoring.names) :]
            values = (column[number - piece.start].as_py() for column in columns)
            pairs = zip(keys, values, strict=False)  # columns that are no keys come after them
            return f"the row with {', '.join(f'{key}={value!r}' for key, value in pairs)}"
        context = TaskContext.get()
        where = "" if context is None else f" of partition {context.partitionId()}"
        return f"row {number}{where} (key_columns would name it)"


def _inputs(batch: pa.RecordBatch, names: Sequence[str]) -> tuple[list[pa.Array], list[str], bool]:
    """Return the input columns, their names, and whether they were one struct's fields."""
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
