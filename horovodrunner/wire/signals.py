"""What a task and its worker say without a frame. Runs in: the task and the worker."""

import os
import signal

__all__ = ["EXIT_WITHOUT_PIPES", "STACK_SIGNAL", "pipe_at"]

EXIT_WITHOUT_PIPES = 113
"""A worker leaves with it when main has closed the descriptors by which it talks to its task."""

STACK_SIGNAL = int(getattr(signal, "SIGRTMIN", signal.SIGUSR1)) + 1
"""Makes a worker write its Python stacks; a signal that training code rarely uses."""


def pipe_at(fd: int) -> tuple[int, int]:
    """Return what tells a pipe from any other: main may put something else at its descriptor."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
