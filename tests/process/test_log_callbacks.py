"""LogCallbacks in real workers: what arrives on the driver from each framework."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

from horovodrunner import HorovodRunner
from horovodrunner.callbacks.keras import LogCallback


def lines_of(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """Return the LogCallbacks' lines, numbers and times made equal."""
    found = re.findall(r"^(?:rank \d: )?epoch .*$", capfd.readouterr().out, re.MULTILINE)
    return [re.sub(r"(?<![\w.])\d+\.\d+(e-\d+)?(?!\w)", "N", line) for line in found]


def fit(keras: Any, callbacks: list[Any]) -> Any:
    """Train a linear model for two epochs of two batches."""
    import numpy as np

    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    x, y = np.ones((8, 2), "float32"), np.ones((8, 1), "float32")
    options = {"batch_size": 4, "epochs": 2, "verbose": 0, "callbacks": callbacks}
    return model.fit(x, y, validation_data=(x, y), **options)


def test_keras_3_without_tensorflow(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> list[str]:
        # The class is in main's globals: that alone imports no Keras.
        import os
        import sys

        os.environ["KERAS_BACKEND"] = "torch"
        import cloudpickle
        import keras

        callback = cloudpickle.loads(cloudpickle.dumps(LogCallback()))
        assert isinstance(callback, keras.callbacks.Callback)
        fit(keras, [callback])
        assert keras.__version__.startswith("3.")
        return sorted({"tensorflow", "tf_keras"} & sys.modules.keys())

    assert HorovodRunner(np=-1).run(main) == []
    assert lines_of(capfd) == [
        "epoch 1 of 2 begins",
        "epoch 1 of 2: loss N, mae N, val_loss N, val_mae N (N s)",
        "epoch 2 of 2 begins",
        "epoch 2 of 2: loss N, mae N, val_loss N, val_mae N (N s)",
    ]


class Own(LogCallback):
    """Somebody's subclass."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, {"own": 7, "loss": logs["loss"]})


OWN_LINES = [
    "epoch 1 of 2 begins",
    "epoch 1 of 2, batch 1 of 2: loss N, mae N",
    "epoch 1 of 2, batch 2 of 2: loss N, mae N",
    "epoch 1 of 2: own 7, loss N (N s)",
    "epoch 2 of 2 begins",
    "epoch 2 of 2, batch 1 of 2: loss N, mae N",
    "epoch 2 of 2, batch 2 of 2: loss N, mae N",
    "epoch 2 of 2: own 7, loss N (N s)",
]


@pytest.mark.slow
def test_legacy_keras(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> str:
        import tensorflow as tf

        for other in ("horovodrunner", "keras"):  # horovod.tensorflow.keras imports Keras 3, too
            importlib.import_module(other)
            callback = Own(per_batch_log=True)
            fit(tf.keras, [callback])
            assert isinstance(callback, tf.keras.callbacks.Callback)
        return str(tf.keras.__name__)

    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    assert "tf_keras" in HorovodRunner(np=-1).run(main)
    assert lines_of(capfd) == OWN_LINES + OWN_LINES


def test_tf_keras_beside_keras_3(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> list[str]:
        import tensorflow as tf
        import tf_keras

        for keras in (tf_keras, tf.keras):
            fit(keras, [Own(per_batch_log=True)])
        return [tf_keras.__version__[:2], tf.keras.__version__[:2]]

    assert HorovodRunner(np=-1).run(main) == ["2.", "3."]
    assert lines_of(capfd) == OWN_LINES + OWN_LINES


def fit_lightning(package: str, **options: Any) -> None:
    """Train a linear model for two epochs of two batches with a Trainer that has these options."""
    import torch

    lightning: Any = importlib.import_module(package)

    class Model(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.layer(batch[0]).square().mean()
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self.layer(batch[0]).square().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.001)

    data = torch.utils.data.TensorDataset(torch.ones(8, 2))
    trainer = lightning.Trainer(
        max_epochs=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **options,
    )
    loaders = [torch.utils.data.DataLoader(data, batch_size=4) for _ in range(2)]
    trainer.fit(Model(), *loaders)


def test_lightning(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        from horovodrunner.callbacks.lightning import LogCallback

        for package in ("lightning.pytorch", "pytorch_lightning"):
            lightning = importlib.import_module(package)
            callback = LogCallback(per_batch_log=package == "lightning.pytorch")
            assert isinstance(callback, lightning.Callback)
            fit_lightning(package, logger=False, callbacks=[callback])

    HorovodRunner(np=-1).run(main)
    lines = lines_of(capfd)
    assert [line for line in lines if "batch" not in line] == 2 * [
        "epoch 1 of 2 begins",
        "epoch 1 of 2: loss N, val_loss N (N s)",
        "epoch 2 of 2 begins",
        "epoch 2 of 2: loss N, val_loss N (N s)",
    ]
    # the step's own loss, and from the first validation on that one's, too
    batches = [line.partition(", val_loss")[0] for line in lines if "batch" in line]
    assert batches == [
        f"epoch {epoch} of 2, batch {batch} of 2: loss N" for epoch in (1, 2) for batch in (1, 2)
    ]


def test_a_loop_of_torch(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        import torch

        from horovodrunner.callbacks.torch import LogCallback

        weight = torch.ones(1, requires_grad=True)
        log = LogCallback()
        for _ in log.epochs(2):
            for scale in (1, 3):
                loss = (weight * scale).sum()
                log.batch(loss=loss)
            log.epoch(accuracy=torch.tensor(0.75), learning_rate=6e-05)

    HorovodRunner(np=-2).run(main)
    text = capfd.readouterr().out
    for rank in (0, 1):
        lines = re.findall(rf"^rank {rank}: (.*?)(?: \(\d+\.\d s\))?$", text, re.MULTILINE)
        assert lines == [
            "epoch 1 of 2 begins",
            "epoch 1 of 2: loss 2.0000, accuracy 0.7500, learning_rate 6e-05",
            "epoch 2 of 2 begins",
            "epoch 2 of 2: loss 2.0000, accuracy 0.7500, learning_rate 6e-05",
        ]
