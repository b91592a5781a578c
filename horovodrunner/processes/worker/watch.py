"""Where main is, and since when it waits in a collective. Runs in: the worker.

A rank that never comes leaves no trace on its peers but this: their call of the collective does
not return. So the main thread's stack is looked at once in a while, from another thread.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from horovodrunner.wire.events import Beat

if TYPE_CHECKING:
    from horovodrunner.flows.profile.worker import StackProfile

__all__ = ["MainThreadWatch", "collective_of"]

_COLLECTIVE_MODULES = ("horovod.", "torch.distributed.")
_STEP_FUNCTIONS = {
    ("torch.autograd.graph", "_engine_run_backward"): "loss.backward()",
    ("tensorflow.python.eager.execute", "quick_execute"): "a TensorFlow step",
}
"""Native calls that may wait or compute: DistributedDataParallel reduces in the first one, a
tf.function in the second one."""

_DDP_MODULE = "torch.nn.parallel.distributed"

_LIBRARIES = frozenset(
    {
        "asyncio",
        "concurrent",
        "contextlib",
        "functools",
        "horovod",
        "keras",
        "lightning",
        "multiprocessing",
        "numpy",
        "pytorch_lightning",
        "queue",
        "selectors",
        "socket",
        "subprocess",
        "tensorflow",
        "tf_keras",
        "threading",
        "torch",
        "transformers",
    }
)
"""Top-level packages whose frames are not the user's own code."""

_OWN_FILES = "horovodrunner/processes/worker/"


def _is_collective(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(_COLLECTIVE_MODULES)


def _is_library(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] in _LIBRARIES


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def collective_of(frames: list[FrameType]) -> str:
    """Name the collective that a stack is in."""
    name = ""
    for frame in frames:
        if not _is_library(frame):
            break
        if _is_collective(frame):
            name = frame.f_code.co_name if frame.f_code.co_name != "wrapper" else name or "wrapper"
        elif name and not str(frame.f_globals.get("__name__", "")).startswith("torch."):
            break  # torch's frames may lie within a collective: autograd functions
    return name


class MainThreadWatch:
    """Samples the main thread's stack.

    A call counts as the same one while its frame is the same object; the innermost frame of a
    collective is therefore kept from one sample to the next, and no other one.
    """

    _now = staticmethod(time.monotonic)  # main may put a clock of its own in its place

    def __init__(self) -> None:
        self._thread_id = threading.main_thread().ident
        self._call: FrameType | None = None
        self._since = self._sampled_at = 0.0

    def begin(self) -> None:
        """Note that main begins."""
        self._sampled_at = self._now()

    def sample(self, rank: int, profile: StackProfile | None = None) -> Beat:
        """Look at the main thread, and count the time since the last look where it is now."""
        frame = sys._current_frames().get(self._thread_id or 0)
        frames = list(_outwards(frame))
        call, waits_in, surely = self._waiting_call(frames)
        now = self._now()
        if call is None or call is not self._call:
            self._since = now
        self._call = call
        if profile is not None:
            profile.add(frames, now - self._sampled_at, waits_in, surely=surely)
        self._sampled_at = now
        return Beat(
            rank,
            where=_user_position(frames),
            waits_in=waits_in,
            surely=surely,
            seconds=now - self._since if call is not None else 0.0,
        )

    def _waiting_call(self, frames: list[FrameType]) -> tuple[FrameType | None, str, bool]:
        if name := collective_of(frames):
            return next(frame for frame in frames if _is_collective(frame)), name, True
        if frames and str(frames[0].f_globals.get("__name__", "")) == _DDP_MODULE:
            # Its own native calls exchange buckets and buffers; computing happens further in.
            return frames[0], "DistributedDataParallel", True
        for frame in frames[:3]:
            key = (str(frame.f_globals.get("__name__", "")), frame.f_code.co_name)
            if key in _STEP_FUNCTIONS:
                return frame, _STEP_FUNCTIONS[key], False
        return None, "", False


def _user_position(frames: list[FrameType]) -> str:
    for frame in frames:
        code = frame.f_code
        if not _is_library(frame) and _OWN_FILES not in code.co_filename:
            return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
    return ""
