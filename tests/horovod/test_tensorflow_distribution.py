"""MultiWorkerMirroredStrategy finds all ranks through TF_CONFIG, when the run asks for it."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from horovodrunner import HorovodRunner

pytestmark = [pytest.mark.horovod, pytest.mark.spark]

FIRST, LAST = 22200, 22299  # below those that the kernel gives to others
STEPS = 3
RATE = 0.1


def data() -> tuple[Any, Any]:
    """Return inputs (8, 3) and targets (8, 1)."""
    import numpy as np

    random = np.random.default_rng(0)
    inputs = random.normal(size=(8, 3)).astype("float32")
    return inputs, (inputs.sum(1, keepdims=True) + 1).astype("float32")


def mirrored() -> dict[str, Any]:
    """Train with a loop of its own, and with legacy Keras' fit, on one strategy."""
    import tensorflow as tf
    import tf_keras

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    inputs, targets = data()
    with strategy.scope():
        weight = tf.Variable(tf.ones((3, 1)))

    def shard(context: Any) -> Any:
        mine = slice(context.input_pipeline_id, None, context.num_input_pipelines)
        return tf.data.Dataset.from_tensor_slices((inputs[mine], targets[mine])).batch(4).repeat()

    def one(batch: Any) -> None:
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((x @ weight - y) ** 2) / len(inputs)
        gradient = tape.gradient(loss, weight)
        context = tf.distribute.get_replica_context()
        weight.assign_sub(RATE * context.all_reduce(tf.distribute.ReduceOp.SUM, gradient))

    @tf.function  # type: ignore[untyped-decorator]
    def step(iterator: Any) -> None:
        strategy.run(one, args=(next(iterator),))

    iterator = iter(strategy.distribute_datasets_from_function(shard))
    for _ in range(STEPS):
        step(iterator)

    with strategy.scope():
        layer = tf_keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        model = tf_keras.Sequential([layer])
        model.build((None, 3))
        model.compile(tf_keras.optimizers.SGD(RATE), "mse")
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    dataset = tf.data.Dataset.from_tensor_slices((inputs, targets)).batch(8)
    model.fit(dataset.with_options(options), epochs=STEPS, verbose=0)
    return {
        "config": json.loads(os.environ["TF_CONFIG"]),
        "replicas": strategy.num_replicas_in_sync,
        "loop": weight.numpy().ravel().tolist(),
        "fit": layer.kernel.numpy().ravel().tolist(),
    }


def on_all_ranks() -> list[dict[str, Any]]:
    import horovod.tensorflow as hvd

    hvd.init()
    return list(hvd.allgather_object(mirrored()))


def alone() -> Any:
    """Train on all the data in this process."""
    inputs, targets = data()
    weight = inputs[:1].T * 0 + 1
    for _ in range(STEPS):
        weight -= RATE * 2 * inputs.T @ (inputs @ weight - targets) / len(inputs)
    return pytest.approx(weight.ravel().tolist(), rel=1e-4)


def test_ranks_train_together_inside_the_range_of_ports(
    spark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TF_CONFIG", "of the driver alone")
    spark.conf.set("spark.horovodrunner.ports", f"{FIRST}-{LAST}")
    try:
        ranks = HorovodRunner(np=2, tf_config=True, stall_timeout=90).run(on_all_ranks)
    finally:
        spark.conf.unset("spark.horovodrunner.ports")
    assert "the driver's TF_CONFIG describes one process" in capsys.readouterr().out
    [workers] = {tuple(rank["config"]["cluster"]["worker"]) for rank in ranks}
    ports = [int(worker.rpartition(":")[2]) for worker in workers]
    assert len(set(ports)) == 2
    assert all(FIRST <= port <= LAST for port in ports)
    for number, rank in enumerate(ranks):
        assert rank["config"]["task"] == {"type": "worker", "index": number}
        assert rank["replicas"] == 2
        assert rank["loop"] == alone()
        assert rank["fit"] == alone()
    assert [ranks[0][how] for how in ("loop", "fit")] == [ranks[1][how] for how in ("loop", "fit")]


def test_a_rank_that_leaves_the_strategy_early_does_not_hang_the_run() -> None:
    """TensorFlow's servers wait for each other when a process ends."""

    def main() -> None:
        import tensorflow as tf

        tf.distribute.MultiWorkerMirroredStrategy()
        if os.environ["RANK"] == "1":
            raise KeyError("no such column")

    with pytest.raises(Exception, match="no such column"):
        HorovodRunner(np=-2, tf_config=True).run(main)


def test_without_the_option_no_rank_has_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", "of the driver alone")

    def main() -> bool:
        return "TF_CONFIG" in os.environ

    assert HorovodRunner(np=-1).run(main) is False
