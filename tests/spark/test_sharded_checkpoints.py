"""A sharded model from two executors, into other numbers of ranks: to the driver, behind a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from horovodrunner import HorovodRunner
from tests.process import sharded

pytest.importorskip("torch.distributed.fsdp", reason="needs torch")
pytestmark = [pytest.mark.spark, pytest.mark.heavy, pytest.mark.usefixtures("spark")]


@pytest.mark.parametrize("prefix", ["", "file://"], ids=["path", "URL"])
def test_two_executors_save_what_one_loads(tmp_path: Path, prefix: str) -> None:
    location = f"{prefix}{tmp_path}/kept"
    runs: tuple[tuple[int, dict[str, Any]], ...] = (
        (2, {"kind": "fsdp", "asynchronous": True}),
        (1, {"kind": "fsdp"}),
        (1, {"kind": "plain"}),
    )
    expected = None
    for step, (ranks, options) in enumerate(runs):
        runner = HorovodRunner(np=ranks, checkpoint_dir=location, on_checkpoint_error="raise")
        steps = 0 if step else 2
        found = runner.run(sharded.train_and_save, step=step, steps=steps, **options)
        expected = expected or found
        assert found == expected
