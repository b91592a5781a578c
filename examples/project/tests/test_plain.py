"""Training with NumPy: no framework, no Spark, a few seconds."""

from __future__ import annotations

import pytest

from horovodrunner import WorkerFailedError
from horovodrunner.testing import assert_resumes, assert_same_weights
from houses import plain


def test_all_ranks_end_with_the_same_weights(run_ranks):
    weights = run_ranks(2)(plain.train, steps=4)
    assert_same_weights(weights)


def test_the_loss_falls(horovod_runner):
    runner = horovod_runner(np=-2)
    runner.run(plain.train, steps=6)
    loss = runner.history["loss"]  # of rank 0, by step
    assert loss[5] < loss[0]


def test_a_run_whose_rank_is_killed_is_launched_again(horovod_runner, faults, checkpoint_dir):
    faults.kill(rank=1, at_step=3)
    runner = horovod_runner(np=-2, max_restarts=1, checkpoint_dir=checkpoint_dir)
    assert runner.run(plain.train, steps=6).shape == (3, 1)
    assert runner.checkpoints[-1].step == 5


def test_it_goes_on_as_if_nothing_had_happened(horovod_runner):
    assert_resumes(plain.train, at_step=3, steps=6, runner=horovod_runner)


def test_a_full_disk_is_told(horovod_runner, faults, checkpoint_dir):
    faults.fill_disk(rank=0, at_step=2)
    with pytest.raises(WorkerFailedError) as caught:
        horovod_runner(np=-2, checkpoint_dir=checkpoint_dir).run(plain.train, steps=4)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_negative_rate_is_refused(horovod_runner):
    with pytest.raises(WorkerFailedError) as caught:
        horovod_runner(np=-2).run(plain.train, steps=1, lr=-1.0)
    assert isinstance(caught.value.__cause__, ValueError)
