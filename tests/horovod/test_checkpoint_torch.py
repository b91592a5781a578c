"""PyTorch objects as checkpoints, in one line each: real processes of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from horovodrunner import ArgumentTypeError, CheckpointError, HorovodRunner, checkpoint

pytestmark = pytest.mark.horovod


def train(epochs: int) -> tuple[int, list[float], int]:
    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.manual_seed(3)
    model = torch.nn.Linear(3, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    start = checkpoint.load_torch(model=model, optimizer=optimizer, scheduler=scheduler)
    for epoch in range(start, epochs):
        torch.manual_seed(100 * epoch + hvd.rank())
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(torch.randn(4, 3)), torch.ones(4, 1)).backward()
        optimizer.step()
        scheduler.step()
        checkpoint.save_torch(epoch, model=model, optimizer=optimizer, scheduler=scheduler)
    agreed = hvd.allgather_object((start, model.weight.flatten().tolist()))
    assert agreed[0] == agreed[1]
    return start, agreed[0][1], scheduler.last_epoch


def test_a_run_that_goes_on_ends_like_one_that_was_not_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = HorovodRunner(np=-2, checkpoint_dir=tmp_path / "whole").run(train, epochs=6)
    halves = HorovodRunner(np=-2, checkpoint_dir=tmp_path / "halves")
    assert halves.run(train, epochs=3)[0] == 0
    start, weights, steps = halves.run(train, epochs=6)
    assert (start, weights, steps) == (3, *whole[1:])
    names = sorted(path.name for path in Path(halves.checkpoints[-1].path).iterdir())
    assert names == ["manifest.json", "model.pt", "optimizer.pt", "scheduler.pt"]
    # what the scheduler did to lr is no old setting
    assert "load_torch()" not in capsys.readouterr().out


def test_an_optimizers_old_settings_are_told_of_when_main_has_new_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(epochs: int, lr: float) -> float:
        import torch

        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        for epoch in range(checkpoint.load_torch(model=model, optimizer=optimizer), epochs):
            checkpoint.save_torch(epoch, model=model, optimizer=optimizer)
        return float(optimizer.param_groups[0]["lr"])

    runner = HorovodRunner(np=-2, checkpoint_dir=tmp_path)
    assert runner.run(main, epochs=1, lr=0.1) == 0.1
    assert runner.run(main, epochs=1, lr=0.01) == 0.1
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "load_torch()" in line]
    assert "the saved settings into 'optimizer': lr is 0.1 again, not 0.01. Set them" in line
    assert "differs from the one that saved that checkpoint: lr was 0.1, is 0.01" in shown


def test_a_name_that_was_not_saved_is_told_with_those_that_were(tmp_path: Path) -> None:
    def save() -> None:
        import torch

        checkpoint.save_torch(0, model=torch.nn.Linear(1, 1))

    def load() -> None:
        import torch

        checkpoint.load_torch(net=torch.nn.Linear(1, 1))

    from horovodrunner import WorkerFailedError

    runner = HorovodRunner(np=-1, checkpoint_dir=tmp_path)
    runner.run(save)
    with pytest.raises(WorkerFailedError, match=r"step 0 has no net\.pt, only model\.pt") as caught:
        runner.run(load)
    assert isinstance(caught.value.__cause__, CheckpointError)


def test_nothing_to_save_or_load_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="model=model"):
        checkpoint.save_torch(1)
    with pytest.raises(ArgumentTypeError, match="model=model"):
        checkpoint.load_torch()
