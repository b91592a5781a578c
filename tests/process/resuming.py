"""Trainings that go on from checkpoints; every rank returns what is to be equal."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

ROWS, BATCH = 88, 4


def rows_of(rank: int) -> tuple[Any, Any]:
    """Return the share of one of two ranks: 11 batches of 4."""
    x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("float32")
    return x[rank::2], x.sum(axis=1, keepdims=True)[rank::2]


def fit_lightning(package: str, epochs: int, every_steps: int | None, workers: int = 0) -> Any:
    """Train with DDP, random rows, noise in the data, dropout, and two schedules."""
    import importlib
    import logging
    import warnings

    import torch

    lightning = importlib.import_module(package)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning|pytorch_lightning|torch")
    torch.set_num_threads(1)

    from horovodrunner import metrics
    from horovodrunner.callbacks.lightning import CheckpointCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(3, 8),
                torch.nn.BatchNorm1d(8),
                torch.nn.Dropout(0.5),
                torch.nn.Linear(8, 1),
            )

        def training_step(self, batch: Any, number: int) -> Any:
            metrics.report(self.trainer.global_step)
            return torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1])

        def validation_step(self, batch: Any, number: int) -> None:
            loss = torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1])
            self.log("val_loss", loss, sync_dist=True)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
            decay = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
            # a threshold that no epoch comes up to
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, patience=0, factor=0.5, threshold=0.99
            )
            return [optimizer], [
                {"scheduler": decay, "interval": "step"},
                {"scheduler": plateau, "monitor": "val_loss"},
            ]

    class Noisy(torch.utils.data.Dataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, index: int) -> Any:
            row = torch.full((3,), index / ROWS) + torch.randn(3)
            return row, row.sum(dim=0, keepdim=True)

    torch.manual_seed(5 + int(os.environ["RANK"]))
    data = torch.utils.data.DataLoader(Noisy(), BATCH, shuffle=True, num_workers=workers)
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[CheckpointCallback(every_steps=every_steps)],
        strategy="ddp",
        devices=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, torch.utils.data.DataLoader(Noisy(), 44))
    optimizer = trainer.optimizers[0]
    return module.state_dict(), optimizer.state_dict()["state"], optimizer.param_groups[0]["lr"]


def fit_keras(backend: str, epochs: int, every_steps: int | None, **options: Any) -> Any:
    """Train with Horovod, random rows, dropout, and callbacks that have a state.

    Parameters
    ----------
    options
        ``is_built``: whether the model is before ``fit()``; the rest is for ``compile()``.
    """
    os.environ.update(KERAS_BACKEND=backend, TF_NUM_INTRAOP_THREADS="1")
    if backend == "tensorflow":
        import horovod.tensorflow.keras as hvd
    else:
        import horovod.keras as hvd
    import keras

    from horovodrunner.callbacks.keras import CheckpointCallback, MetricsCallback

    hvd.init()
    keras.utils.set_random_seed(7 + hvd.rank())
    model = keras.Sequential(
        [
            *([keras.Input((3,))] if options.pop("is_built", True) else []),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1),
        ]
    )
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01, momentum=0.9))
    model.compile(optimizer, "mse", metrics=["mae"], **options)
    x, y = rows_of(hvd.rank())
    history = model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=epochs,
        validation_data=(x, y),
        verbose=0,
        callbacks=[
            CheckpointCallback(every_steps=every_steps),
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.MetricAverageCallback(),
            hvd.callbacks.LearningRateWarmupCallback(initial_lr=0.02, warmup_epochs=2),
            keras.callbacks.ReduceLROnPlateau("val_loss", min_delta=9, patience=0, factor=0.5),
            MetricsCallback(per_batch=True),
        ],
    )
    optimizer_state = [keras.ops.convert_to_numpy(each.value) for each in optimizer.variables]
    return model.get_weights(), optimizer_state, sorted(history.history.items()), history.epoch


def train_torch(rows: Any, epochs: int) -> Any:
    """Train with Horovod, random rows, dropout and a schedule, in a loop of one's own."""
    import horovod.torch as hvd
    import torch

    from horovodrunner import checkpoint

    hvd.init()
    torch.manual_seed(7 + hvd.rank())
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.02)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9),
        "batches": rows.torch(batch_size=BATCH, shuffle=True, seed=1),
        "random": checkpoint.RandomState(),
    }
    step = checkpoint.load_torch(**state)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    while state["batches"].epoch < epochs:
        for batch in state["batches"]:
            optimizer.zero_grad()
            noisy = batch["x"] + torch.randn(len(batch["x"]), 3)
            torch.nn.functional.mse_loss(model(noisy)[:, 0], batch["y"]).backward()
            optimizer.step()
            state["schedule"].step()
            checkpoint.save_torch(step, **state)
            step += 1
    own = hvd.allgather(torch.rand(1))  # what this rank's generator comes to in the end
    return model.state_dict(), own, step
