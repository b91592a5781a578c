"""Small nasty training functions, without Horovod."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from horovodrunner import log_to_driver


def surroundings() -> dict[str, object]:
    """What code may depend on without saying so; a child's hash is among it."""
    child = [sys.executable, "-c", "print(hash('x'))"]
    names = ("PYTHONHASHSEED", "PYTHONOPTIMIZE", "PYTHONUTF8")
    facts = {
        "hash": hash("x"),
        "hash in a child": int(subprocess.check_output(child)),
        "order": list({"a", "b", "c", "d", "e", "f"}),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "arguments": sys.argv[1:],
        "encoding": sys.stdout.encoding,
        "stdin": Path("/proc/self/fd/0").readlink().name,
        "flags": str(sys.flags),
        **{name: os.environ.get(name) for name in names},
    }
    log_to_driver(f"surroundings: {facts}")
    return facts


def own_module(name: str) -> str:
    """Import a module, here and in a child, and tell whose it is."""
    child = [sys.executable, "-c", f"import {name}; print({name}.__file__)"]
    file = str(importlib.import_module(name).__file__)
    assert subprocess.check_output(child, text=True).strip() == file
    return file


def rank() -> int:
    return int(os.environ["RANK"])


def wait_for_ever() -> None:
    """What a healthy rank does while another one fails: compute."""
    while True:
        sum(range(1000))


def fail(how: str, on_rank: int) -> None:
    """Fail on one rank in the given way while the others compute."""
    if rank() != on_rank:
        wait_for_ever()
    if how == "exception":
        raise ValueError("the learning rate is negative")
    if how == "sys.exit":
        sys.exit(3)
    if how == "sys.exit text":
        sys.exit("no data")
    if how == "os._exit":
        os._exit(4)
    os.kill(os.getpid(), signal.Signals[how])
    time.sleep(60)


def ignore_sigterm_with_children(pid_file: str, on_rank: int) -> None:
    """Leave a child behind and ignore SIGTERM on every rank; one rank fails."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready = Path(f"{pid_file}.{rank()}")
    ignoring = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", ignoring])
    ready.write_text(f"{os.getpid()} {child.pid}\n")
    if rank() == on_rank:
        pids = 2 * int(os.environ["WORLD_SIZE"])
        while len("".join(path.read_text() for path in ready.parent.iterdir()).split()) < pids:
            time.sleep(0.01)
        raise RuntimeError("failed with children")
    wait_for_ever()


def print_a_lot(lines: int, width: int) -> None:
    for i in range(lines):
        print(f"{rank()}:{i}:" + "x" * width)
    for i in range(lines):
        print(f"\r{rank()} bar {i + 1}/{lines}", end="", file=sys.stderr)
    print(f"\n{rank()} done", file=sys.stderr)


def shown_of_a_bar(lines: list[str], rank: int) -> list[str]:
    """What of the bar of :func:`print_a_lot` is among lines."""
    prefix = f"[{rank}]<stderr>:{rank} bar "
    return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]


def leave_a_child(**options: Any) -> int:
    return subprocess.Popen(["sleep", "600"], **options).pid


def leave_a_thread() -> str:
    threading.Thread(target=time.sleep, args=(600,), daemon=False).start()
    return "result"


def log_things() -> None:
    log_to_driver(f"from rank {rank()}")
    log_to_driver("long " + "y" * 5000)


def count_run(directory: str) -> int:
    """Leave a file per call, so that a test can count how often main ran."""
    Path(directory, f"rank{rank()}-{os.getpid()}-{time.monotonic_ns()}").touch()
    return os.getpid()
