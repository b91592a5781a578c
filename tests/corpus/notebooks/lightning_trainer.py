# Databricks notebook source
# MAGIC %md
# MAGIC # Lightning's Trainer on every worker
# MAGIC `DDP` finds its place in the variables that torchrun sets, too.

# COMMAND ----------

import os

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from horovodrunner.callbacks.lightning import LogCallback
from sparkdl import HorovodRunner

# COMMAND ----------

MAX_EPOCHS = 2
BATCH_SIZE = 8

# COMMAND ----------


class Regression(pl.LightningModule):
    def __init__(self, hidden=4, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("train_loss", loss, on_epoch=True, on_step=False, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


# COMMAND ----------


def make_loader():
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    return DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=BATCH_SIZE, shuffle=True)


def main(hidden, distributed):
    options = dict(devices=1)
    if distributed:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        options = dict(
            devices=local,
            num_nodes=int(os.environ["WORLD_SIZE"]) // local,
            strategy="ddp",
            plugins=[TorchElasticEnvironment()],
        )
    pl.seed_everything(1)
    model = Regression(hidden=hidden)
    trainer = pl.Trainer(
        max_epochs=MAX_EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[LogCallback()], **options,
    )
    trainer.fit(model, make_loader())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return dict(model.hparams), float(trainer.callback_metrics["train_loss"]), trainer.global_step, state


# COMMAND ----------

hparams, loss, steps, _ = HorovodRunner(np=-1).run(main, hidden=4, distributed=False)
print("alone:", hparams, steps, "steps")

# COMMAND ----------

hparams, loss, steps, state = HorovodRunner(np=2).run(main, hidden=4, distributed=True)
print("together:", hparams, steps, "steps")
model = Regression(**hparams)
model.load_state_dict(state)
print("loss:", loss > 0, "prediction:", tuple(model.net(torch.zeros(2, 3)).shape))
