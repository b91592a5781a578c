"""A reader as a tf.data.Dataset. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from horovodrunner.compat.absent import PETASTORM, refuse_names
from horovodrunner.compat.petastorm.schema import Field

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["make_petastorm_dataset"]

__getattr__ = refuse_names("petastorm.tf_utils", PETASTORM)


def make_petastorm_dataset(reader: Any) -> tf.data.Dataset:
    """Make a TensorFlow dataset of what ``make_batch_reader`` gives.

    Its elements are namedtuples of tensors by column name, a row group each:
    ``.unbatch().batch(32)`` makes batches. Dates and timestamps are nanoseconds since 1970,
    decimals strings.
    """
    import tensorflow as tf

    from horovodrunner.data.tf_dataset import refuse_a_digest

    fields = reader.schema.fields.values()
    row = reader.schema.row_class

    def batches() -> Iterator[tuple[Any, ...]]:
        refuse_a_digest()
        if reader.last_row_consumed:
            reader.reset()
        for batch in reader:
            yield tuple(map(_values, batch, fields))

    signature = tuple(tf.TensorSpec((None, *each.shape), _dtype(each)) for each in fields)
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    if reader.num_epochs is None:
        endless = tf.data.experimental.INFINITE_CARDINALITY
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(endless))
    return dataset.map(row)


def _dtype(field: Field) -> Any:
    import tensorflow as tf

    if field.numpy_dtype in (np.str_, str, np.bytes_, bytes, Decimal):
        return tf.string
    if field.numpy_dtype is np.datetime64:
        return tf.int64
    return tf.as_dtype(field.numpy_dtype)


def _values(values: Any, field: Field) -> Any:
    if field.numpy_dtype is Decimal:
        return [str(each) for each in values]
    if field.numpy_dtype is np.datetime64:
        return values.astype("datetime64[ns]").view(np.int64)
    return values
