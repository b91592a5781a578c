# Databricks notebook source
# MAGIC %md
# MAGIC # Images in a Spark DataFrame, PyTorch and HorovodRunner
# MAGIC
# MAGIC 1. Load the images with Spark and convert the DataFrame with Petastorm.
# MAGIC 2. Feed it to a single-node PyTorch model.
# MAGIC 3. Feed it to distributed training.

# COMMAND ----------

import io
import os

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
from PIL import Image
from pyspark.sql.functions import col

from petastorm import TransformSpec
from petastorm.spark import SparkDatasetConverter, make_spark_converter

import horovod.torch as hvd
from sparkdl import HorovodRunner

BATCH_SIZE = 8
NUM_EPOCHS = 3

# COMMAND ----------

# MAGIC %md ## 1. The DataFrame


# COMMAND ----------

def picture(bright, number):
    """A PNG file of 12 x 10 pixels, dark or bright, with some noise."""
    noise = np.random.RandomState(number).randint(0, 60, size=(10, 12, 3))
    buffer = io.BytesIO()
    Image.fromarray((noise + 150 * bright).astype("uint8")).save(buffer, format="PNG")
    return buffer.getvalue()


rows = [(bytearray(picture(n % 2, n)), "bright" if n % 2 else "dark") for n in range(90)]
df = spark.createDataFrame(rows, "content binary, label string").repartition(3)

df = df.withColumn("label_index", (col("label") == "dark").cast("long")).select("content", "label_index")
df_train, df_val = df.randomSplit([0.8, 0.2], seed=12345)

# COMMAND ----------

# Set a cache directory on DBFS FUSE for intermediate data.
cache_dir = os.environ["TMPDIR"] + "/petastorm/cache"
spark.conf.set(SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF, "file://" + cache_dir)

converter_train = make_spark_converter(df_train)
converter_val = make_spark_converter(df_val)
print(f"train: {len(converter_train)}, val: {len(converter_val)}, cached: {len(os.listdir(cache_dir))}")

# COMMAND ----------

# MAGIC %md ## 2. One node


# COMMAND ----------

def get_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def preprocess(content):
    image = Image.open(io.BytesIO(content)).resize((8, 8))
    return (np.asarray(image, dtype="float32").transpose(2, 0, 1) / 255).copy()


def transform_row(pd_batch):
    """The input and output of this function are pandas dataframes."""
    pd_batch["features"] = pd_batch["content"].map(lambda x: preprocess(x))
    pd_batch = pd_batch.drop(labels=["content"], axis=1)
    return pd_batch


def get_transform_spec():
    return TransformSpec(
        transform_row,
        edit_fields=[("features", np.float32, (3, 8, 8), False)],
        selected_fields=["features", "label_index"],
    )


# COMMAND ----------

def run_one_epoch(model, criterion, optimizer, dataloader_iter, steps, device):
    model.train(optimizer is not None)
    running_loss, running_corrects, rows = 0.0, 0, 0
    for step in range(steps):
        pd_batch = next(dataloader_iter)
        inputs, labels = pd_batch["features"].to(device), pd_batch["label_index"].to(device)
        with torch.set_grad_enabled(optimizer is not None):
            outputs = model(inputs)
            loss = criterion(outputs, labels)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        running_loss += loss.item()
        running_corrects += torch.sum(outputs.argmax(1) == labels).item()
        rows += len(labels)
    return running_loss / steps, running_corrects / rows


def train_and_evaluate(lr=0.1):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = get_model().to(device)
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    with converter_train.make_torch_dataloader(transform_spec=get_transform_spec(),
                                               batch_size=BATCH_SIZE) as train_dataloader, \
         converter_val.make_torch_dataloader(transform_spec=get_transform_spec(),
                                             batch_size=BATCH_SIZE) as val_dataloader:
        train_dataloader_iter = iter(train_dataloader)
        steps_per_epoch = len(converter_train) // BATCH_SIZE
        val_dataloader_iter = iter(val_dataloader)
        validation_steps = max(1, len(converter_val) // BATCH_SIZE)
        for epoch in range(NUM_EPOCHS):
            loss, acc = run_one_epoch(
                model, criterion, optimizer, train_dataloader_iter, steps_per_epoch, device)
        return run_one_epoch(model, criterion, None, val_dataloader_iter, validation_steps, device)


loss, acc = train_and_evaluate()
print("one node: accurate:", acc > 0.9)

# COMMAND ----------

# MAGIC %md ## 3. Distributed


# COMMAND ----------

def metric_average(val, name):
    return hvd.allreduce(torch.tensor(val), name=name).item()


def train_and_evaluate_hvd(lr=0.05):
    hvd.init()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(hvd.local_rank())

    model = get_model().to(device)
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr * hvd.size())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer_hvd = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

    with converter_train.make_torch_dataloader(transform_spec=get_transform_spec(),
                                               cur_shard=hvd.rank(), shard_count=hvd.size(),
                                               batch_size=BATCH_SIZE) as train_dataloader:
        train_dataloader_iter = iter(train_dataloader)
        steps_per_epoch = len(converter_train) // (BATCH_SIZE * hvd.size())
        for epoch in range(NUM_EPOCHS):
            run_one_epoch(
                model, criterion, optimizer_hvd, train_dataloader_iter, steps_per_epoch, device)

    # one pass over the loader: every rank takes as many batches as the others
    batches, rows = 0, 0
    for epoch in range(2):
        with converter_train.make_torch_dataloader(num_epochs=1, cur_shard=hvd.rank(),
                                                   shard_count=hvd.size(), batch_size=BATCH_SIZE,
                                                   schema_fields=["label_index"]) as dataloader:
            for batch in dataloader:
                rows += hvd.allreduce(torch.tensor(len(batch["label_index"])), op=hvd.Sum).item()
                batches += 1

    with converter_val.make_torch_dataloader(num_epochs=1, transform_spec=get_transform_spec(),
                                             cur_shard=hvd.rank(), shard_count=hvd.size(),
                                             batch_size=BATCH_SIZE) as val_dataloader:
        steps = [run_one_epoch(model, criterion, None, iter([batch]), 1, device) for batch in val_dataloader]
    val_acc = metric_average(float(np.mean([acc for _, acc in steps])), "avg_acc")
    return val_acc, batches, rows


# COMMAND ----------

hr = HorovodRunner(np=2)  # this assumes the cluster consists of two workers
acc, batches, rows = hr.run(train_and_evaluate_hvd)
expected = -(-len(converter_train) // (BATCH_SIZE * 2))
print("distributed: accurate:", acc > 0.9, "batches:", batches == 2 * expected)
print("rows:", 0 <= rows - 2 * len(converter_train) <= 2)

# COMMAND ----------

converter_train.delete()
converter_val.delete()
print("left:", os.listdir(cache_dir))
