"""PyTorch objects as checkpoints, in one line each: real processes of this machine."""

from __future__ import annotations

import os
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


def parts_of(kind: str) -> tuple[Any, Any, Any, Any]:
    """Return a model, its plain optimizer, the schedule of that, and its average."""
    import torch

    class Kept(torch.optim.Optimizer):  # type: ignore[misc]  # torch is not looked into
        """Heavy ball, with a setting that is in no group and state that is no tensor."""

        def __init__(self, params: Any, pull: float) -> None:
            super().__init__(params, {"lr": 0.1, "differentiable": False})
            self.pull = pull

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["steps"] = state.get("steps", 0) + 1
                    with torch.no_grad():
                        state["v"] = self.pull * state.get("v", torch.zeros_like(p)) + p.grad
                        p.sub_(group["lr"] / state["steps"] * state["v"])

    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.05, "note": "slow"}]
    groups += [{"params": model[1].parameters()}]
    made: dict[str, Any] = {
        "SGD": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
        "AdamW": lambda: torch.optim.AdamW(groups, lr=0.1, amsgrad=True),
        "Kept": lambda: Kept(model.parameters(), 0.9),
    }
    optimizer = made[kind]()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    averages = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=averages)
    return model, optimizer, schedule, average


def train_loaded_before_wrapping(
    kinds: tuple[str, ...], epochs: int, killed_in: int
) -> dict[str, Any]:
    """Train one model after the other; a new process is to go on with each."""
    import warnings

    import horovod.torch as hvd
    import torch

    warnings.simplefilter("error")
    hvd.init()
    torch.set_num_threads(1)
    parts = {kind: parts_of(kind) for kind in kinds}
    saved = {f"{kind}-{number}": part for kind in kinds for number, part in enumerate(parts[kind])}
    start = checkpoint.load_torch(**saved)
    hooked = dict.fromkeys(kinds, 0)
    wrapped = {}
    for kind, (model, optimizer, _, average) in parts.items():

        def count(*_: Any, kind: str = kind, model: Any = model, average: Any = average) -> None:
            hooked[kind] += 1
            average.update_parameters(model)

        optimizer.register_step_post_hook(count)
        wrapped[kind] = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    for epoch in range(start, epochs):
        for kind, (model, _, schedule, _) in parts.items():
            torch.manual_seed(100 * epoch + hvd.rank())
            wrapped[kind].zero_grad()
            torch.nn.functional.mse_loss(model(torch.randn(4, 3)), torch.ones(4, 1)).backward()
            wrapped[kind].step()
            schedule.step()
        checkpoint.save_torch(epoch, **saved)
        if epoch == killed_in and checkpoint.attempt == 1:
            hvd.allreduce(torch.zeros(1))
            os.kill(os.getpid(), 9)
    found = {
        kind: (
            [v for each in (model, average) for p in each.parameters() for v in p.tolist()],
            [group["lr"] for group in wrapped[kind].param_groups],
            wrapped[kind].defaults,
        )
        for kind, (model, _, _, average) in parts.items()
    }
    both = hvd.allgather_object(found)
    assert both[0] == both[1]
    assert set(hooked.values()) == {epochs - start}, hooked
    return {"start": start, **found}


def test_what_was_loaded_before_wrapping_is_kept(tmp_path: Path) -> None:
    """A run that is killed and goes on ends like one that was not; schedules and hooks work."""
    kinds = ("SGD", "AdamW", "Kept")
    arguments: dict[str, Any] = {"kinds": kinds, "epochs": 5}
    whole = HorovodRunner(np=-2).run(train_loaded_before_wrapping, killed_in=-1, **arguments)
    runner = HorovodRunner(np=-2, checkpoint_dir=tmp_path, max_restarts=1)
    resumed = runner.run(train_loaded_before_wrapping, killed_in=2, **arguments)
    assert resumed.pop("start") == 3
    assert whole.pop("start") == 0
    assert resumed == whole
    assert whole["SGD"][1:] == ([0.05 / 4, 0.1 / 4], {**whole["SGD"][2], "lr": 0.1})


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


def test_numbers_go_with_what_is_saved(tmp_path: Path) -> None:
    def save() -> None:
        import torch

        from horovodrunner import metrics

        net = torch.nn.Linear(1, 1)
        metrics.report(0, loss=0.5)
        checkpoint.save_torch(0, model=net)
        metrics.report(1, loss=0.25)
        checkpoint.save_torch(1, metrics={"acc": torch.tensor(0.75)}, model=net)

    runner = HorovodRunner(np=-2, checkpoint_dir=tmp_path, keep_best=("acc", "max"))
    runner.run(save)
    found = {saved.step: saved.metrics for saved in runner.checkpoints}
    assert found.pop(1) == {"acc": 0.75}
    assert found in ({}, {0: {"loss": 0.5}})  # the first one may have been passed over
    import torch

    with pytest.raises(ArgumentTypeError, match="has a state to be saved: give it another name"):
        checkpoint.save_torch(1, model=torch.nn.Linear(1, 1), metrics=torch.nn.Linear(1, 1))


def test_nothing_to_save_or_load_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="model=model"):
        checkpoint.save_torch(1)
    with pytest.raises(ArgumentTypeError, match="model=model"):
        checkpoint.load_torch()
