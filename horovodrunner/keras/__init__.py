"""Horovod for Keras 3: the optimizer, the callbacks and load_model. Runs in: the worker.

Horovod's own ``horovod.tensorflow.keras`` hooks into methods that Keras 3 no longer calls, so its
``DistributedOptimizer`` silently trains without averaging. The names here are Horovod's, with its
signatures, for Keras 3 on TensorFlow and on torch. In a worker, ``import
horovod.tensorflow.keras as hvd`` and ``import horovod.keras as hvd`` already have them
(:mod:`horovodrunner.processes.worker.horovod_keras`); elsewhere, under ``horovodrun`` say::

    import horovod.tensorflow as hvd
    import keras
    from horovodrunner.keras import BroadcastGlobalVariablesCallback, DistributedOptimizer

    def main():
        hvd.init()
        model = ...
        model.compile(optimizer=DistributedOptimizer(keras.optimizers.Adam(1e-3 * hvd.size())), ...)
        model.fit(..., callbacks=[BroadcastGlobalVariablesCallback(0)])
"""

from horovodrunner.keras.callbacks import (
    BestModelCheckpoint,
    BroadcastGlobalVariablesCallback,
    LearningRateScheduleCallback,
    LearningRateWarmupCallback,
    MetricAverageCallback,
)
from horovodrunner.keras.optimizer import DistributedOptimizer, load_model

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "DistributedOptimizer",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "load_model",
]
