"""torch.distributed, and what builds on it, find their places in main without arguments."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from horovodrunner import HorovodRunner
from tests import processes

pytestmark = pytest.mark.horovod

RANKS = 2
STALL_SECONDS = 90


def train(lr: float, use_gpu: bool) -> dict[str, Any]:
    """Train as a function written for pyspark's TorchDistributor does."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl" if use_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else "cpu"
    torch.manual_seed(7)
    dataset = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
    sampler = torch.utils.data.DistributedSampler(dataset, shuffle=False)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, sampler=sampler)
    weights = {}
    for name, wrap in (("ddp", _ddp), ("fsdp", _fsdp), ("fsdp2", _fsdp_2)):
        torch.manual_seed(11)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        wrapped = wrap(model.to(device))
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=lr)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for x, y in loader:
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(wrapped(x.to(device)), y.to(device)).backward()
                optimizer.step()
        weights[name] = _whole_weights(wrapped)
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, weights)
    dist.destroy_process_group()
    return {"weights": texts, "reference": _alone(dataset, lr)}


def _ddp(model: Any) -> Any:
    import torch

    return torch.nn.parallel.DistributedDataParallel(model)


def _fsdp(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=next(model.parameters()).device)


def _fsdp_2(model: Any) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = next(model.parameters()).device.type
    return fully_shard(model, mesh=init_device_mesh(kind, (dist.get_world_size(),)))


def _whole_weights(wrapped: Any) -> list[float]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    state = get_model_state_dict(wrapped, options=options)
    return [value for tensor in state.values() for value in tensor.flatten().tolist()]


def _alone(dataset: Any, lr: float) -> list[float]:
    """Train one process on the batches that both ranks have together."""
    import torch

    torch.manual_seed(11)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    x, y = dataset.tensors
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return [value for p in model.parameters() for value in p.detach().flatten().tolist()]


def accelerated() -> tuple[int, int, int, float]:
    """Find the ranks with accelerate."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    total = accelerator.reduce(torch.tensor(float(accelerator.process_index + 1)), "sum")
    found = (accelerator.num_processes, accelerator.process_index, accelerator.local_process_index)
    accelerator.end_training()
    return (*found, float(total))


def ranks_by_everybody() -> dict[str, Any]:
    """Let Horovod, torch.distributed and accelerate find the ranks in one process."""
    import horovod.torch as hvd
    import torch
    import torch.distributed as dist

    hvd.init()
    seen: dict[str, Any] = {"environments": hvd.allgather_object(dict(os.environ))}
    dist.init_process_group()  # no backend is named either
    ones = torch.ones(1)
    dist.all_reduce(ones)
    dist.destroy_process_group()
    seen["torch"] = ones.item()
    hvd.barrier()  # or rank 1 would find the store of the first group, which rank 0 is about to end
    seen["accelerate"] = hvd.allgather_object(accelerated())
    seen["horovod"] = hvd.allreduce(torch.ones(1), op=hvd.Sum).item()
    return seen


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    found: dict[str, Any] = HorovodRunner(np=-RANKS, stall_timeout=STALL_SECONDS).run(
        ranks_by_everybody
    )
    return found


@pytest.mark.spark
@pytest.mark.usefixtures("spark")
def test_ranks_learn_what_one_process_learns_from_all_the_data() -> None:
    trained = HorovodRunner(np=RANKS, stall_timeout=STALL_SECONDS).run(train, lr=0.1, use_gpu=False)
    for name in ("ddp", "fsdp", "fsdp2"):
        first, second = (weights[name] for weights in trained["weights"])
        assert first == second
        assert first == pytest.approx(trained["reference"], rel=1e-4, abs=1e-6), name


def test_a_process_group_needs_no_arguments(seen: dict[str, Any]) -> None:
    assert seen["torch"] == RANKS
    assert seen["horovod"] == RANKS  # beside the others


def test_accelerate_finds_the_ranks(seen: dict[str, Any]) -> None:
    assert seen["accelerate"] == [(RANKS, 0, 0, 3.0), (RANKS, 1, 1, 3.0)]


def test_the_variables_that_launchers_of_torch_set(seen: dict[str, Any]) -> None:
    """DeepSpeed, Mosaic Streaming and others read the first seven; torchrun sets them all."""
    for rank, environment in enumerate(seen["environments"]):
        expected = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "ROLE_NAME": "default",
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": str(RANKS),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "GLOO_SOCKET_IFNAME": environment["HOROVOD_GLOO_IFACE"],
            "MASTER_ADDR": environment["HOROVOD_GLOO_RENDEZVOUS_ADDR"],
        }
        assert {name: environment[name] for name in expected} == expected
        assert int(environment["MASTER_PORT"]) > 0
        assert environment["TORCHELASTIC_RUN_ID"]
        assert "TORCHELASTIC_USE_AGENT_STORE" not in environment  # rank 0 makes the store
        assert "TF_CONFIG" not in environment


def lightning() -> dict[str, Any]:
    """Train with Lightning over all ranks, each rank for itself, and with a wrong number."""
    import warnings

    import torch
    from lightning import LightningModule, Trainer

    warnings.simplefilter("ignore")

    class Model(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch: Any, _: int) -> Any:
            x, y = batch
            return torch.nn.functional.mse_loss(self.layer(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(**options: Any) -> dict[str, Any]:
        torch.manual_seed(3)
        dataset = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
        loader = torch.utils.data.DataLoader(dataset, batch_size=8 // options.get("devices", 1))
        quiet: dict[str, Any] = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
        }
        trainer = Trainer(
            accelerator="cpu", max_epochs=2, enable_model_summary=False, **quiet, **options
        )
        model = Model()
        trainer.fit(model, loader)
        weights = [value for p in model.parameters() for value in p.detach().flatten().tolist()]
        place = (trainer.world_size, trainer.global_rank, trainer.local_rank, trainer.node_rank)
        return {"place": place, "weights": weights, "pid": os.getpid()}

    import horovod.torch as hvd

    hvd.init()
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    alone = fit(devices=1)
    together = fit(strategy="ddp", devices=local, num_nodes=world // local)
    try:
        fit(strategy="ddp", devices=1)
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {
        "alone": hvd.allgather_object(alone),
        "together": hvd.allgather_object(together),
        "refused": hvd.allgather_object(refused),
        "horovod": _has_horovod_strategy(),
    }


def _has_horovod_strategy() -> bool:
    from lightning.pytorch.strategies import StrategyRegistry

    return any("horovod" in name for name in StrategyRegistry.available_strategies())


def test_lightning_trains_over_the_ranks_and_each_rank_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a batch system has set for one big process of its own is not ours.
    for name, value in {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "x", "SLURM_PROCID": "5"}.items():
        monkeypatch.setenv(name, value)
    seen = HorovodRunner(np=-RANKS, stall_timeout=STALL_SECONDS).run(lightning)
    alone, together = seen["alone"], seen["together"]
    assert [rank["place"] for rank in alone] == [(1, 0, 0, 0)] * RANKS
    assert [rank["place"] for rank in together] == [(2, 0, 0, 0), (2, 1, 1, 0)]
    assert together[0]["weights"] == together[1]["weights"]
    assert together[0]["weights"] == pytest.approx(alone[0]["weights"], rel=1e-4)
    assert [rank["pid"] for rank in alone] == [rank["pid"] for rank in together]
    assert len({rank["pid"] for rank in together}) == RANKS
    for refused in seen["refused"]:
        assert "does not match the world size (2)" in refused
    assert not seen["horovod"]  # Lightning 2 has none: DDP is the way


def ports_of_two_attempts(signs: str) -> int:
    """Make a process group, lose a rank, and make one again."""
    import pathlib
    import signal

    import torch.distributed as dist

    from horovodrunner import checkpoint

    dist.init_process_group("gloo")
    ones = [0] * dist.get_world_size()
    dist.all_gather_object(ones, os.environ["MASTER_PORT"])
    assert len(set(ones)) == 1
    pathlib.Path(signs, f"{checkpoint.attempt}-{os.environ['RANK']}").touch()
    if checkpoint.attempt == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def test_two_runs_at_a_time_that_restart_have_process_groups_of_their_own(tmp_path: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def run(number: int) -> Any:
        signs = tmp_path / str(number)
        signs.mkdir()
        return HorovodRunner(np=-2, max_restarts=1).run(ports_of_two_attempts, signs=str(signs))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [1, 1]
    for number in range(2):
        signs = {path.name for path in (tmp_path / str(number)).iterdir()}
        assert signs >= {"2-0", "2-1"}


def models_and_groups(directory: str, rounds: int) -> list[bool]:
    """Tell, for each model and its group, whether the group outlives what the model has of it."""
    import weakref

    import torch
    import torch.distributed as dist

    seen = []
    place = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    for each_round in range(rounds):
        dist.init_process_group("gloo", f"file://{directory}/{each_round}", **place)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            torch.nn.functional.mse_loss(model(torch.ones(2, 3)), torch.ones(2, 1)).backward()
            optimizer.step()
        totals = [torch.zeros(1) for _ in range(dist.get_world_size())]
        dist.all_gather(totals, torch.ones(1))
        kept: Any = [each.peek() for each in list(weakref.finalize._registry)]  # type: ignore[attr-defined]
        kept = [each for each in kept if each and each[2] == (model.process_group,)]
        seen.append({id(each[0]) for each in kept} == {id(model.reducer), id(model.logger)})
        del kept
        dist.destroy_process_group()
        del model, optimizer
    return seen


def test_a_group_outlives_the_models_that_use_it(tmp_path: Any) -> None:
    """Freed with a model, it holds the GIL, for which its threads may wait in torch 2.13."""
    assert HorovodRunner(np=-1).run(models_and_groups, directory=str(tmp_path), rounds=1) == [True]


@pytest.mark.slow
def test_models_are_freed_on_a_busy_machine(tmp_path: Any) -> None:
    """Without the group's longer life, one in about thirty ends waits forever."""
    busy = [sys.executable, "-c", "while True: pass"]
    runner = HorovodRunner(np=-2, stall_timeout=STALL_SECONDS)
    with processes.started(busy), processes.started(busy):
        assert all(runner.run(models_and_groups, directory=str(tmp_path), rounds=60))
