"""The same training on real executors of Spark: pytest -m spark."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from houses import plain

NEEDED = importlib.util.find_spec("pyspark") is not None and shutil.which("java") is not None
pytestmark = [
    pytest.mark.spark,
    pytest.mark.skipif(not NEEDED, reason="pyspark and Java are not installed"),
    pytest.mark.usefixtures("spark_cluster"),
]


def test_a_run_that_loses_an_executor_goes_on(horovod_runner, faults, checkpoint_dir):
    faults.lose_executor(rank=1, at_step=3)
    runner = horovod_runner(np=2, max_restarts=1, checkpoint_dir=checkpoint_dir)
    assert runner.run(plain.train, steps=6).shape == (3, 1)
