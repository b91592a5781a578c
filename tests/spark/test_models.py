"""Models in Spark's Python workers: shipped once, one copy for each host, gone when deleted."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from horovodrunner.inference.loading import ModelHandle
from horovodrunner.inference.model import Model

pytestmark = pytest.mark.spark


def used_by_all(spark: Any, handle: ModelHandle) -> list[Any]:
    """Predict in both executors at once; return a row for each, with what it has mapped."""

    def predict(batches: Iterator[Any]) -> Iterator[Any]:
        import os
        from pathlib import Path

        import numpy as np
        import pyarrow as pa
        from pyspark import BarrierTaskContext

        from horovodrunner.inference.loading import load

        BarrierTaskContext.get().barrier()
        found = load(handle)(np.ones((1, 200), np.float32))
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        files = {each[4] for each in maps if each[-1] == "(deleted)" and "/#" in each[5]}
        for _ in batches:
            pass
        yield pa.RecordBatch.from_pylist(
            [{"sum": float(found.sum()), "files": ",".join(files), "process": os.getpid()}]
        )

    rows = spark.range(0, 2, 1, 2)
    schema = "sum double, files string, process long"
    return list(rows.mapInArrow(predict, schema, barrier=True).collect())


def test_two_executors_on_a_host_map_one_file(spark: Any) -> None:
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.Linear(300, 10))
    expected = net(torch.ones(1, 200)).sum().item()
    with Model.from_torch(net) as model:
        handle = model.handle(spark)
        assert model.handle(spark) == handle
        first, second = used_by_all(spark, handle)
        assert first["sum"] == second["sum"] == pytest.approx(expected, abs=1e-5)
        assert first["process"] != second["process"]
        assert first["files"] == second["files"] != ""
        assert len(pickle.dumps(handle)) < 5000
        path = model._file
    assert not path.exists()
    with pytest.raises(Exception, match="after it was destroyed"):
        used_by_all(spark, handle)


def test_broadcast_variables_of_the_user_s_come_along(spark: Any) -> None:
    own = spark.sparkContext.broadcast(17.0)
    function = Model.from_function(lambda x: x.sum(1) + own.value)
    maker = ModelHandle.of_make_predict_fn(lambda: lambda x: x.sum(1) + own.value)
    with function:
        for handle in (function.handle(spark), maker):
            assert {row["sum"] for row in used_by_all(spark, handle)} == {217.0}
    own.destroy()
