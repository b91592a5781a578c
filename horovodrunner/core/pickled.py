"""A pickle whose large buffers stand beside it, in a file or in memory. Runs in: every process.

Pickle protocol 5 (PEP 574) leaves an array's memory out of the pickle. In the worker it goes from
the array to the file, and on the driver from the socket to where the array finds it: nothing else
is made of it on the way.
"""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import os
import pickle
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import cloudpickle

__all__ = ["Layout", "Pickled", "SinkError", "reader_of_pieces", "write_pickle"]

Layout = tuple[int, ...]
"""Bytes of the pickle itself and of each buffer beside it, in the order in which they stand."""

BESIDE_BYTES = 64 * 1024
"""A smaller buffer stays in the pickle."""

MOST_BESIDE = 10_000
"""Further buffers stay in the pickle: the layout has to fit a frame's header."""

MAPPED_BYTES = 4 * 1024 * 1024
"""A buffer from this size on gets a mapping of its own."""


class SinkError(OSError):
    """The file does not take the pickle."""


def write_pickle(value: object, descriptor: int) -> Layout:
    """Pickle a value into an empty file; large buffers are copied once, into it.

    Parameters
    ----------
    value
        Any object.
    descriptor
        The file's.

    Returns
    -------
    Layout
        What stands in the file.

    Raises
    ------
    SinkError
        If the file does not take it.
    Exception
        Whatever pickling raises.
    """
    beside: list[memoryview] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < BESIDE_BYTES or len(beside) >= MOST_BESIDE:
            return True
        beside.append(view)
        return False

    sink = _Sink(descriptor)
    cloudpickle.Pickler(sink, pickle.HIGHEST_PROTOCOL, buffer_callback=stays).dump(value)
    layout = (sink.written, *(view.nbytes for view in beside))
    for view in beside:
        sink.write(view)
    return layout


class _Sink:
    """Writes everything at once; a pickler takes no notice of how much was written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.written = 0

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        try:
            while view:
                count = os.write(self._descriptor, view)
                self.written += count
                view = view[count:]
        except OSError as error:
            raise SinkError(error.errno, os.strerror(error.errno or 0)) from error


class Pickled:
    """A pickle and its buffers in memory, each in a piece of its own.

    What is unpickled uses the buffers' memory: an array that is kept keeps its own buffer alive,
    and no other.

    Parameters
    ----------
    layout
        The sizes; the memory is empty until :meth:`fill`.

    Raises
    ------
    OSError, MemoryError
        If there is not so much memory.
    """

    def __init__(self, layout: Layout) -> None:
        self._parts = [_memory(size) for size in layout]

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(len(part) for part in self._parts)

    def fill(self, read_into: Callable[[memoryview], object]) -> None:
        """Read the content.

        Parameters
        ----------
        read_into
            Called with one piece of memory after another; fills each.
        """
        for part in self._parts:
            with memoryview(part) as view:
                read_into(view)

    def load(self) -> Any:
        """Unpickle; only ever what comes from a peer that proved the run's token.

        The memory belongs to the value then: nothing else keeps an array that is dropped.

        Returns
        -------
        object
            The value.
        """
        value = pickle.loads(self._parts[0], buffers=self._parts[1:])  # noqa: S301 - see above
        self._parts.clear()
        return value

    def missing_name(self) -> str:
        """Give the class or function that is referred to and cannot be imported here, if any."""
        unpickler = _NamingUnpickler(io.BytesIO(self._parts[0]), buffers=self._parts[1:])
        with contextlib.suppress(Exception):
            unpickler.load()
        return unpickler.missing

    def keep(self, file: BinaryIO) -> None:
        """Write a file that ``pickle.load`` reads, without this package.

        Parameters
        ----------
        file
            Open for writing.
        """
        if len(self._parts) == 1:
            file.write(self._parts[0])
        else:
            pickle.Pickler(file, pickle.HIGHEST_PROTOCOL).dump(_Nested(self._parts))


class _Nested:
    """Pickles as a call that unpickles the pickle within with the buffers beside it."""

    def __init__(self, parts: list[bytearray | mmap.mmap]) -> None:
        self._parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        stream, *buffers = (pickle.PickleBuffer(part) for part in self._parts)
        return functools.partial(pickle.loads, buffers=buffers), (stream,)


class _NamingUnpickler(pickle.Unpickler):
    """Remembers the name that could not be found."""

    missing = ""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except Exception:
            self.missing = f"{module}.{name}"
            raise


def reader_of_pieces(pieces: Iterable[bytes]) -> Callable[[memoryview], None]:
    """Make a :meth:`Pickled.fill`'s argument of pieces that come one after another.

    Parameters
    ----------
    pieces
        Bytes; cut anywhere.

    Returns
    -------
    callable
        Fills memory with what comes next. Raises EOFError when nothing does.
    """
    coming = iter(pieces)
    rest = memoryview(b"")

    def read_into(view: memoryview) -> None:
        nonlocal rest
        while view:
            if not rest:
                piece = next(coming, None)
                if piece is None:
                    raise EOFError(f"the result's last {len(view)} bytes are missing")
                rest = memoryview(piece)
            count = min(len(rest), len(view))
            view[:count] = rest[:count]
            view, rest = view[count:], rest[count:]

    return read_into


def _memory(size: int) -> bytearray | mmap.mmap:
    """Give memory that can be written to.

    A mapping is not filled with zeros first, and huge pages make filling it twice as fast.
    """
    if size < MAPPED_BYTES:
        return bytearray(size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
