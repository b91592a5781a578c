"""A script as people start it with ``horovodrun -np 2 python horovodrun_style.py --epochs 2``."""

import argparse

import horovod.torch as hvd
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--lr", type=float, default=0.1)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 1)

    def forward(self, x):
        return self.fc(x)


def main():
    args = parser.parse_args()
    hvd.init()
    torch.manual_seed(hvd.rank())
    dataset = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    for _ in range(args.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    total = sum(parameter.sum().item() for parameter in model.parameters())
    totals = hvd.allgather_object(total)
    print(f"rank {hvd.rank()} of {hvd.size()}: {args.epochs} epochs, same={len(set(totals)) == 1}")


if __name__ == "__main__":
    main()
