"""Keras 3 with Horovod: ranks on different data are one training on all of it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from horovodrunner import HorovodRunner

pytest.importorskip("keras", minversion="3.0")
pytestmark = [pytest.mark.horovod, pytest.mark.spark, pytest.mark.usefixtures("spark")]

EPOCHS = 3


def train(rank: int, size: int, case: dict[str, Any]) -> list[list[float]]:
    """Train on this rank's share of each batch and give the weights after every epoch."""
    import keras
    import numpy as np

    if case.get("policy"):
        keras.config.set_dtype_policy(case["policy"])
    callbacks: list[Any] = []
    broadcasts = case.get("by") != "horovod"  # whose callback fails with Keras 3
    keras.utils.set_random_seed(7 + rank if broadcasts else 7)
    if case.get("sparse"):
        inputs = np.random.default_rng(1).integers(0, 12, (16, 3))
        if case.get("distinct"):
            inputs = np.tile(np.arange(12).reshape(4, 3), (4, 1))
        layers = [keras.layers.Embedding(12, 4), keras.layers.Flatten()]
    else:
        inputs = np.random.default_rng(1).normal(size=(16, 3)).astype("float32")
        layers = [keras.layers.Dense(4, activation="tanh")]
    targets = np.random.default_rng(2).normal(size=(16, 1)).astype("float32")
    if case.get("overflows"):
        targets[1] *= 1e6  # its gradients, in float16 and on the second rank only
    model = keras.Sequential([keras.Input(inputs.shape[1:]), *layers, keras.layers.Dense(1)])
    optimizer = getattr(keras.optimizers, case.get("optimizer", "SGD"))(
        0.05, **case.get("settings", {})
    )
    if case.get("loss_scale"):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    if size > 1:
        name = "horovodrunner.keras" if broadcasts else "horovod.tensorflow.keras"
        of_keras = importlib.import_module(name)
        if broadcasts:
            callbacks = [of_keras.BroadcastGlobalVariablesCallback(0)]
        optimizer = of_keras.DistributedOptimizer(optimizer, **case.get("distributed", {}))
    compiled = {"run_eagerly": case["mode"] == "eager", "jit_compile": case["mode"] == "xla"}
    model.compile(optimizer, "mse", **compiled)
    weights: list[list[float]] = []

    class Weights(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            weights.append([x for w in model.get_weights() for x in w.flatten().tolist()])

    passes = case.get("distributed", {}).get("backward_passes_per_step", 1)
    batch_size = 2 if size > 1 else 4 * passes
    model.fit(
        inputs[rank::size],
        targets[rank::size],
        batch_size=batch_size,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks, Weights()],
    )
    return weights


def of_two_ranks(case: dict[str, Any]) -> list[list[list[float]]]:
    def main(case: dict[str, Any]) -> Any:
        import horovod.tensorflow as hvd

        hvd.init()
        return hvd.allgather_object(train(hvd.rank(), hvd.size(), case))

    return list(HorovodRunner(np=-2).run(main, case=case))


def of_one_process(case: dict[str, Any]) -> list[list[float]]:
    """Train in a process of its own: this one is to stay free of TensorFlow."""

    def main(case: dict[str, Any]) -> Any:
        return train(0, 1, case)

    return list(HorovodRunner(np=-1).run(main, case=case))


TWO_PASSES = {"backward_passes_per_step": 2, "average_aggregated_gradients": True}
CASES: dict[str, dict[str, Any]] = {
    "graph": {"mode": "graph"},
    "eager": {"mode": "eager"},
    "jit_compile": {"mode": "xla"},
    "adam": {"mode": "graph", "optimizer": "Adam"},
    "clipped": {"mode": "graph", "settings": {"clipnorm": 0.1}},
    "two passes": {"mode": "graph", "settings": {"momentum": 0.9}, "distributed": TWO_PASSES},
    "two passes of adam": {"mode": "eager", "optimizer": "Adam", "distributed": TWO_PASSES},
    "keras' own passes": {"mode": "graph", "settings": {"gradient_accumulation_steps": 2}},
    "groups": {"mode": "graph", "distributed": {"groups": 2}},
    "predivided": {"mode": "graph", "distributed": {"gradient_predivide_factor": 2.0}},
    "sparse": {"mode": "graph", "sparse": True},
    "sparse, eager": {"mode": "eager", "sparse": True, "settings": {"momentum": 0.9}},
    "sparse as dense": {"mode": "graph", "sparse": True, "distributed": {"sparse_as_dense": True}},
    # Alone, Keras squares the parts of a row's gradient one by one if a row is in a batch twice.
    "sparse adam": {"mode": "graph", "optimizer": "Adam", "sparse": True, "distinct": True},
    "float16": {"mode": "graph", "policy": "mixed_float16", "tolerance": 1e-3},
}


def check(case: dict[str, Any]) -> None:
    first, second = of_two_ranks(case)
    alone = of_one_process(case)
    assert len(alone) == EPOCHS
    assert first == second
    tolerance = case.get("tolerance", 1e-5)
    for ours, theirs in zip(first, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_two_ranks_are_one_training_on_the_combined_batch(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_horovods_own_optimizer_does_not_average(mode: str) -> None:
    with pytest.raises(AssertionError):
        check({"mode": mode, "by": "horovod"})


@pytest.mark.parametrize("loss_scale", [True, False], ids=["wrapped", "wraps"])
def test_a_gradient_that_overflows_on_one_rank_is_skipped_by_both(loss_scale: bool) -> None:
    case = {"mode": "graph", "policy": "mixed_float16", "overflows": True, "loss_scale": loss_scale}
    first, second = of_two_ranks(case)
    assert first == second
    assert all(abs(weight) < 10 for weight in first[-1])
