"""A real allreduce of two processes. Runs in: the driver of a run of its own, as a script.

It is run from a folder of its own, so that no neighbouring file is taken for a package.
"""

from __future__ import annotations

import sys

from horovodrunner import HorovodRunner

SIZE = 2


def sum_with_torch() -> float:
    import horovod.torch as hvd
    import torch

    hvd.init()
    use_gpu = hvd.nccl_built() and torch.cuda.device_count() >= hvd.size()
    device = f"cuda:{hvd.local_rank()}" if use_gpu else "cpu"
    total = hvd.allreduce(torch.tensor([hvd.rank() + 1.0], device=device), op=hvd.Sum)
    return float(total.item())


def sum_with_tensorflow() -> float:
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # two processes must not fill one GPU's memory
    import horovod.tensorflow as hvd

    hvd.init()
    total = hvd.allreduce(tf.constant([hvd.rank() + 1.0]), op=hvd.Sum)
    return float(total.numpy()[0])


if __name__ == "__main__":
    sums = {"torch": sum_with_torch, "tensorflow": sum_with_tensorflow}
    found = HorovodRunner(np=-SIZE).run(sums[sys.argv[1]])
    expected = float(sum(range(1, SIZE + 1)))
    if found != expected:
        raise SystemExit(f"the allreduce gave {found}, not {expected}")
