"""What the callbacks of frameworks report, in real workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from horovodrunner import HorovodRunner, metrics
from horovodrunner.callbacks.bases import Reporter
from horovodrunner.callbacks.keras import MetricsCallback
from tests.process.test_log_callbacks import fit, fit_lightning


def test_keras_3_on_torch() -> None:
    def main() -> float:
        import os

        os.environ["KERAS_BACKEND"] = "torch"
        import cloudpickle
        import keras

        history = fit(keras, [cloudpickle.loads(cloudpickle.dumps(MetricsCallback()))])
        return float(history.history["val_mae"][-1])

    runner = HorovodRunner(np=-1)
    assert runner.run(main) == pytest.approx(runner.history["val_mae"][1])
    assert runner.history.metrics == ("loss", "mae", "val_loss", "val_mae")
    assert list(runner.history["loss"]) == [0, 1]


def test_whatever_is_logged_training_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        import numpy as np
        import torch

        class Broken:
            @property
            def shape(self) -> tuple[int, ...]:
                raise RuntimeError

        odd: list[Any] = [
            np.array(["a"]),
            np.array([None]),
            torch.tensor(1j),
            Broken(),
            10**400,
            "x",
            None,
        ]
        logs: dict[Any, Any] = {"step": 1, "ranks": 2, 5: 6, "loss": torch.tensor([1.0])}
        Reporter.report(1.0, logs | {10 + place: value for place, value in enumerate(odd)})
        Reporter.report(None, {"loss": 2.0})
        Reporter.report("best", {"loss": 3.0})
        Reporter.report(3, {f"metric {number}": number for number in range(20_000)})

    runner = HorovodRunner(np=-1)
    runner.run(main)
    assert [(point.step, point.values) for point in runner.history] == [
        (1, {"step_": 1.0, "ranks_": 2.0, "5": 6.0, "loss": 1.0}),
        (2, {"loss": 2.0}),
    ]
    assert capfd.readouterr().out.count("metrics of a callback are not kept") == 1


@pytest.mark.heavy
def test_numbers_of_tensorflow() -> None:
    def main() -> str:
        import tensorflow as tf

        metrics.report(one=tf.constant([1.0]), two=tf.Variable([[2.0]]), three=tf.constant(3))
        try:
            tf.function(lambda number: metrics.report(loss=number))(tf.constant(1.0))
        except Exception as error:
            return str(error)
        return ""

    runner = HorovodRunner(np=-1)
    assert "a metric is a number" in runner.run(main)
    assert runner.history.last is not None
    assert runner.history.last.values == {"one": 1.0, "two": 2.0, "three": 3.0}


@pytest.mark.heavy
def test_keras_of_tensorflow_both_kinds() -> None:
    def main() -> None:
        import tensorflow as tf
        import tf_keras

        for keras in (tf_keras, tf.keras):
            fit(keras, [MetricsCallback(per_batch=True)])

    runner = HorovodRunner(np=-1)
    runner.run(main)
    points = [(point.step, "val_loss" in point.values) for point in runner.history]
    assert points == [(0, False), (1, False), (1, True), (2, False), (3, False), (3, True)] * 2


def test_lightning() -> None:
    def main() -> None:
        from horovodrunner.callbacks.lightning import MetricsLogger

        for package in ("lightning.pytorch", "pytorch_lightning"):
            fit_lightning(package, logger=MetricsLogger(), log_every_n_steps=1)

    runner = HorovodRunner(np=-1)
    runner.run(main)
    assert set(runner.history.metrics) >= {"loss_step", "loss_epoch", "epoch"}
    steps = [point.step for point in runner.history if "loss_step" in point.values]
    assert steps == [0, 1, 2, 3] * 2


@pytest.mark.heavy
def test_transformers(tmp_path: Path) -> None:
    def main(directory: str) -> None:
        import torch
        import transformers

        from horovodrunner.callbacks.transformers import MetricsCallback

        class Model(torch.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(2, 1)

            def forward(self, x: Any) -> dict[str, Any]:
                return {"loss": self.layer(x).square().mean()}

        transformers.Trainer(
            model=Model(),
            args=transformers.TrainingArguments(
                directory,
                max_steps=4,
                logging_steps=2,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=[{"x": torch.ones(2)} for _ in range(16)],
            callbacks=[MetricsCallback()],  # type: ignore[list-item]
        ).train()

    runner = HorovodRunner(np=-1)
    runner.run(main, directory=str(tmp_path))
    assert list(runner.history["loss"]) == [2, 4]
    assert {"learning_rate", "grad_norm", "train_runtime"} <= {*runner.history.metrics}
