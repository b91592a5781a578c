"""A pickle whose large buffers stand beside it, in a file or in memory. Runs in: every process.

Pickle protocol 5 (PEP 574) leaves the memory of arrays and tensors out of the pickle. In the worker
it goes from the array to the file, and on the driver from the socket to where the array finds it:
nothing else is made of it on the way.
"""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import os
import pickle
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, ClassVar

import cloudpickle

from horovodrunner.pickling.enums import make_enum
from horovodrunner.pickling.pickler import Call, Pickler, at_any_depth, make_class_once

__all__ = [
    "BufferedPickle",
    "Layout",
    "SinkError",
    "dump",
    "loads",
    "reader_of_pieces",
    "write_pickle",
]

Layout = tuple[int, ...]
"""Bytes of the pickle itself and of each buffer beside it, in the order in which they stand."""

BESIDE_BYTES = 64 * 1024
"""A smaller buffer stays in the pickle."""

MOST_BESIDE = 10_000
"""Further buffers stay in the pickle: the layout has to fit a frame's header."""

MAPPED_BYTES = 4 * 1024 * 1024
"""A buffer from this size on gets a mapping of its own."""

_READ_BYTES = 256 * 1024

_cloudpickle = cloudpickle.cloudpickle
_MAKE_CLASSES = {_cloudpickle._make_skeleton_class: 4, _cloudpickle._make_skeleton_enum: 5}
"""cloudpickle's functions that make a class, and which argument is its identity."""


class SinkError(OSError):
    """The file does not take the pickle."""


def dump(value: object, file: Any, pickler: Callable[..., Any] = Pickler) -> list[memoryview]:
    """Pickle a value into a file and return the large buffers that :func:`loads` needs besides."""
    beside: list[memoryview] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < BESIDE_BYTES or len(beside) >= MOST_BESIDE:
            return True
        beside.append(view)
        return False

    pickler(file, buffer_callback=stays).dump(value)
    return beside


def write_pickle(value: object, descriptor: int) -> Layout:
    """Pickle a value into an empty file; large buffers are copied once, into it.

    Raises SinkError if the file does not take it, and whatever pickling raises.
    """

    def write(pickler: Callable[..., Any]) -> Layout:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        sink = _Sink(descriptor)
        beside = dump(value, sink, pickler)
        layout = (sink.written, *(view.nbytes for view in beside))
        for view in beside:
            sink.write(view)
        return layout

    return at_any_depth(write, Pickler)


class _Sink:
    """Writes everything at once; a pickler takes no notice of how much was written."""

    _os_write = staticmethod(os.write)  # main may have put another in its place

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.written = 0

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        try:
            while view:
                count = self._os_write(self._descriptor, view)
                self.written += count
                view = view[count:]
        except OSError as error:
            raise SinkError(error.errno, os.strerror(error.errno or 0)) from error


class BufferedPickle:
    """A pickle and its buffers in memory, each in a piece of its own.

    What is unpickled uses the buffers' memory: an array that is kept keeps its own buffer alive,
    and no other. The memory is empty until :meth:`fill`.
    """

    def __init__(self, layout: Layout) -> None:
        self._parts = [_memory(size) for size in layout]

    @property
    def size(self) -> int:
        return sum(len(part) for part in self._parts)

    def fill(self, read_into: Callable[[memoryview], object]) -> None:
        """Call `read_into` with one piece of memory after another, to fill each."""
        for part in self._parts:
            with memoryview(part) as view:
                read_into(view)

    def load(self) -> Any:
        """Unpickle; only ever what comes from a peer that proved the run's token.

        The memory belongs to the value then: nothing else keeps an array that is dropped.
        """
        value = loads(self._parts[0], self._parts[1:])
        self._parts.clear()
        return value

    def obstacle(self) -> tuple[str, bool]:
        """Return the name of what cannot be unpickled, and whether an import failed."""
        unpickler = _NamingUnpickler(io.BytesIO(self._parts[0]), buffers=self._parts[1:])
        try:
            unpickler.load()
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001 - that is what is looked for
            return unpickler.missing or unpickler.made, bool(unpickler.missing)
        return "", False

    def keep(self, file: BinaryIO) -> None:
        """Write a file that ``pickle.load`` reads, without this package."""
        stream, *buffers = (pickle.PickleBuffer(part) for part in self._parts)
        if not buffers:
            file.write(stream)
            return
        whole = Call(functools.partial(pickle.loads, buffers=buffers), stream)
        pickle.Pickler(file, pickle.HIGHEST_PROTOCOL).dump(whole)


def _memory(size: int) -> bytearray | mmap.mmap:
    """Return memory that can be written to.

    A mapping is not filled with zeros first, and huge pages make filling it twice as fast.
    """
    if size < MAPPED_BYTES:
        return bytearray(size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def loads(data: bytes | bytearray | memoryview | mmap.mmap, buffers: Iterable[Any] = ()) -> Any:
    """Unpickle without a copy; only ever what comes from a peer that proved the run's token.

    Classes that this process has sent are what they are here.
    """
    with io.BufferedReader(_Reading(memoryview(data)), _READ_BYTES) as file:
        return _Unpickler(file, buffers=buffers).load()


class _Reading(io.RawIOBase):
    """Reads memory as a file, without a copy of all of it."""

    def __init__(self, view: memoryview) -> None:
        self._left = view

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        view = memoryview(into).cast("B")
        count = min(len(view), len(self._left))
        view[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


class _Unpickler(pickle.Unpickler):
    """Leaves classes as they are that this process has already, because it has sent them."""

    def __init__(self, file: Any, *, buffers: Iterable[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._had: set[int] = set()

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if module == _cloudpickle.__name__:
            if found in _MAKE_CLASSES:
                return functools.partial(self._make, found)
            if found is _cloudpickle._class_setstate:
                return self._set_state
        return found

    def _make(self, make: Any, *args: Any) -> Any:
        had = _cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(args[_MAKE_CLASSES[make]])
        if had is None:
            return make(*args)
        self._had.add(id(had))
        return had

    def _set_state(self, kind: Any, state: Any) -> Any:
        return kind if id(kind) in self._had else _cloudpickle._class_setstate(kind, state)


_PythonUnpickler: Any = vars(pickle)["_Unpickler"]  # its stub is empty


class _NamingUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """Remembers the name that could not be found, and what was made last."""

    missing = ""
    made = ""
    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except Exception:
            self.missing = f"{module}.{name}"
            raise

    def _reduce(self) -> None:
        function, args = self.stack[-2:]
        if function is make_class_once:
            function, args = args
        if function in (_cloudpickle._make_skeleton_class, make_enum):
            self.made = f"the class {args[1]}"
        elif function is _cloudpickle._class_setstate:
            self.made = f"the class {args[0].__qualname__}"
        else:
            self.made = _full_name(function)
        super().load_reduce()

    def _new(self) -> None:
        self.made = _full_name(self.stack[-2])
        super().load_newobj()

    def _build(self) -> None:
        self.made = _full_name(type(self.stack[-2]))
        super().load_build()

    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.NEWOBJ[0]] = _new
    dispatch[pickle.BUILD[0]] = _build


def _full_name(what: Any) -> str:
    module = getattr(what, "__module__", type(what).__module__)
    return f"{module}.{getattr(what, '__qualname__', type(what).__qualname__)}"


def reader_of_pieces(pieces: Iterable[bytes]) -> Callable[[memoryview], None]:
    """Make an argument of :meth:`BufferedPickle.fill` of pieces that come one after another.

    It raises EOFError when no further piece comes.
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
