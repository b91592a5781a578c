# Databricks notebook source
# MAGIC %md
# MAGIC # Keras on several workers
# MAGIC Learning rate scaled by the number of workers, checkpoints on the first one alone, and a history
# MAGIC that comes back to the notebook.

# COMMAND ----------

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

# COMMAND ----------

import numpy as np
import tensorflow as tf
from tensorflow import keras
from tensorflow.keras import layers, models

from sparkdl import HorovodRunner
from sparkdl.horovod.tensorflow.keras import LogCallback

# COMMAND ----------

batch_size = 64
epochs = 2
num_classes = 4
checkpoint_dir = os.environ.get("TMPDIR", "/tmp") + "/keras_checkpoints"
os.makedirs(checkpoint_dir, exist_ok=True)

# COMMAND ----------


def get_dataset(num_classes, rank=0, size=1):
    random = np.random.RandomState(0)
    x_train = random.uniform(size=(256, 12)).astype("float32")
    y_train = keras.utils.to_categorical((x_train.sum(axis=1) * 7).astype(int) % num_classes, num_classes)
    return x_train[rank::size], y_train[rank::size]


def get_model(num_classes):
    model = models.Sequential()
    model.add(layers.Dense(16, activation="relu", input_shape=(12,)))
    model.add(layers.Dropout(0.25))
    model.add(layers.Dense(num_classes, activation="softmax"))
    return model


# COMMAND ----------

# Everything a function mentions travels with it: fine for a few numbers, slow for a data set.
images = np.random.RandomState(1).uniform(size=(1500, 28, 32)).astype("float64")
mean_image = images.mean(axis=0)

# COMMAND ----------


def train_hvd(checkpoint_path, learning_rate=1.0):
    import horovod.tensorflow.keras as hvd

    hvd.init()
    gpus = tf.config.experimental.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if gpus:
        tf.config.experimental.set_visible_devices(gpus[hvd.local_rank()], "GPU")

    x_train, y_train = get_dataset(num_classes, hvd.rank(), hvd.size())
    model = get_model(num_classes)
    optimizer = keras.optimizers.Adadelta(learning_rate=learning_rate * hvd.size())
    optimizer = hvd.DistributedOptimizer(optimizer)
    model.compile(optimizer=optimizer, loss="categorical_crossentropy", metrics=["accuracy"])

    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        LogCallback(),
    ]
    if hvd.rank() == 0:
        callbacks.append(
            keras.callbacks.ModelCheckpoint(checkpoint_path, save_weights_only=True)
        )
    history = model.fit(
        x_train, y_train, batch_size=batch_size, epochs=epochs, verbose=2 if hvd.rank() == 0 else 0,
        callbacks=callbacks,
    )
    weights = hvd.allgather(tf.concat([tf.reshape(w, [1, -1]) for w in model.trainable_weights], 1))
    equal = bool(np.ptp(weights.numpy(), axis=0).max() == 0)
    return history.history, equal, float((images[0] - mean_image).mean())


# COMMAND ----------

path = checkpoint_dir + "/checkpoint-{epoch}.weights.h5"
hr = HorovodRunner(np=spark.sparkContext.defaultParallelism, driver_log_verbosity="all")
history, equal, centred = hr.run(train_hvd, checkpoint_path=path, learning_rate=np.float32(0.1))

# COMMAND ----------

print("ranks:", spark.sparkContext.defaultParallelism)
print("history:", {name: len(values) for name, values in sorted(history.items())})
print("equal weights:", equal, "centred:", np.isclose(centred, (images[0] - mean_image).mean()))
model = get_model(num_classes)
model.load_weights(path.format(epoch=epochs))
print("loaded:", model.predict(get_dataset(num_classes)[0], verbose=0).shape)
