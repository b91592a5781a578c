"""``preflight=True`` with ranks on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import ArgumentTypeError, ConfigurationError, HorovodRunner


def test_it_is_off_and_takes_two_words() -> None:
    with pytest.raises(ArgumentTypeError, match="preflight='yes': it must be 'warn', True or Fal"):
        HorovodRunner(np=-1, preflight="yes")


def test_a_main_that_imports_no_framework_runs_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    runner = HorovodRunner(np=-2, preflight=True)
    assert runner.run(lambda: os.environ["RANK"]) == "0"
    shown = capsys.readouterr().out
    assert "preflight: all is well" in shown
    assert "2 ranks, " in shown
    assert "allreduce" not in shown
    assert "preflight" in [phase.name for phase in runner.phases]


@pytest.mark.parametrize("preflight", [True, "warn"])
def test_gpus_that_are_missing_refuse_the_run_or_are_warned_about(
    preflight: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '0, GPU-a, NVIDIA T4'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    runner = HorovodRunner(np=-2, preflight=preflight, max_restarts=1)
    if preflight is True:
        with pytest.raises(ConfigurationError, match=r"preflight: rank 0 on .*owns 2 GPUs.*1 work"):
            runner.run((tmp_path / "called").touch)
        assert not (tmp_path / "called").exists()
    else:
        assert runner.run((tmp_path / "called").exists) is False
    shown = capsys.readouterr().out
    assert "2 ranks, 1 x NVIDIA T4" in shown
    assert "owns 2 GPUs" in shown


@pytest.mark.horovod
def test_horovod_is_timed_and_main_finds_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOROVOD_TIMELINE", str(tmp_path / "timeline.json"))

    def main() -> Any:
        import horovod.torch as hvd
        import torch

        before = hvd.is_initialized()
        hvd.init()
        return before, float(hvd.allreduce(torch.tensor(1.0), op=hvd.Sum, name="mains"))

    assert HorovodRunner(np=-2, preflight=True).run(main) == (False, 2.0)
    assert "allreduce of 2 ranks by Horovod" in capsys.readouterr().out
    timeline = (tmp_path / "timeline.json").read_text()
    assert "mains" in timeline
    assert "preflight" not in timeline


def test_torch_distributed_is_timed_and_main_finds_nothing_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> Any:
        import torch.distributed as dist

        before = dist.is_initialized()
        dist.init_process_group("gloo")
        size = dist.get_world_size()
        dist.destroy_process_group()
        return before, size

    assert HorovodRunner(np=-2, preflight=True, keep_warm=True).run(main) == (False, 2)
    assert "allreduce of 2 ranks by torch.distributed (gloo)" in capsys.readouterr().out
