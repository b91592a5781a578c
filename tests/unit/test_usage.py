"""What ranks and hosts use, as it is measured; the GPUs are simulated."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import psutil
import pytest

from horovodrunner.flows.usage import gpus
from horovodrunner.flows.usage.gpus import Gpu, find_gpu_reader
from horovodrunner.flows.usage.task import watch_usage
from horovodrunner.placement.topology import Slot
from horovodrunner.wire.events import Event, Usage, decode, encode

MIB = 1024 * 1024
SMI_OUTPUT = """\
0, GPU-aaaa, 87, 1024, 81559
1, GPU-bbbb, [N/A], [N/A], 81559
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<END\n{SMI_OUTPUT}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return program


def slot(**changes: Any) -> Slot:
    fields: dict[str, Any] = {
        **dict.fromkeys(("partition", "local_rank", "cross_rank", "host_index"), 0),
        **dict.fromkeys(("size", "local_size", "cross_size"), 1),
        **dict.fromkeys(("host_id", "address", "interface"), ""),
    }
    return Slot(**{**fields, "rank": 3, "host": "node-7", **changes})


def first_usage(slot: Slot) -> Usage:
    """Watch this very process until there is an event."""

    async def watch() -> Usage:
        found: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        watching = asyncio.create_task(watch_usage(slot, os.getpid, found.set_result, 0.01))
        try:
            usage = await found
        finally:
            watching.cancel()
        assert isinstance(usage, Usage)
        return usage

    return asyncio.run(watch())


def read(devices: str | None) -> list[Gpu]:
    reader = find_gpu_reader(devices)
    assert reader is not None
    return reader()


def test_gpus_by_nvidia_smi(smi: Path) -> None:
    first, second = read(None)
    assert first == Gpu(0, 87.0, 1024 * MIB, 81559 * MIB)
    assert math.isnan(second.percent)
    assert (second.number, second.used, second.total) == (1, 0, 81559 * MIB)


@pytest.mark.parametrize(("devices", "indices"), [("1", [1]), ("GPU-aaaa, 1", [0, 1]), ("", [])])
def test_only_the_gpus_of_the_run(smi: Path, devices: str, indices: list[int]) -> None:
    assert [gpu.number for gpu in read(devices)] == indices


def test_gpus_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def rates(device: int) -> types.SimpleNamespace:
        if device == 1:
            raise NVMLError("not supported")
        return types.SimpleNamespace(gpu=40)

    nvml = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda device: f"GPU-{device}",
        nvmlDeviceGetMemoryInfo=lambda device: types.SimpleNamespace(used=device, total=9),
        nvmlDeviceGetUtilizationRates=rates,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    first, second = read(None)
    assert first == Gpu(0, 40.0, 0, 9)
    assert math.isnan(second.percent)


def test_a_host_without_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpu_reader(None) is None


def test_a_rank_reports_its_processes_and_its_host(smi: Path) -> None:
    usage = first_usage(slot())
    assert (usage.rank, usage.host) == (3, "node-7")
    assert usage.memory >= psutil.Process().memory_info().rss // 2
    assert 0 < usage.host_memory_used < usage.host_memory_total
    assert 0 <= usage.host_cpu_percent <= 100
    assert [gpu[0] for gpu in usage.gpus] == [0, 1]
    head, body = encode(usage)
    assert decode(head[12:], body).replace(gpus=()) == usage.replace(gpus=())


def test_other_ranks_leave_the_gpus_to_the_first_of_their_host(smi: Path) -> None:
    assert first_usage(slot(local_rank=1)).gpus == ()


def test_a_gpu_that_fails_costs_only_its_own_numbers(
    monkeypatch: pytest.MonkeyPatch, smi: Path
) -> None:
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert first_usage(slot()).gpus == ()


def test_an_nvidia_smi_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, smi: Path) -> None:
    monkeypatch.setattr(gpus, "SMI_SECONDS", 0.05)
    smi.write_text("#!/bin/sh\nexec sleep 60\n")
    assert first_usage(slot()).gpus == ()
