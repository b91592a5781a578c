"""Errors of CUDA and NCCL where ranks have no GPU of their own."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from horovodrunner import HorovodRunner, WorkerFailedError
from horovodrunner.flows.outcome.gpu_hint import gpu_hint

ORDINAL = RuntimeError("CUDA error: invalid device ordinal\nGPU device may be out of range")
NCCL = RuntimeError("ncclCommInitRank failed: invalid usage (run with NCCL_DEBUG=WARN for details)")


def hint(error: Exception, gpus: int, monkeypatch: pytest.MonkeyPatch) -> str:
    cuda = SimpleNamespace(device_count=lambda: gpus)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    environ = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "5"}
    return gpu_hint(error, environ)


def test_ranks_and_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        ". This host has 2 ranks of the run, which see 1 GPU (CUDA_VISIBLE_DEVICES=5), and each "
        "needs one of its own: start fewer ranks there, or keep tensors on the CPU"
    )
    assert hint(ORDINAL, 1, monkeypatch) == hint(NCCL, 1, monkeypatch) == text


def test_where_there_are_enough_the_choice_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "sees 2 GPUs, and its own is cuda:1: call" in hint(NCCL, 2, monkeypatch)
    assert hint(RuntimeError("CUDA out of memory"), 0, monkeypatch) == ""


def test_it_is_in_the_first_line_of_a_run_that_failed() -> None:
    def main() -> None:
        raise RuntimeError("CUDA error: invalid device ordinal\nmore of it")

    with pytest.raises(WorkerFailedError) as caught:
        HorovodRunner(np=-2).run(main)
    first, second, *_ = str(caught.value).splitlines()
    assert first.endswith("or keep tensors on the CPU")
    assert second == "more of it"
