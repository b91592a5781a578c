"""A script as people start it with ``torchrun --nproc-per-node 2 torchrun_style.py --epochs 2``."""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


@record
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    assert int(os.environ["LOCAL_RANK"]) < int(os.environ["LOCAL_WORLD_SIZE"])
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=2, sampler=sampler)
    model = DistributedDataParallel(torch.nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    total = sum(parameter.sum() for parameter in model.parameters()).detach()
    totals = [torch.zeros(()) for _ in range(dist.get_world_size())]
    dist.all_gather(totals, total)
    same = len({each.item() for each in totals}) == 1
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {args.epochs} epochs, same={same}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
