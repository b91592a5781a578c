"""What a task and its worker say without a frame. Runs in: the task and the worker."""

import signal

__all__ = ["EXIT_WITHOUT_PIPES", "STACK_SIGNAL"]

EXIT_WITHOUT_PIPES = 113
"""A worker leaves with it when main has closed the descriptors by which it talks to its task."""

STACK_SIGNAL = int(getattr(signal, "SIGRTMIN", signal.SIGUSR1)) + 1
"""Makes a worker write its Python stacks; a signal that training code rarely uses."""
