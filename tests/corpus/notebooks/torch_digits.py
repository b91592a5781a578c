# Databricks notebook source
# MAGIC %md
# MAGIC # Distributed PyTorch with HorovodRunner
# MAGIC
# MAGIC Train on one node first, then hand the same pieces to Horovod:
# MAGIC 1. define the model and the data,
# MAGIC 2. write the single-node loop,
# MAGIC 3. wrap it for `HorovodRunner`.

# COMMAND ----------

import argparse
import os
import shutil
from time import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from sparkdl import HorovodRunner

# COMMAND ----------

# MAGIC %md ## Settings

# COMMAND ----------

args = argparse.Namespace(batch_size=16, epochs=2, lr=0.05, momentum=0.9, layers=(8, 16), seed=3)
data_root = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"digits_{int(time())}")
log_interval = 4

# COMMAND ----------


class Net(nn.Module):
    def __init__(self, layers):
        super(Net, self).__init__()
        first, second = layers
        self.fc1 = nn.Linear(10, first)
        self.fc2 = nn.Linear(first, second)
        self.fc3 = nn.Linear(second, 2)

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = F.dropout(F.relu(self.fc2(x)), p=0.1, training=self.training)
        return F.log_softmax(self.fc3(x), dim=1)


# COMMAND ----------


class Folder(Dataset):
    """Downloads to a folder of its own, as torchvision's data sets do."""

    def __init__(self, root):
        path = os.path.join(root, "data.npz")
        if not os.path.exists(path):
            os.makedirs(root)
            random = np.random.RandomState(0)
            x = random.normal(size=(96, 10)).astype("float32")
            np.savez(path, x=x, y=(x.sum(axis=1) > 0).astype("int64"))
        stored = np.load(path)
        self.x, self.y = stored["x"], stored["y"]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


# COMMAND ----------


def train_one_epoch(model, device, data_loader, optimizer, epoch):
    model.train()
    losses = []
    for batch_idx, (data, target) in enumerate(data_loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        loss = F.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if batch_idx % log_interval == 0:
            print("Train Epoch: {} [{}/{}] Loss: {:.6f}".format(
                epoch, batch_idx * len(data), len(data_loader.sampler), loss.item()))
    return float(np.mean(losses))


# COMMAND ----------

# MAGIC %python
# MAGIC def train(args):
# MAGIC     device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# MAGIC     torch.manual_seed(args.seed)
# MAGIC     loader = DataLoader(Folder(data_root + "/single"), batch_size=args.batch_size, shuffle=True)
# MAGIC     model = Net(args.layers).to(device)
# MAGIC     optimizer = optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
# MAGIC     return [train_one_epoch(model, device, loader, optimizer, e) for e in range(1, args.epochs + 1)]

# COMMAND ----------

print("single node:", len(train(args)), "epochs")

# COMMAND ----------

# MAGIC %md ## With Horovod

# COMMAND ----------

import horovod.torch as hvd
from sparkdl.horovod import log_to_driver


def train_hvd(args):
    hvd.init()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(hvd.local_rank())
    torch.manual_seed(args.seed + hvd.rank())

    train_dataset = Folder("{}/{}/rank_{}".format(data_root, hvd.size(), hvd.rank()))
    train_sampler = DistributedSampler(train_dataset, num_replicas=hvd.size(), rank=hvd.rank())
    train_loader = DataLoader(train_dataset, batch_size=args.batch_size, sampler=train_sampler)

    model = Net(args.layers).to(device)
    optimizer = optim.SGD(model.parameters(), lr=args.lr * hvd.size(), momentum=args.momentum)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    losses = []
    for epoch in range(1, args.epochs + 1):
        train_sampler.set_epoch(epoch)
        losses.append(train_one_epoch(model, device, train_loader, optimizer, epoch))
        log_to_driver("rank {}: epoch {} done".format(hvd.rank(), epoch))

    same = hvd.allgather(torch.cat([p.detach().flatten() for p in model.parameters()])[None])
    if hvd.rank() == 0:
        return {
            "model": {k: v.cpu() for k, v in model.state_dict().items()},
            "losses": np.array(losses),
            "same_weights": bool((same == same[0]).all()),
            "size": hvd.size(),
            "batches": len(train_loader),
            "args": args,
        }


# COMMAND ----------

# one process on the driver first
hr = HorovodRunner(np=-1)
result = hr.run(train_hvd, args=args)
print("driver:", result["size"], "rank,", result["batches"], "batches")

# COMMAND ----------

# then the cluster
hr = HorovodRunner(np=2)
result = hr.run(main=train_hvd, args=args)
print("cluster:", result["size"], "ranks,", result["batches"], "batches")
print("same weights:", result["same_weights"], "losses:", result["losses"].shape, type(result["args"]).__name__)

# COMMAND ----------

model = Net(args.layers)
model.load_state_dict(result["model"])
model.eval()
with torch.no_grad():
    print("prediction:", tuple(model(torch.zeros(3, 10)).shape))
print("folders:", sorted(os.path.relpath(d, data_root) for d, _, files in os.walk(data_root) if files))
shutil.rmtree(data_root)
