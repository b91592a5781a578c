"""Who is slow, in a run whose ranks wait for each other."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from horovodrunner import HorovodRunner
from horovodrunner.flows.rundir.reading import read_run
from horovodrunner.flows.rundir.report import slowest_ranks

pytestmark = [pytest.mark.horovod, pytest.mark.heavy]


def test_the_slow_rank_is_named(tmp_path: Path) -> None:
    def main(runs: Path) -> None:
        import horovod.torch as hvd
        import torch

        hvd.init()
        hvd.allreduce(torch.ones(2), name="first")
        if hvd.rank() == 1:  # until the driver has seen rank 0 wait for longer than both did before
            seen = set[str]()
            while len(seen) < 4:
                time.sleep(0.05)
                texts = [each.read_text() for each in runs.glob("*/stacks-*-0*")]
                seen.update(text for text in texts if "synchronize" in text)
        hvd.allreduce(torch.ones(2), name="second")

    runner = HorovodRunner(np=-2, run_dir=tmp_path)
    runner.run(main, runs=tmp_path)
    run = read_run(Path(str(runner.record)))
    waited = [run.ranks[rank].waited_seconds for rank in (0, 1)]
    assert waited[0] > waited[1]
    assert slowest_ranks(run.ranks.values())[0] == [1]
