"""Keeps gloo's process groups of torch for a moment after their end. Runs in: the worker.

When the last reference to a ``ProcessGroupGloo`` goes, torch waits for the group's threads while it
holds the GIL; in torch 2.13 a thread that frees the tensors of the last collective wants the GIL,
too. Both then wait forever: in ``destroy_process_group()``, or where main's model that
DistributedDataParallel wraps is freed (pytorch's ``ProcessGroupGloo.cpp``, ``~ProcessGroupGloo``
and ``runLoop``).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

from horovodrunner.flows.call.import_hook import after_import

__all__ = ["install"]

_kept: list[Any] = []
"""The groups that were destroyed last. By the next time, the threads of these have no work left."""


def install() -> None:
    """See to it that groups outlive ``destroy_process_group``, once torch is imported."""
    after_import("torch.distributed.distributed_c10d", _wrap)


def _wrap(module: Any) -> None:
    destroy = module.destroy_process_group

    @functools.wraps(destroy)
    def destroy_process_group(*args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(Exception):  # another version, which has other private names
            _kept[:] = _backends_of_cpu(module)
        return destroy(*args, **kwargs)

    module.destroy_process_group = destroy_process_group
    package = sys.modules.get("torch.distributed")
    if getattr(package, "destroy_process_group", None) is destroy:
        package.destroy_process_group = destroy_process_group  # type: ignore[union-attr]


def _backends_of_cpu(module: Any) -> list[Any]:
    import torch

    found = []
    for group in module._world.pg_map:
        with contextlib.suppress(RuntimeError):  # it has none, but one for GPUs
            found.append(group._get_backend(torch.device("cpu")))
    return found
