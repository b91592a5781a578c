"""Small nasty training functions, without Horovod."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from horovodrunner import log_to_driver


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
    print(f"{rank()} done", file=sys.stderr)


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
