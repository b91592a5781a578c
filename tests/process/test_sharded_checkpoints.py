"""checkpoint.save_torch() and load_torch() with models that no rank holds whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from horovodrunner import HorovodRunner
from tests.process import sharded

pytest.importorskip("torch.distributed.fsdp", reason="needs torch")
pytestmark = pytest.mark.heavy


def chain(location: Path, *runs: tuple[str, int], **options: Any) -> None:
    """Train in the first run; every later one loads, compares bit for bit and saves again."""
    expected = None
    for step, (kind, ranks) in enumerate(runs):
        runner = HorovodRunner(np=-ranks, checkpoint_dir=location, on_checkpoint_error="raise")
        found = runner.run(
            sharded.train_and_save, kind=kind, step=step, steps=2 if step == 0 else 0, **options
        )
        expected = expected or found
        for got, wanted in zip(found, expected, strict=True):
            assert got == wanted, (kind, ranks)


def test_a_sharded_model_goes_on_with_other_numbers_of_ranks(tmp_path: Path) -> None:
    chain(tmp_path, ("fsdp", 4), ("fsdp", 2), ("fsdp", 4), ("plain", 1), ("fsdp", 2))
