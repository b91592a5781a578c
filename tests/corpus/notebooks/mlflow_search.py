# Databricks notebook source
# MAGIC %md
# MAGIC # Tracking distributed runs with MLflow
# MAGIC The run is started on the driver; the first worker logs into it.

# COMMAND ----------

import os
import tempfile

import mlflow
import numpy as np
import torch
from mlflow.tracking import MlflowClient
from sparkdl import HorovodRunner

# COMMAND ----------

# On Databricks this is set already, with a token; here a folder stands in for the server.
os.environ["MLFLOW_TRACKING_URI"] = "file://" + tempfile.mkdtemp(prefix="mlruns_")
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
mlflow.set_experiment("horovod")

# COMMAND ----------

features = np.linspace(-1, 1, 64, dtype="float32").reshape(-1, 1)
labels = 3 * features - 1

# COMMAND ----------


def fit_line(lr, steps, momentum=0.0):
    import horovod.torch as hvd

    x = torch.from_numpy(features[hvd.rank() :: hvd.size()])
    y = torch.from_numpy(labels[hvd.rank() :: hvd.size()])
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    for step in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        yield step, hvd.allreduce(loss.detach(), name="loss").item()


# COMMAND ----------


def train(run_id, lr, steps, momenta, shape):
    import horovod.torch as hvd

    hvd.init()
    last = []
    for momentum in momenta:
        for step, loss in fit_line(lr, steps, momentum):
            if hvd.rank() == 0:
                with mlflow.start_run(run_id=run_id):
                    mlflow.log_metric(f"loss_{momentum}", loss, step=step)
        last.append(np.float64(loss))
    if hvd.rank() == 0:
        MlflowClient().set_tag(run_id, "ranks", hvd.size())
    return tuple(last), shape, lr, momenta


# COMMAND ----------

hr = HorovodRunner(np=2)
with mlflow.start_run(run_name="two workers") as run:
    mlflow.log_param("lr", 0.1)
    run_id = run.info.run_id

losses, shape, lr, momenta = hr.run(
    main=train, run_id=run_id, lr=np.float32(0.1), steps=np.int64(3), momenta=[0.0, 0.5], shape=(28, 28, 1)
)

# COMMAND ----------

print("losses:", type(losses).__name__, [type(loss).__name__ for loss in losses])
print("back:", shape, type(lr).__name__, momenta)

# COMMAND ----------

client = MlflowClient()
seen = client.get_run(run_id).data
history = client.get_metric_history(run_id, "loss_0.5")
print("tracked:", sorted(seen.metrics), seen.tags["ranks"], [metric.step for metric in history])
print("the last is the same:", bool(np.isclose(history[-1].value, losses[-1])))

# COMMAND ----------

# MAGIC %md ## Autologging of Keras, with Petastorm's converter

# COMMAND ----------

from petastorm.spark import SparkDatasetConverter, make_spark_converter

spark.conf.set(SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF, "file://" + tempfile.mkdtemp(prefix="petastorm_"))
converter = make_spark_converter(spark.range(64).selectExpr("cast(id / 64 as float) x", "cast(id / 32 as float) y"))


def train_keras(run_id):
    import horovod.tensorflow.keras as hvd
    import keras

    hvd.init()
    if hvd.rank() == 0:
        mlflow.keras.autolog(log_models=False)
        mlflow.start_run(run_id=run_id)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    with converter.make_tf_dataset(batch_size=8, cur_shard=hvd.rank(), shard_count=hvd.size()) as dataset:
        pairs = dataset.map(lambda row: (row.x[:, None], row.y))
        history = model.fit(pairs, steps_per_epoch=len(converter) // (8 * hvd.size()), epochs=2, verbose=0)
    return len(history.history["loss"])


with mlflow.start_run() as run:
    pass
epochs = HorovodRunner(np=-2).run(train_keras, run_id=run.info.run_id)
print("autologged:", epochs, sorted(client.get_run(run.info.run_id).data.metrics))
converter.delete()
