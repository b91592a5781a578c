"""Training with PyTorch, where it is installed: on torch.distributed, and on Horovod."""

from __future__ import annotations

import importlib.util

import pytest

from horovodrunner.testing import assert_equal_to_single_process, assert_resumes
from houses import ddp, with_horovod


def installed(name):
    return importlib.util.find_spec(name) is not None


pytestmark = pytest.mark.skipif(not installed("torch"), reason="PyTorch is not installed")
on_horovod = pytest.mark.skipif(not installed("horovod"), reason="Horovod is not installed")
each_of_them = pytest.mark.parametrize(
    "train", [ddp.train, pytest.param(with_horovod.train, marks=on_horovod)], ids=["ddp", "horovod"]
)


@each_of_them
def test_gradients_are_averaged(train, horovod_runner):
    assert_equal_to_single_process(train, np=-2, steps=8, runner=horovod_runner)


def test_it_goes_on_where_a_killed_rank_left_it(horovod_runner):
    assert_resumes(ddp.train, at_step=4, rank=1, steps=8, runner=horovod_runner)
