# Databricks notebook source
# MAGIC %md
# MAGIC # From a Spark DataFrame to distributed Keras with Petastorm

# COMMAND ----------

import numpy as np
import tensorflow as tf
from tensorflow import keras

from petastorm import make_batch_reader
from petastorm.spark import SparkDatasetConverter, make_spark_converter
from petastorm.tf_utils import make_petastorm_dataset
from pyspark.ml.feature import VectorAssembler

from sparkdl import HorovodRunner

BATCH_SIZE = 16
EPOCHS = 4

# COMMAND ----------

random = np.random.RandomState(0)
values = random.normal(size=(203, 3))
rows = [(*map(float, row), int(row.sum() > 0)) for row in values]
df = spark.createDataFrame(rows, "a double, b double, c double, label int")
df = VectorAssembler(inputCols=["a", "b", "c"], outputCol="features").transform(df)
df_train, df_val = df.select("features", "label").randomSplit([0.8, 0.2], seed=1)

import os

root = os.environ["TMPDIR"]
spark.conf.set(SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF, "file://" + root + "/cache")
converter_train = make_spark_converter(df_train.repartition(2))
converter_val = make_spark_converter(df_val)
rows_train, rows_val = len(converter_train), len(converter_val)

# COMMAND ----------


def get_model(lr):
    model = keras.Sequential([keras.layers.Dense(8, activation="relu"), keras.layers.Dense(2)])
    model.build((None, 3))
    optimizer = keras.optimizers.Adam(learning_rate=lr)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return model, optimizer, loss


def train_hvd(lr=0.05):
    import horovod.tensorflow.keras as hvd

    hvd.init()
    keras.utils.set_random_seed(hvd.rank())
    model, optimizer, loss = get_model(lr)
    model.compile(optimizer=hvd.DistributedOptimizer(optimizer), loss=loss, metrics=["accuracy"])
    with converter_train.make_tf_dataset(batch_size=BATCH_SIZE, num_epochs=None,
                                         cur_shard=hvd.rank(), shard_count=hvd.size()) as train_dataset, \
         converter_val.make_tf_dataset(batch_size=BATCH_SIZE, num_epochs=None,
                                       cur_shard=hvd.rank(), shard_count=hvd.size()) as val_dataset:
        train_dataset = train_dataset.map(lambda x: (x.features, x.label))
        val_dataset = val_dataset.map(lambda x: (x.features, x.label))
        history = model.fit(
            train_dataset,
            steps_per_epoch=rows_train // (BATCH_SIZE * hvd.size()),
            epochs=EPOCHS,
            validation_data=val_dataset,
            validation_steps=max(1, rows_val // (BATCH_SIZE * hvd.size())),
            callbacks=[
                hvd.callbacks.BroadcastGlobalVariablesCallback(0),
                hvd.callbacks.MetricAverageCallback(),
            ],
            verbose=2 if hvd.rank() == 0 else 0,
        )
    dtype = str(train_dataset.element_spec[0].dtype.name)
    return history.history, model.get_weights(), dtype


# COMMAND ----------

history, weights, dtype = HorovodRunner(np=2).run(train_hvd)
print("dtype:", dtype, "epochs:", len(history["loss"]), "falls:", history["loss"][-1] < history["loss"][0])

# COMMAND ----------

# one node, once over the validation rows
model, optimizer, loss = get_model(0.1)
model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
model.set_weights(weights)
with converter_val.make_tf_dataset(num_epochs=1) as dataset:
    counted = sum(int(x.label.shape[0]) for x in dataset)
    _, accuracy = model.evaluate(dataset.map(lambda x: (x.features, x.label)), verbose=0)
print("rows:", counted == rows_val, "accurate:", accuracy > 0.8)

# COMMAND ----------

# MAGIC %md Parquet files that are there already

# COMMAND ----------

df.select("a", "label").write.parquet(root + "/parquet")
with make_batch_reader("file://" + root + "/parquet", num_epochs=1) as reader:
    dataset = make_petastorm_dataset(reader).unbatch().batch(50)
    print("parquet:", sum(int(x.a.shape[0]) for x in dataset), dataset.element_spec.a.dtype.name)
converter = make_spark_converter("file://" + root + "/parquet")
print("converted:", len(converter))
for each in (converter, converter_train, converter_val):
    each.delete()
print("left:", os.listdir(root + "/cache"))
