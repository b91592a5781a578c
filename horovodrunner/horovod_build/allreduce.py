"""A real allreduce of two processes. Runs in: three processes of its own, as a script.

``python allreduce.py FRAMEWORK`` starts Horovod's rendezvous and runs itself once for each rank.
It is run from a folder of its own, so that no neighbouring file is taken for a package.
"""

from __future__ import annotations

import os
import subprocess
import sys

SIZE = 2
GLOO_TIMEOUT = 60
"""Seconds after which a rank gives up on its peer."""


def main() -> int:
    framework = sys.argv[1]
    if "HOROVOD_RANK" in os.environ:
        be_rank(framework)
        return 0
    return start_ranks(framework)


def start_ranks(framework: str) -> int:
    """Run every rank, wait for them and return the first exit code that is not 0."""
    import psutil
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.gloo_run import create_slot_env_vars
    from horovod.runner.http.http_server import RendezvousServer

    loopback = next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == "127.0.0.1" for address in addresses)
    )
    slots = get_host_assignments(parse_hosts(f"localhost:{SIZE}"), SIZE, SIZE)
    server = RendezvousServer()
    port = server.start()
    server.init(slots)
    common = {
        **os.environ,
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_IFACE": loopback,
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(GLOO_TIMEOUT),
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, framework], env={**common, **create_slot_env_vars(slot)}
        )
        for slot in slots
    ]
    try:
        for _ in ranks:
            # Whichever ends first: after a failure the other would wait for it in vain.
            _, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            if code != 0:
                return code if code > 0 else 128 - code
        return 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        server.stop()


def be_rank(framework: str) -> None:
    rank = int(os.environ["HOROVOD_RANK"])
    expected = float(sum(range(1, SIZE + 1)))
    total = {"torch": sum_with_torch, "tensorflow": sum_with_tensorflow}[framework](rank + 1.0)
    if total != expected:
        raise SystemExit(f"rank {rank}: the allreduce gave {total}, not {expected}")


def sum_with_torch(number: float) -> float:
    import horovod.torch as hvd
    import torch

    hvd.init()
    use_gpu = hvd.nccl_built() and torch.cuda.device_count() >= SIZE
    device = f"cuda:{hvd.local_rank()}" if use_gpu else "cpu"
    total = hvd.allreduce(torch.tensor([number], device=device), op=hvd.Sum)
    hvd.shutdown()
    return float(total.item())


def sum_with_tensorflow(number: float) -> float:
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # two processes must not fill one GPU's memory
    import horovod.tensorflow as hvd

    hvd.init()
    total = hvd.allreduce(tf.constant([number]), op=hvd.Sum)
    result = float(total.numpy()[0])
    hvd.shutdown()
    return result


if __name__ == "__main__":
    raise SystemExit(main())
