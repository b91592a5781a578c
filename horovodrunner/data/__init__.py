"""Spark DataFrames as training data: every rank gets its rows, and the same number of batches.

Runs in: the driver (storing) and the worker (reading).

::

    from horovodrunner import HorovodRunner, data

    train = data.from_dataframe(df)

    def main(epochs):
        for epoch in range(epochs):
            for batch in train.torch(batch_size=256, shuffle=True, seed=1, epoch=epoch):
                batch["features"]  # a tensor, (batch, features)

    HorovodRunner(np=4).run(main, epochs=3)
"""

from horovodrunner.data.batches import Batches
from horovodrunner.data.columns import NullPolicy, fill, fill_with_indicator, mask
from horovodrunner.data.create import from_arrow, from_dataframe
from horovodrunner.data.dataset import DataSet
from horovodrunner.data.images import decode_images
from horovodrunner.data.ragged import Ragged

__all__ = [
    "Batches",
    "DataSet",
    "NullPolicy",
    "Ragged",
    "decode_images",
    "fill",
    "fill_with_indicator",
    "from_arrow",
    "from_dataframe",
    "mask",
]
