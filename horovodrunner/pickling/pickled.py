"""A pickle whose large buffers stand beside it, in a file or in memory. Runs in: every process.

Pickle protocol 5 (PEP 574) leaves an array's memory out of the pickle. In the worker it goes from
the array to the file, and on the driver from the socket to where the array finds it: nothing else
is made of it on the way.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import io
import mmap
import os
import pickle
import sys
import types
import typing
from abc import ABCMeta
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, ClassVar

import cloudpickle

from horovodrunner.pickling.enums import make_enum, with_members

__all__ = [
    "Layout",
    "Pickled",
    "Pickler",
    "SinkError",
    "dumps",
    "loads",
    "module_travels_by_value",
    "reader_of_pieces",
    "travels_by_reference",
    "write_pickle",
]

Layout = tuple[int, ...]
"""Bytes of the pickle itself and of each buffer beside it, in the order in which they stand."""

BESIDE_BYTES = 64 * 1024
"""A smaller buffer stays in the pickle."""

MOST_BESIDE = 10_000
"""Further buffers stay in the pickle: the layout has to fit a frame's header."""

SAFE_RECURSION = 10_000
"""Half as many calls within each other overflow no stack of 8 MiB while something is pickled."""

_READ_BYTES = 256 * 1024

MAPPED_BYTES = 4 * 1024 * 1024
"""A buffer from this size on gets a mapping of its own."""


_cloudpickle = cloudpickle.cloudpickle
_MAKE_CLASSES = {_cloudpickle._make_skeleton_class: 4, _cloudpickle._make_skeleton_enum: 5}
"""cloudpickle's functions that make a class, and which argument is its identity."""


_HOOK = "__init_subclass__"


class SinkError(OSError):
    """The file does not take the pickle."""


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's, which can also bring back what it cannot: see `_REDUCERS`, and slots."""

    _registered: dict[int, Any] | None = None

    def reducer_override(self, obj: Any) -> Any:
        """Take care of ``__slots__``, classes in classes and registrations; the rest as usual."""
        if issubclass(type(obj), type):
            reduced = super().reducer_override(obj)
            if isinstance(reduced, tuple):
                if "." in obj.__qualname__ and "<" not in obj.__qualname__:
                    reduced = _with_qualname(obj, *reduced)
                if "__slots__" in obj.__dict__:
                    reduced = _with_slots(obj, *reduced)
                if isinstance(obj, enum.EnumMeta):
                    reduced = with_members(obj, reduced)
                elif _is_noticed_when_made(obj):
                    reduced = (_make_class_once, (reduced[0], reduced[1]), *reduced[2:])
            return self._registered_again(obj, reduced)
        if isinstance(obj, types.FunctionType):
            if vars(obj).keys() >= _DISPATCHER and not travels_by_reference(obj):
                return _reduce_dispatcher(obj)
            return self._registered_again(obj, super().reducer_override(obj))
        return NotImplemented

    def _registered_again(self, obj: Any, reduced: Any) -> Any:
        if not isinstance(reduced, tuple) or len(reduced) != 6:  # it travels by reference
            return reduced
        from horovodrunner.flows.call import registries  # a worker may pickle nothing by value

        if self._registered is None:
            self._registered = registries.of_this_process()
        entries = self._registered.get(id(obj))
        return registries.with_registrations(obj, reduced, entries) if entries else reduced


def _with_qualname(kind: type, make: Any, args: Any, *rest: Any) -> Any:
    """Let a class within another one know it; cloudpickle keeps that of an Enum alone."""
    if make is cloudpickle.cloudpickle._make_skeleton_class:
        args = (*args[:3], {**args[3], "__qualname__": kind.__qualname__}, *args[4:])
    return make, args, *rest


def _with_slots(kind: type, make: Any, args: Any, state: Any, *rest: Any) -> Any:
    """Let a class get its slots when it is made; cloudpickle only writes their names into it."""
    bases = args[2]
    if make is not cloudpickle.cloudpickle._make_skeleton_class or typing.NamedTuple in bases:
        return make, args, state, *rest
    slots = [name for name in ("__dict__", "__weakref__") if name in kind.__dict__]
    attributes = dict(state[0])
    for name, member in kind.__dict__.items():
        if isinstance(member, types.MemberDescriptorType) and member.__objclass__ is kind:
            slots.append(name)
            attributes.pop(name, None)
    namespace = {**args[3], "__slots__": tuple(slots)}
    return make, (*args[:3], namespace, *args[4:]), (attributes, *state[1:]), *rest


def _is_noticed_when_made(kind: type) -> bool:
    """Whether making it runs code that may keep it, as registries of plug-ins do."""
    return type(kind) not in (type, ABCMeta) or any(
        _HOOK in vars(base)
        for base in kind.__mro__[1:]
        if base not in (object, typing.Generic, typing.Protocol)
    )


def _make_class_once(make: Any, args: Any) -> Any:
    """Make a class unless it is one of this process that comes back."""
    known = _cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(args[4])
    if known is not None and make in _MAKE_CLASSES:  # else the unpickler knows
        return known
    try:
        return make(*args)
    except Exception:
        # Code of the class's own may need its attributes, which come later, or the keywords of the
        # class statement, which nothing remembers.
        kind = _made_unnoticed(*args[:4])
        if kind is None:
            raise
    return _cloudpickle._lookup_class_or_track(args[4], kind)


def _made_unnoticed(meta: Any, name: str, bases: Any, namespace: Any) -> Any:
    """Make a class without running code of its metaclass and its bases; None if that fails."""
    make = ABCMeta.__new__ if issubclass(meta, ABCMeta) else type.__new__
    bases = types.resolve_bases(bases)
    with contextlib.ExitStack() as stack:
        try:
            for base in bases:
                hooked = (each for each in base.__mro__[:-1] if _HOOK in vars(each))
                if (first := next(hooked, None)) is not None:
                    stack.callback(type.__setattr__, first, _HOOK, vars(first)[_HOOK])
                    type.__setattr__(first, _HOOK, classmethod(lambda cls: None))
            return make(meta, name, bases, dict(namespace))
        except TypeError:  # it is of a kind of its own
            return None


class _LruCache:
    """Pickles as the decorator that `functools.lru_cache` makes, which has no name."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self._parameters = parameters

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.lru_cache, (self._parameters["maxsize"], self._parameters["typed"])

    def __call__(self, function: Any) -> Any:
        return function


def _reduce_cached(function: Any) -> Any:
    """Pickle a function that remembers its results without the results."""
    if travels_by_reference(function):
        return function.__qualname__
    return _LruCache(function.cache_parameters()), (function.__wrapped__,)


_DISPATCHER = vars(functools.singledispatch(len)).keys() - {"__wrapped__"}


def _reduce_dispatcher(function: Any) -> Any:
    """Pickle what `functools.singledispatch` made without what it remembers of classes."""
    attributes = {k: v for k, v in vars(function).items() if k not in _DISPATCHER}
    attributes["__doc__"] = function.__doc__
    attributes["__module__"], attributes["__qualname__"] = (
        function.__module__,
        function.__qualname__,
    )
    state = dict(function.registry), attributes
    return _new_dispatcher, (function.__name__,), state, None, None, _fill_dispatcher


def _new_dispatcher(name: str) -> Any:
    def nothing(_: Any) -> None:
        """Stand for an implementation that is still to come: it may refer to the dispatcher."""

    nothing.__name__ = name
    return functools.singledispatch(nothing)


def _fill_dispatcher(dispatcher: Any, state: tuple[dict[type, Any], dict[str, Any]]) -> None:
    implementations, attributes = state
    for kind, function in implementations.items():
        dispatcher.register(kind, function)
    for name, value in attributes.items():
        setattr(dispatcher, name, value)


def _reduce_new_type(new_type: Any) -> Any:
    if travels_by_reference(new_type):
        return new_type.__qualname__
    attributes = {"__module__": new_type.__module__, "__qualname__": new_type.__qualname__}
    return typing.NewType, (new_type.__name__, new_type.__supertype__), attributes


_reduce_code_of_cloudpickle = Pickler.dispatch_table[types.CodeType]


def _reduce_code(code: types.CodeType) -> Any:
    """Pickle code with its file's name, for tracebacks; cloudpickle 3.1.3 leaves that out."""
    make, args = _reduce_code_of_cloudpickle(code)
    named = (code.co_filename if type(a) is str and a == "<dynamic-code>" else a for a in args)
    return make, tuple(named)


def _reduce_cached_property(cached: functools.cached_property[Any]) -> Any:
    return functools.cached_property, (cached.func,), {"attrname": cached.attrname}


_REDUCERS: dict[type, Callable[[Any], Any]] = {
    types.CodeType: _reduce_code,
    functools.cached_property: _reduce_cached_property,  # holds a lock before Python 3.12
    type(functools.lru_cache(len)): _reduce_cached,
    typing.NewType: _reduce_new_type,
}
Pickler.dispatch_table = ChainMap(_REDUCERS, *Pickler.dispatch_table.maps)


def travels_by_reference(value: Any) -> bool:
    """Whether cloudpickle stores a function or class as a name to import.

    Parameters
    ----------
    value
        The function or class.
    """
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None)
    if module in (None, "__main__") or name is None or module not in sys.modules:
        return False
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value and not module_travels_by_value(module)


def module_travels_by_value(name: str) -> bool:
    """Whether cloudpickle stores the functions and classes of a module themselves.

    Parameters
    ----------
    name
        The module's.
    """
    return name == "__main__" or any(
        name == registered or name.startswith(registered + ".")
        for registered in cloudpickle.list_registry_pickle_by_value()
    )


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
    try:
        return _write(Pickler, value, descriptor)
    except (RecursionError, pickle.PicklingError) as error:
        if not _nested_too_deeply(error):
            raise
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return _write(_deep_pickler(), value, descriptor)


def dumps(value: object, pickler: type[Pickler] = Pickler) -> bytes:
    """Pickle a value into memory.

    Parameters
    ----------
    value
        Any object.
    pickler
        What knows how.

    Returns
    -------
    bytes
        For ``pickle.loads``.

    Raises
    ------
    Exception
        Whatever pickling raises.
    """
    try:
        return _dumps(pickler, value)
    except (RecursionError, pickle.PicklingError) as error:
        if not _nested_too_deeply(error):
            raise
    return _dumps(functools.partial(_deep_pickler(), reducers=pickler), value)


def _deep_pickler() -> Callable[..., Any]:
    from horovodrunner.pickling.culprit import DeepPickler  # hardly ever needed

    return DeepPickler


def _nested_too_deeply(error: BaseException) -> bool:
    """Whether the pickler in C recursed too deeply, as far as one can see; or a reducer did."""
    return isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError)


def _dumps(pickler: Callable[..., Any], value: object) -> bytes:
    with io.BytesIO() as file, _bounded_recursion():
        pickler(file).dump(value)
        return file.getvalue()


def _write(pickler: Callable[..., Any], value: object, descriptor: int) -> Layout:
    beside: list[memoryview] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < BESIDE_BYTES or len(beside) >= MOST_BESIDE:
            return True
        beside.append(view)
        return False

    sink = _Sink(descriptor)
    with _bounded_recursion():
        pickler(sink, buffer_callback=stays).dump(value)
    layout = (sink.written, *(view.nbytes for view in beside))
    for view in beside:
        sink.write(view)
    return layout


@contextlib.contextmanager
def _bounded_recursion() -> Iterator[None]:
    """Let the pickler in C raise a RecursionError where the stack would overflow otherwise.

    Notebooks that set a high limit have thought of Python's own frames, which are not on the stack.
    """
    limit = sys.getrecursionlimit()
    if limit <= SAFE_RECURSION:
        yield
        return
    with contextlib.suppress(RecursionError):  # there already
        sys.setrecursionlimit(SAFE_RECURSION)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


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
        value = loads(self._parts[0], self._parts[1:])
        self._parts.clear()
        return value

    def obstacle(self) -> tuple[str, bool]:
        """Name what cannot be unpickled, after :meth:`load` has failed.

        Returns
        -------
        tuple of str and bool
            The class or function, or an empty string; and whether it could not be imported.
        """
        unpickler = _NamingUnpickler(io.BytesIO(self._parts[0]), buffers=self._parts[1:])
        try:
            unpickler.load()
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001 - that is what is looked for
            return unpickler.missing or unpickler.made, bool(unpickler.missing)
        return "", False

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


class _Unpickler(pickle.Unpickler):
    """Leaves classes as they are that this process has already, because it has sent them."""

    def __init__(self, file: Any, *, buffers: Iterable[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._had: set[int] = set()

    def find_class(self, module: str, name: str) -> Any:
        """Find what a pickle names."""
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


def loads(data: bytes | bytearray | memoryview | mmap.mmap, buffers: Iterable[Any] = ()) -> Any:
    """Unpickle; only ever what comes from a peer that proved the run's token.

    Parameters
    ----------
    data
        The pickle; nothing is copied but what is made of it.
    buffers
        What stands beside it.

    Returns
    -------
    object
        The value. Classes that this process has sent are what they are here.
    """
    with io.BufferedReader(_Reading(memoryview(data)), _READ_BYTES) as file:
        return _Unpickler(file, buffers=buffers).load()


class _Nested:
    """Pickles as a call that unpickles the pickle within with the buffers beside it."""

    def __init__(self, parts: list[bytearray | mmap.mmap]) -> None:
        self._parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        stream, *buffers = (pickle.PickleBuffer(part) for part in self._parts)
        return functools.partial(pickle.loads, buffers=buffers), (stream,)


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
        if function is _make_class_once:
            function, args = args
        if function in (cloudpickle.cloudpickle._make_skeleton_class, make_enum):
            self.made = f"the class {args[1]}"
        elif function is cloudpickle.cloudpickle._class_setstate:
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
