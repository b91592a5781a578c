"""Which device a model computes on. Runs in: Spark's Python workers.

A Python worker is used by one task after the other, and each may own another GPU. Therefore
``CUDA_VISIBLE_DEVICES`` stays as it is: the GPU is chosen by its number among those that the
process sees.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from horovodrunner.errors import ConfigurationError
from horovodrunner.placement.topology import compose_devices

__all__ = ["Device", "current_device"]


@dataclass(frozen=True)
class Device:
    gpu: int | None
    """Number of the task's GPU among those that this process sees; None: the CPU."""
    cores: int
    """The task's; 0 outside a task, where the frameworks' own choice stands."""

    @property
    def torch_name(self) -> str:
        """What ``torch.device`` takes."""
        return "cpu" if self.gpu is None else f"cuda:{self.gpu}"

    @property
    def keras_name(self) -> str:
        """What ``keras.device`` and ``tf.device`` take."""
        return "cpu:0" if self.gpu is None else f"gpu:{self.gpu}"

    def prepare_torch(self) -> None:
        """Let torch use as many threads as the task has cores."""
        import torch

        if self.cores and torch.get_num_threads() != self.cores:
            torch.set_num_threads(self.cores)

    def prepare_tensorflow(self) -> None:
        """Let TensorFlow use so many threads, and take memory of GPUs as it needs it."""
        import tensorflow as tf

        # what is settled once it has computed anything in this process is not changed any more
        with contextlib.suppress(RuntimeError):
            if self.cores:
                tf.config.threading.set_intra_op_parallelism_threads(self.cores)
                tf.config.threading.set_inter_op_parallelism_threads(1)
            for each in tf.config.list_physical_devices("GPU"):
                tf.config.experimental.set_memory_growth(each, True)


def current_device() -> Device:
    """Return the first GPU of the Spark task that this process works for, else the CPU."""
    from pyspark import TaskContext

    task: Any = TaskContext.get()
    if task is None:
        return Device(None, 0)
    owned = task.resources().get("gpu")
    if owned is None or not owned.addresses:
        return Device(None, task.cpus())
    try:
        index = _gpu_index(owned.addresses, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    return Device(index, task.cpus())


def _gpu_index(addresses: Sequence[str], visible: str | None) -> int:
    """Return the number of a task's first GPU among those that the process sees.

    >>> _gpu_index(["1"], None), _gpu_index(["1"], "4,6"), _gpu_index(["GPU-b"], "GPU-a,GPU-b")
    (1, 1, 1)
    """
    (address,) = compose_devices(addresses[:1], visible)
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        if address in names:
            return names.index(address)
    elif address.isdecimal():
        return int(address)
    raise ValueError(
        f"Spark gave this task GPU {address}, which is not among those that its Python worker can "
        f"name (CUDA_VISIBLE_DEVICES={visible}): let Spark's discovery script give their numbers"
    )
