"""Times the run's own backend before main, in a process of its own. Runs in: the worker.

The process is forked from the worker, which has imported what main mentions and has begun nothing
with it. It begins Horovod or ``torch.distributed``, reduces, ends them and leaves, so that main
finds a process in which none of that has happened.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from horovodrunner.wire.events import Job, Measured

__all__ = ["measure"]

SECONDS = 60.0
"""How long it may take; the ranks wait for each other in it."""

LARGE_NUMBERS = 8 * 1024 * 1024
"""Of four bytes each."""

SMALL_TRIES = 5
SMI_SECONDS = 5.0

_LEFT_OUT = ("HOROVOD_TIMELINE", "HOROVOD_AUTOTUNE_LOG")
"""Files that are main's."""

_DEVICES = "CUDA_VISIBLE_DEVICES"
_IS_DEVICE = re.compile(r"\s*(\d+|GPU-\S+|MIG-\S+)\s*")


def measure(spec: Job) -> Measured:
    """Fork, measure there, and return what came of it; nothing is raised."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # our own threads hold no lock here
        child = os.fork()
    if child == 0:
        _leave_with(writing, spec)
    os.close(writing)
    try:
        found = _read(reading, time.monotonic() + SECONDS)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # it has told all, or hangs
        _, status = os.waitpid(child, 0)
    if found is None:
        return Measured(spec.rank, problem=_silent_end(os.waitstatus_to_exitcode(status)))
    return Measured(
        spec.rank,
        backend=found["backend"],
        seconds=tuple(found["seconds"]),
        gpus=tuple(found["gpus"]),
        problem=found["problem"],
    )


def _silent_end(code: int) -> str:
    if code == -signal.SIGKILL:  # ours
        return f"its backend did not answer within {SECONDS:g} s"
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"the process that tried its backend ended with {how}; its standard error may say why"


def _leave_with(writing: int, spec: Job) -> None:
    found: dict[str, Any] = {"backend": "", "seconds": [], "gpus": [], "problem": ""}
    try:
        os.environ.update({**spec.environment, **spec.preflight})
        for name in _LEFT_OUT:
            os.environ.pop(name, None)
        found["gpus"], found["problem"] = _gpus()
        if not found["problem"]:
            found["backend"], found["seconds"] = _reductions()
    except BaseException as error:  # noqa: BLE001 - told by the parent
        found["problem"] = f"{type(error).__name__}: {error}"[:2000]
    finally:
        with contextlib.suppress(BaseException):
            os.write(writing, json.dumps(found).encode())
        os._exit(0)


def _read(reading: int, end_by: float) -> dict[str, Any] | None:
    data, poll = b"", select.poll()
    poll.register(reading, select.POLLIN)
    while (left := end_by - time.monotonic()) > 0 and poll.poll(left * 1000):
        piece = os.read(reading, 65536)
        if not piece:
            break
        data += piece
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(data)
        return found
    return None


def _reductions() -> tuple[str, list[float]]:
    """Return the backend's name, and seconds of a small and a large allreduce."""
    if "horovod.torch" in sys.modules:
        return _of_horovod()
    if "torch" in sys.modules:
        return _of_torch()
    return "", []


def _of_horovod() -> tuple[str, list[float]]:
    import torch

    hvd = sys.modules["horovod.torch"]
    hvd.init()
    device = _device(hvd.local_rank())

    def reduce(tensor: Any) -> None:
        hvd.allreduce_(tensor, name=f"preflight.{tensor.numel()}", op=hvd.Sum)
        _synchronize(device)

    times = _timed(torch, device, reduce)
    hvd.shutdown()
    return "Horovod" + (f" on {device}" if device != "cpu" else ""), times


def _of_torch() -> tuple[str, list[float]]:
    import torch
    import torch.distributed as dist

    device = _device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device != "cpu" and dist.is_nccl_available() else "gloo"
    if backend == "gloo":
        device = "cpu"
    dist.init_process_group(backend, timeout=timedelta(seconds=SECONDS))

    def reduce(tensor: Any) -> None:
        dist.all_reduce(tensor)
        _synchronize(device)

    times = _timed(torch, device, reduce)
    dist.destroy_process_group()
    return f"torch.distributed ({backend})", times


def _timed(torch: Any, device: str, reduce: Callable[[Any], None]) -> list[float]:
    small, large = torch.ones(1, device=device), torch.ones(LARGE_NUMBERS, device=device)
    seconds = []
    for tensor, tries in ((small, SMALL_TRIES), (large, 1)):
        took = []
        for _ in range(tries):
            began = time.perf_counter()
            reduce(tensor)
            took.append(time.perf_counter() - began)
        seconds.append(min(took))
    return seconds


def _device(local_rank: int) -> str:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return "cpu"
    torch.cuda.set_device(local_rank % count)
    return f"cuda:{local_rank % count}"


def _synchronize(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def _gpus() -> tuple[list[str], str]:
    """Return the names of the GPUs that this rank sees, and what is wrong with them."""
    # as CUDA reads it: what is no device ends the list
    given = os.environ.get(_DEVICES, "").split(",")
    owned = [each.strip() for each in itertools.takewhile(_IS_DEVICE.fullmatch, given)]
    torch = sys.modules.get("torch")
    if torch is not None and (torch.version.cuda or torch.version.hip):
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    elif shutil.which("nvidia-smi"):
        names = _names_by_smi(owned)
    else:
        return [], ""  # nobody here can tell
    if len(names) < len(owned) and not any(each.startswith("MIG-") for each in owned):
        return names, (
            f"it owns {len(owned)} GPUs ({_DEVICES}={','.join(owned)}), and {len(names)} work: see "
            "what nvidia-smi says there"
        )
    return names, ""


def _names_by_smi(owned: list[str]) -> list[str]:
    command = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    names: list[str] = []
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # then no GPU works
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=SMI_SECONDS,
            stdin=subprocess.DEVNULL,
            check=True,
        )
        for line in done.stdout.splitlines():
            index, uuid, name = line.split(", ", 2)
            if not owned or index in owned or any(uuid.startswith(each) for each in owned):
                names.append(name)
    return names
