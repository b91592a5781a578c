"""Runs on real executors, which know nothing of MLflow, reported to it by the driver."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import HorovodRunner, metrics

pytestmark = [pytest.mark.spark, pytest.mark.heavy]


def test_what_executors_report_is_in_the_drivers_run(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder of the driver's, which is no server that a rank could reach.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    def main(lr: float) -> list[str]:
        import sys

        for step in range(3):
            metrics.report(step=step, loss=lr * step + int(os.environ["RANK"]))
        return [
            name for name in ("MLFLOW_RUN_ID", "mlflow") if name in {**os.environ, **sys.modules}
        ]

    with mlflow.start_run() as active:
        assert HorovodRunner(np=2).run(main, lr=0.5) == []
    client = mlflow.MlflowClient()
    found = client.get_run(active.info.run_id)
    means = client.get_metric_history(active.info.run_id, "loss.mean")
    assert {each.step: each.value for each in means} == {0: 0.5, 1: 1.0, 2: 1.5}
    assert found.data.metrics["loss"] == 1.0
    assert found.data.params == {"lr": "0.5", "horovodrunner.np": "2"}
    assert found.data.tags["horovodrunner.status"] == "finished"
    assert found.data.tags["horovodrunner.cluster"].endswith(spark.conf.get("spark.master"))
    assert found.info.status == "FINISHED"
