"""The end of a worker whose outcome is safe, without the slow parts. Runs in: the worker.

Freeing every object of torch or TensorFlow takes an interpreter half a second to two, for nothing:
the system takes the memory back at once. What others rely on at a process's end is done.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import os
import stat
import sys
import threading
from _io import _IOBase  # io.IOBase is an abstract class, which takes ten times as long to ask
from typing import Any, NoReturn

__all__ = ["flush_output", "leave"]

_INJECTED = ("LD_PRELOAD", "CUDA_INJECTION64_PATH")
"""Profilers come this way, and write what they have when the C library ends the process."""

_NEEDS_THE_C_LIBRARY = "netCDF4"
"""Its open files are completed when the C library ends the process."""


def leave(exit_code: int) -> NoReturn:
    """End the process: threads are waited for, exit functions called, open files closed.

    The order is the interpreter's own (``Py_FinalizeEx``); what is left out is freeing objects and,
    unless something is loaded that is known to need it, what the C library does at the end.
    """
    ordinary = False
    with contextlib.suppress(BaseException):  # main may have put anything in their places
        ordinary = _NEEDS_THE_C_LIBRARY in sys.modules or any(map(os.environ.get, _INJECTED))
    if ordinary:
        sys.exit(exit_code)
    try:
        with contextlib.suppress(BaseException):  # as multiprocessing does for its processes
            threading._shutdown()  # type: ignore[attr-defined]
        with contextlib.suppress(BaseException):  # it has been printed
            atexit._run_exitfuncs()
        with contextlib.suppress(BaseException):  # what stands for h5py may be anything
            close_files()
        flush_output()
        ctypes.CDLL(None).fflush(None)  # what native code printed
    finally:
        os._exit(exit_code)


def close_files() -> None:
    """Close the files on disk that are open for writing: they hold all that was written then."""
    h5py = sys.modules.get("h5py")  # HDF5 completes files when the C library ends the process
    kinds = (_IOBase, getattr(h5py, "File", _IOBase))
    files: list[Any] = [each for each in gc.get_objects() if issubclass(type(each), kinds)]
    # From the outside to the inside: a text file first, then a compressed one, then its bytes.
    for file in sorted(files, key=_depth):
        with contextlib.suppress(BaseException):  # a closed one; one of main's own kind
            if not isinstance(file, io.IOBase) or (
                file.writable() and stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            ):
                file.close()


def flush_output() -> None:
    """Let out all that was printed, also through what main put in the place of the streams."""
    for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
        with contextlib.suppress(BaseException):  # main may have closed or replaced it
            getattr(sys, name).flush()


def _depth(file: object) -> int:
    if isinstance(file, io.TextIOBase):
        return 0
    if type(file).__module__ != "_io":
        return 1
    return 3 if isinstance(file, io.RawIOBase) else 2
