"""A model trained here, logged with mlflow, and applied by mlflow's own UDF on real executors."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from horovodrunner import HorovodRunner

pytestmark = [pytest.mark.spark, pytest.mark.horovod]

STEPS = 20
ROWS = 300


def train(steps: int) -> Any:
    """Fit a small network to the sums of its inputs; the trained module comes back."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.manual_seed(7 + hvd.rank())
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    inputs = torch.rand(64, 4)
    wanted = inputs.sum(1, keepdim=True).expand(64, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=net.named_parameters())
    hvd.broadcast_parameters(net.state_dict(), root_rank=0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(net(inputs), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return net, losses


@pytest.mark.timeout(360)  # mlflow.pytorch imports Lightning: driver and Python worker
@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")
def test_a_trained_model_that_mlflow_logged_scores_a_dataframe(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder stands in for the server, whose URL would be here.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow.pytorch
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    net, losses = HorovodRunner(np=-1).run(train, steps=STEPS)
    assert losses[-1] < losses[0] / 2

    features = np.random.default_rng(0).random((ROWS, 4), np.float32)
    # With a tensor as its input the model takes a column of arrays.
    number = np.dtype("float32")
    signature = ModelSignature(
        Schema([TensorSpec(number, (-1, 4))]), Schema([TensorSpec(number, (-1, 3))])
    )
    with mlflow.start_run():
        logged = mlflow.pytorch.log_model(
            net,
            name="net",
            signature=signature,
            input_example=features[:2],
            pip_requirements=["torch"],
        )
    score = mlflow.pyfunc.spark_udf(
        spark, logged.model_uri, result_type="array<float>", env_manager="local"
    )

    rows = [(at, row.tolist()) for at, row in enumerate(features)]
    df = spark.createDataFrame(rows, "id bigint, features array<float>").coalesce(1)
    scored = df.select("id", score("features").alias("prediction")).orderBy("id").collect()

    assert [row.id for row in scored] == list(range(ROWS))
    with torch.no_grad():
        wanted = net(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose([row.prediction for row in scored], wanted, rtol=1e-5, atol=1e-6)
    gc.collect()  # mlflow leaves its threads to it
