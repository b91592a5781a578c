"""How busy a host's NVIDIA GPUs are, by NVML or by nvidia-smi. Runs in: the task."""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

__all__ = ["Gpu", "find_gpu_reader"]

SMI_SECONDS = 5.0
_SMI = (
    "nvidia-smi",
    "--query-gpu=index,uuid,utilization.gpu,memory.used,memory.total",
    "--format=csv,noheader,nounits",
)
_MIB = 1024 * 1024


class Gpu(NamedTuple):
    """One GPU now; NaN or 0 for what the driver does not tell, as of a MIG instance."""

    number: int
    percent: float
    used: int
    total: int


def find_gpu_reader(devices: str | None) -> Callable[[], list[Gpu]] | None:
    """Return what reads the GPUs of this host, or None if there are none that can be read.

    `devices` is a value of ``CUDA_VISIBLE_DEVICES``: the GPUs of the run; None for all.
    """
    wanted = None if devices is None else {each.strip() for each in devices.split(",")}
    with contextlib.suppress(Exception):  # not installed, or no driver that it can talk to
        import pynvml

        pynvml.nvmlInit()
        return lambda: _visible(_by_nvml(pynvml), wanted)
    if shutil.which(_SMI[0]):
        return lambda: _visible(_by_smi(), wanted)
    return None


def _visible(found: Iterable[tuple[str, Gpu]], wanted: set[str] | None) -> list[Gpu]:
    return [
        gpu for uuid, gpu in found if wanted is None or str(gpu.number) in wanted or uuid in wanted
    ]


def _by_nvml(nvml: Any) -> Iterable[tuple[str, Gpu]]:
    for index in range(nvml.nvmlDeviceGetCount()):
        device = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml.nvmlDeviceGetUUID(device)
        memory = nvml.nvmlDeviceGetMemoryInfo(device)
        percent = math.nan
        with contextlib.suppress(nvml.NVMLError):
            percent = float(nvml.nvmlDeviceGetUtilizationRates(device).gpu)
        name = uuid.decode() if isinstance(uuid, bytes) else uuid
        yield name, Gpu(index, percent, int(memory.used), int(memory.total))


def _by_smi() -> Iterable[tuple[str, Gpu]]:
    done = subprocess.run(
        _SMI,
        capture_output=True,
        text=True,
        timeout=SMI_SECONDS,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    for line in done.stdout.splitlines():
        index, uuid, *numbers = (field.strip() for field in line.split(","))
        percent, used, total = map(_number, numbers)
        yield uuid, Gpu(int(index), percent, _bytes(used), _bytes(total))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return math.nan


def _bytes(mebibytes: float) -> int:
    return 0 if math.isnan(mebibytes) else int(mebibytes * _MIB)
