"""A training that loses a worker or an executor ends with the weights of an undisturbed one."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from horovodrunner import HorovodRunner, WorkerFailedError
from horovodrunner.processes.driver import slots
from tests.conftest import workers_left
from tests.waiting import wait_until

pytestmark = [pytest.mark.horovod, pytest.mark.spark, pytest.mark.usefixtures("spark")]

EPOCHS = 6
FAULT_AT = 3


def train(signs: str, slow: bool) -> list[float]:
    """Train with momentum and dropout; every random number follows from rank and epoch."""
    import horovod.torch as hvd
    import torch

    from horovodrunner import checkpoint

    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    latest = checkpoint.latest()
    start = 0
    if latest is not None:
        state = torch.load(latest / "state.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = latest.step + 1
    for epoch in range(start, EPOCHS):
        torch.manual_seed(1000 * epoch + hvd.rank())
        for _ in range(4):
            x = torch.randn(8, 3)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
            optimizer.step()
        with checkpoint.save(step=epoch) as directory:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, directory / "state.pt")
        if epoch == FAULT_AT and checkpoint.attempt == 1:
            Path(signs, f"rank{hvd.rank()}-{os.getpid()}").touch()
            while slow:
                time.sleep(0.05)
    return [value for p in model.parameters() for value in p.detach().flatten().tolist()]


def kill_when_ready(signs: Path, rank: int, what: str) -> threading.Thread:
    def act() -> None:
        deadline = time.monotonic() + 60
        while len(list(signs.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        [sign] = signs.glob(f"rank{rank}-*")
        process = psutil.Process(int(sign.name.split("-")[1]))
        if what == "executor":
            process = next(p for p in process.parents() if p.name() == "java")
        process.kill()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    directory = tmp_path_factory.mktemp("undisturbed")
    runner = HorovodRunner(np=2, checkpoint_dir=directory / "kept")
    return list(runner.run(train, signs=str(directory), slow=False))


@pytest.mark.parametrize(
    ("what", "rank"),
    [("worker", 0), ("executor", 1), pytest.param("executor", 0, marks=pytest.mark.slow)],
)
def test_the_weights_are_those_of_an_undisturbed_training(
    what: str,
    rank: int,
    undisturbed: list[float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spark: Any,
) -> None:
    signs = tmp_path / "signs"
    signs.mkdir()
    killer = kill_when_ready(signs, rank, what)
    runner = HorovodRunner(
        np=2,
        checkpoint_dir=tmp_path / "kept",
        max_restarts=2,
        keep_warm=what == "worker",  # a warm one's parent is not the executor
    )
    weights = runner.run(train, signs=str(signs), slow=True)
    killer.join()
    assert weights == undisturbed
    announced = [
        line for line in capsys.readouterr().out.splitlines() if "attempt 2 of 3, because" in line
    ]
    assert len(announced) == 1
    assert f"rank {rank}" in announced[0]
    assert ("SIGKILL" if what == "worker" else "lost executor") in announced[0]
    if (what, rank) != ("executor", 0):  # its last checkpoint may be lost with it
        assert f"going on from step {FAULT_AT}" in announced[0]
    assert runner.checkpoints[-1].step == EPOCHS - 1
    assert workers_left() == []
    wait_until(lambda: (slots.total_slots(spark) or 0) >= 2)


def test_when_all_attempts_are_used_every_cause_is_told() -> None:
    def main() -> None:
        from horovodrunner import checkpoint

        os.kill(os.getpid(), 9 if checkpoint.attempt == 1 else 11)

    with pytest.raises(WorkerFailedError, match="All 2 attempts failed") as caught:
        HorovodRunner(np=2, max_restarts=1).run(main)
    assert len(caught.value.attempts) == 2
    assert "SIGKILL" in caught.value.attempts[0]
    assert "SIGSEGV" in caught.value.attempts[1]
