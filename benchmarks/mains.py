"""A main of a module, as tests and scripts have it: it travels as a name."""

from __future__ import annotations

import horovod.torch as hvd
import torch


def train() -> int:
    """Make one step with an optimizer, on the smallest network.

    Returns
    -------
    int
        The rank.
    """
    hvd.init()
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    return int(hvd.rank())
