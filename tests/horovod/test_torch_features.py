"""What people use of Horovod's torch API, on the torch that is installed: all in one run."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from horovodrunner import HorovodRunner

pytestmark = pytest.mark.horovod

RANKS = 2
STALL_SECONDS = 60


def trained(rank: int, size: int, wrap: Callable[..., Any] | None, passes: int = 1) -> list[float]:
    """Train a linear model on this rank's shard, in so many backward passes per step."""
    import torch

    torch.manual_seed(7)
    inputs, targets = torch.randn(8, 3), torch.randn(8, 1)
    model = torch.nn.Linear(3, 1)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    if wrap is not None:
        optimizer = wrap(optimizer, model.named_parameters())
    x, y = inputs[rank::size], targets[rank::size]
    for _ in range(3):
        optimizer.zero_grad()
        for number in range(passes):
            loss = torch.nn.functional.mse_loss(model(x[number::passes]), y[number::passes])
            (loss / passes).backward()
        optimizer.step()
    return [value for p in model.parameters() for value in p.detach().flatten().tolist()]


def optimizers(hvd: Any) -> dict[str, Any]:
    """Return both ranks' weights after training with several settings."""
    settings: dict[str, dict[str, Any]] = {
        "average": {},
        "passes": {"backward_passes_per_step": 2},
        "fp16": {"compression": hvd.Compression.fp16},
        "grouped": {"groups": 1},
        "predivided": {"gradient_predivide_factor": 2.0},
    }
    found = {"alone": hvd.allgather_object(trained(hvd.rank(), hvd.size(), None))}
    for name, options in settings.items():

        def wrap(optimizer: Any, parameters: Any, options: Any = options) -> Any:
            return hvd.DistributedOptimizer(optimizer, parameters, **options)

        passes = options.get("backward_passes_per_step", 1)
        own = trained(hvd.rank(), hvd.size(), wrap, passes)
        found[name] = hvd.allgather_object(own)
    return found


def clipped(hvd: Any) -> list[float]:
    """Clip the averaged gradient between synchronize() and step(), with a schedule."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer = hvd.DistributedOptimizer(optimizer, [("weight", weight)])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (weight * 10.0 * hvd.rank()).sum().backward()  # 5 on average
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_([weight], 2.0)
        with optimizer.skip_synchronize():
            optimizer.step()
        schedule.step()
    return list(hvd.allgather_object(round(weight.item(), 4)))


def broadcasts(hvd: Any) -> dict[str, Any]:
    """Hand every rank rank 0's model and optimizer, which alone was restored."""
    import torch

    same = {}
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        model = torch.nn.Linear(2, 1)
        options = {"momentum": 0.9, "weight_decay": 0.1} if kind is torch.optim.SGD else {}
        optimizer = kind(model.parameters(), lr=0.1 * (hvd.rank() + 1), **options)
        if hvd.rank() == 0:
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        texts = hvd.allgather_object(str((model.state_dict(), optimizer.state_dict())))
        assert "tensor" in str(optimizer.state_dict()["state"])
        same[kind.__name__] = texts[0] == texts[1]
    return same


def one_optimizer(hvd: Any) -> dict[str, Any]:
    """Use the plain optimizer beside the one that wraps it, and a closure."""
    import torch

    found = {}
    weight = torch.nn.Parameter(torch.zeros(1))
    plain = torch.optim.SGD([weight], lr=1.0, momentum=0.5)
    saved = plain.state_dict()
    optimizer = hvd.DistributedOptimizer(plain, [("weight", weight)])
    saved["state"] = {0: {"momentum_buffer": torch.tensor([4.0])}}
    saved["param_groups"][0]["lr"] = 0.1
    plain.load_state_dict(saved)  # by its old name, after it was wrapped
    (weight * 10.0 * hvd.rank()).sum().backward()
    optimizer.step()
    found["loaded by the old name"] = round(weight.item(), 4)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    found["lr of a new group"] = optimizer.param_groups[1]["lr"]

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer = hvd.DistributedOptimizer(optimizer, [("with a closure", weight)])

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (weight * 10.0 * hvd.rank()).sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    found["closure"] = weight.item()
    return {name: hvd.allgather_object(value) for name, value in found.items()}


def broadcasts_of_a_part(hvd: Any) -> dict[str, Any]:
    """Broadcast optimizers of which rank 0 has no state, or state for some parameters."""
    import torch

    found: dict[str, Any] = {}
    # Without any state: options alone, and no step that nobody made.
    for kind in (torch.optim.SGD, torch.optim.Adam):
        model = torch.nn.Linear(2, 1)
        optimizer = kind(model.parameters(), lr=0.1 * (hvd.rank() + 1))
        if hvd.rank() == 1:
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        state = optimizer.state_dict()
        found[kind.__name__] = (state["param_groups"][0]["lr"], len(state["state"]))
    # A part that has never been used has no state.
    torch.manual_seed(0)
    model = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(3))
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    if hvd.rank() == 0:
        model[2](model[0](torch.ones(1, 2))).sum().backward()
        optimizer.step()
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    found["part"] = str(optimizer.state_dict()["state"])
    return {name: hvd.allgather_object(value) for name, value in found.items()}


def collectives(hvd: Any) -> dict[str, Any]:
    """Use those beside allreduce."""
    import torch

    rank = hvd.rank()
    mine = torch.arange(4.0) + 10 * rank
    splits = torch.tensor([1, 3], dtype=torch.int32)
    received, counts = hvd.alltoall(mine, splits=splits)
    grouped = hvd.grouped_allreduce([torch.ones(2) * rank, torch.ones(1)], op=hvd.Sum)
    return {
        "alltoall": hvd.allgather_object((received.tolist(), counts.tolist())),
        "grouped": [tensor.tolist() for tensor in grouped],
        "scattered": hvd.allgather_object(hvd.reducescatter(mine, op=hvd.Sum).tolist()),
        "uneven": hvd.allgather(torch.full((rank + 1, 1), float(rank))).flatten().tolist(),
        "object": hvd.broadcast_object({"from": rank}, root_rank=1),
    }


def embeddings(hvd: Any) -> dict[str, bool]:
    """Train an embedding with sparse gradients, and compare with the whole batch."""
    import torch

    def after(wrap: Callable[[Any, Any], Any] | None, tokens: list[int]) -> Any:
        torch.manual_seed(7)
        embedding = torch.nn.Embedding(6, 2, sparse=True)
        optimizer: Any = torch.optim.SGD(embedding.parameters(), lr=1.0)
        if wrap is not None:
            optimizer = wrap(optimizer, embedding.named_parameters())
        for _ in range(2):
            optimizer.zero_grad()
            (embedding(torch.tensor(tokens)) ** 2).mean().backward()
            optimizer.step()
        return embedding.weight

    whole = after(None, [0, 3, 1, 3])
    found = {}
    for dense in (True, False):

        def wrap(optimizer: Any, parameters: Any, dense: bool = dense) -> Any:
            return hvd.DistributedOptimizer(optimizer, parameters, sparse_as_dense=dense)

        own = after(wrap, [hvd.rank(), 3])
        found["dense" if dense else "sparse"] = all(
            hvd.allgather_object(bool(torch.allclose(own, whole, atol=1e-6)))
        )
    return found


def elastic(hvd: Any) -> dict[str, Any]:
    """Use the elastic state objects as in a script for ``horovodrun --min-np``."""
    import torch

    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, float(hvd.rank()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler = hvd.elastic.ElasticSampler(list(range(8)), shuffle=False)
    state = hvd.elastic.TorchState(
        model=model, optimizer=optimizer, sampler=sampler, epoch=hvd.rank()
    )
    state.sync()
    synced = hvd.allgather_object((model.weight.tolist(), state.epoch, list(sampler)))
    sampler.record_batch(0, 2)
    state.commit()
    state.epoch = 6
    torch.nn.init.constant_(model.weight, 9.0)
    state.restore()

    @hvd.elastic.run  # type: ignore[untyped-decorator]
    def train(state: Any) -> int:
        while state.epoch < 3:
            hvd.allreduce(torch.ones(1), name="step")
            state.epoch += 1
            state.commit()
        return int(state.epoch)

    restored = (model.weight.tolist(), state.epoch, len(sampler))
    return {"synced": synced, "restored": restored, "epoch": train(state)}


def joined(hvd: Any) -> list[Any]:
    """Train on more batches on rank 0, and go on together."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer = hvd.DistributedOptimizer(optimizer, [("weight", weight)])
    for _ in range(5 if hvd.rank() == 0 else 2):
        optimizer.zero_grad()
        weight.sum().backward()
        optimizer.step()
    last = hvd.join()
    hvd.broadcast_parameters({"weight": weight}, root_rank=last)
    total = hvd.allreduce(torch.ones(1), op=hvd.Sum, name="after join")
    return list(hvd.allgather_object((last, weight.item(), total.item())))


def sync_batch_norm_of_the_cpu(hvd: Any) -> str:
    """Ask for what torch has no CPU kernel for."""
    import torch

    try:
        hvd.SyncBatchNorm(3)(torch.randn(4, 3))
    except ValueError as error:
        return str(error)
    return ""


def with_a_child(hvd: Any) -> list[Any]:
    """Fork, with Horovod's threads and connections in this process; the child leaves main."""
    import torch

    pid = os.fork()  # noqa: TID251 -- in a rank
    if not pid:
        sys.exit(3)
    if not select.select([os.pidfd_open(pid)], [], [], STALL_SECONDS / 2)[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    total = hvd.allreduce(torch.ones(1), op=hvd.Sum, name="after the child")
    return list(hvd.allgather_object((code, total.item())))


SECTIONS = (
    optimizers, clipped, one_optimizer, broadcasts, broadcasts_of_a_part, collectives, embeddings,
    elastic, sync_batch_norm_of_the_cpu, joined, with_a_child,
)  # fmt: skip


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    def main() -> dict[str, Any]:
        import horovod.torch as hvd

        hvd.init()
        return {section.__name__: section(hvd) for section in SECTIONS}

    found: dict[str, Any] = HorovodRunner(np=-RANKS, stall_timeout=STALL_SECONDS).run(main)
    return found


def test_gradients_are_averaged(seen: dict[str, Any]) -> None:
    whole = trained(0, 1, None)
    for name in ("average", "passes", "grouped", "predivided"):
        first, second = seen["optimizers"][name]
        assert first == second, name
        assert first == pytest.approx(whole, rel=1e-4, abs=1e-6), name
    first, second = seen["optimizers"]["fp16"]
    assert first == second
    assert first == pytest.approx(whole, abs=5e-3)


def test_without_the_distributed_optimizer_ranks_go_apart(seen: dict[str, Any]) -> None:
    first, second = seen["optimizers"]["alone"]
    assert first != pytest.approx(second, abs=5e-3)
    assert first != pytest.approx(trained(0, 1, None), abs=5e-3)


def test_a_gradient_is_clipped_after_averaging(seen: dict[str, Any]) -> None:
    assert seen["clipped"] == [-3.0, -3.0]  # 2 at a rate of 1, and 2 at 0.5


def test_rank_0_gives_the_others_its_model_and_optimizer(seen: dict[str, Any]) -> None:
    assert seen["broadcasts"] == {"SGD": True, "Adam": True, "AdamW": True}


def test_an_optimizer_and_its_wrapper_are_one(seen: dict[str, Any]) -> None:
    found = seen["one_optimizer"]
    # velocity 0.5 * 4 + 5 on average, at a rate of 0.1
    assert found["loaded by the old name"] == [-0.7, -0.7]
    assert found["lr of a new group"] == [1.0, 1.0]
    assert found["closure"] == [-10.0, -10.0]


def test_a_broadcast_gives_what_rank_0_has_and_no_more(seen: dict[str, Any]) -> None:
    found = seen["broadcasts_of_a_part"]
    assert found["SGD"] == [(0.1, 0)] * RANKS
    assert found["Adam"] == [(0.1, 0)] * RANKS
    here, there = found["part"]
    assert here == there
    assert "tensor(1.)" in here


def test_collectives(seen: dict[str, Any]) -> None:
    assert seen["collectives"] == {
        "alltoall": [([0.0, 10.0], [1, 1]), ([1.0, 2.0, 3.0, 11.0, 12.0, 13.0], [3, 3])],
        "grouped": [[1.0, 1.0], [2.0]],
        "scattered": [[10.0, 12.0], [14.0, 16.0]],
        "uneven": [0.0, 1.0, 1.0],
        "object": {"from": 1},
    }


def test_sparse_gradients_equal_those_of_the_whole_batch(seen: dict[str, Any]) -> None:
    assert seen["embeddings"] == {"dense": True, "sparse": True}


def test_elastic_states_work_in_a_run_of_fixed_size(seen: dict[str, Any]) -> None:
    assert seen["elastic"] == {
        "synced": [([[0.0, 0.0]], 0, [0, 2, 4, 6]), ([[0.0, 0.0]], 0, [1, 3, 5, 7])],
        "restored": ([[0.0, 0.0]], 0, 2),
        "epoch": 3,
    }


def test_a_rank_with_fewer_batches_joins(seen: dict[str, Any]) -> None:
    last, weight, total = seen["joined"][0]
    assert last == 0
    assert weight == pytest.approx(-2 - 3 / 2)  # the joined rank counts as 0
    assert seen["joined"] == [(last, weight, total)] * RANKS
    assert total == RANKS


def test_a_child_leaves_horovod_to_its_parent(seen: dict[str, Any]) -> None:
    assert seen["with_a_child"] == [(3, RANKS)] * RANKS


def test_sync_batch_norm_says_that_it_needs_a_gpu(seen: dict[str, Any]) -> None:
    assert "expected input tensor to be on GPU" in seen["sync_batch_norm_of_the_cpu"]
