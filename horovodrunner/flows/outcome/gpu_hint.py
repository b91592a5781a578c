"""What to add to an error that comes of ranks without a GPU of their own. Runs in: the worker."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping

__all__ = ["gpu_hint"]

_NOT_ONE_EACH = re.compile(
    r"invalid device ordinal|Duplicate GPU detected|ncclCommInitRank failed: invalid usage"
)


def gpu_hint(error: BaseException, environ: Mapping[str, str] = os.environ) -> str:
    """Return how many ranks and GPUs there are, if CUDA or NCCL missed a GPU for each rank."""
    if not _NOT_ONE_EACH.search(str(error)):
        return ""
    ranks, gpus = int(environ["LOCAL_WORLD_SIZE"]), 0
    with contextlib.suppress(Exception):  # the driver may not answer any more
        gpus = sys.modules["torch"].cuda.device_count()
    if gpus >= ranks:
        return (
            f". This rank sees {gpus} GPU{'s' * (gpus != 1)}, and its own is "
            f"cuda:{environ['LOCAL_RANK']}: call torch.cuda.set_device(int(os.environ"
            "['LOCAL_RANK'])) before anything else on a GPU"
        )
    has = f"{ranks} rank{'s' * (ranks != 1)}"
    sees = f"{gpus} GPU{'s' * (gpus != 1)}"
    if visible := environ.get("CUDA_VISIBLE_DEVICES"):
        sees += f" (CUDA_VISIBLE_DEVICES={visible})"
    return (
        f". This host has {has} of the run, which see {sees}, and each needs one of its own: "
        "start fewer ranks there, or keep tensors on the CPU"
    )
