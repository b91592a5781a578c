"""cloudpickle, with what it loses: slots, registrations and more. Runs in: every process."""

from __future__ import annotations

import contextlib
import enum
import functools
import io
import pickle
import sys
import types
import typing
from abc import ABCMeta
from collections import ChainMap
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import cloudpickle

from horovodrunner.pickling.enums import with_members

__all__ = [
    "Call",
    "Pickler",
    "at_any_depth",
    "dumps",
    "make_class_once",
    "module_travels_by_value",
    "travels_by_reference",
]

SAFE_RECURSION = 10_000
"""Half as many calls within each other overflow no stack of 8 MiB while something is pickled."""

_cloudpickle = cloudpickle.cloudpickle
_HOOK = "__init_subclass__"
_Result = TypeVar("_Result")
_WITH_MEMORY = ("cpu", "cuda", "xpu")
"""Devices of torch whose tensors have bytes that the CPU can get."""


class Call:
    """Pickles as a call, so that its result is what is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._reduced = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced

    def __call__(self, *_: Any) -> Any:
        """Picklers ask for it where the result is to be called in turn."""


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's, with what it leaves out: see `_REDUCERS`, too."""

    to_cpu: ClassVar[bool] = False
    """Whether tensors of other devices are unpickled on the CPU."""

    _registered: dict[int, Any] | None = None

    def reducer_override(self, obj: Any) -> Any:
        """Keep ``__slots__``, names of inner classes, registrations, and memory that is shared."""
        kind = type(obj)
        if issubclass(kind, type):
            reduced = super().reducer_override(obj)
            if isinstance(reduced, tuple):
                if "." in obj.__qualname__ and "<" not in obj.__qualname__:
                    reduced = _with_qualname(obj, *reduced)
                if "__slots__" in obj.__dict__:
                    reduced = _with_slots(obj, *reduced)
                if isinstance(obj, enum.EnumMeta):
                    reduced = with_members(obj, reduced)
                elif _is_noticed_when_made(obj):
                    reduced = (make_class_once, (reduced[0], reduced[1]), *reduced[2:])
            return self._registered_again(obj, reduced)
        if isinstance(obj, types.FunctionType):
            if vars(obj).keys() >= _DISPATCHER and not travels_by_reference(obj):
                return _reduce_dispatcher(obj)
            return self._registered_again(obj, super().reducer_override(obj))
        if kind.__module__ == "torch.storage" and "numpy" in sys.modules:
            return self._reduce_storage(obj)
        return NotImplemented

    def _registered_again(self, obj: Any, reduced: Any) -> Any:
        if not isinstance(reduced, tuple) or len(reduced) != 6:  # it travels by reference
            return reduced
        from horovodrunner.flows.call import registries  # a worker may pickle nothing by value

        if self._registered is None:
            self._registered = registries.of_this_process()
        entries = self._registered.get(id(obj))
        return registries.with_registrations(obj, reduced, entries) if entries else reduced

    def _reduce_storage(self, storage: Any) -> Any:
        """Pickle tensors' memory as a buffer: torch would copy it into bytes, for each view."""
        torch: Any = sys.modules["torch"]
        memory = getattr(storage, "_untyped_storage", storage)
        if memory.device.type not in _WITH_MEMORY and not self.to_cpu:
            return NotImplemented
        dtype = torch.uint8  # torch rebuilds tensors from typed memory, whatever it pickled
        if memory is not storage:
            dtype, wrapped = storage.dtype, Call(getattr, memory, "_untyped_storage")
        elif not memory.nbytes():
            wrapped = Call(torch.UntypedStorage, 0)
        else:
            array = torch.empty(0, dtype=dtype).set_(memory.cpu()).numpy()
            read = functools.partial(torch.frombuffer, dtype=dtype)
            wrapped = Call(torch.Tensor.untyped_storage, Call(read, pickle.PickleBuffer(array)))
        if memory is storage and memory.device.type != "cpu" and not self.to_cpu:
            wrapped = Call(on_device, wrapped, str(memory.device))
        keywords = {"wrap_storage": wrapped, "dtype": dtype, "_internal": True}
        return functools.partial(torch.TypedStorage, **keywords), ()


def on_device(storage: Any, device: str) -> Any:
    """Put memory where it was: on a GPU, or on the CPU where there is no such GPU.

    A model that was trained on an executor's GPU comes back to a driver that has none.
    """
    try:
        return storage.to(device=device)
    except (RuntimeError, AssertionError):  # torch raises either, whatever is missing
        return storage


def _with_qualname(kind: type, make: Any, args: Any, *rest: Any) -> Any:
    """Keep the qualified name of a class within another one: cloudpickle does so for Enum alone."""
    if make is _cloudpickle._make_skeleton_class:
        args = (*args[:3], {**args[3], "__qualname__": kind.__qualname__}, *args[4:])
    return make, args, *rest


def _with_slots(kind: type, make: Any, args: Any, state: Any, *rest: Any) -> Any:
    """Make a class with its slots; cloudpickle only writes their names into it."""
    if make is not _cloudpickle._make_skeleton_class or typing.NamedTuple in args[2]:
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


def make_class_once(make: Any, args: Any) -> Any:
    """Make a class unless it is one of this process that comes back."""
    known = _cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(args[4])
    if known is not None and make is _cloudpickle._make_skeleton_class:  # else loads() knows
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


_DISPATCHER = vars(functools.singledispatch(len)).keys() - {"__wrapped__"}


def _reduce_dispatcher(function: Any) -> Any:
    """Pickle what `functools.singledispatch` made without what it remembers of classes."""
    attributes = {k: v for k, v in vars(function).items() if k not in _DISPATCHER}
    attributes |= {k: getattr(function, k) for k in ("__doc__", "__module__", "__qualname__")}
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


def _reduce_cached(function: Any) -> Any:
    """Pickle a function that remembers its results without the results."""
    if travels_by_reference(function):
        return function.__qualname__
    parameters = function.cache_parameters()
    decorator = Call(functools.lru_cache, parameters["maxsize"], parameters["typed"])
    return decorator, (function.__wrapped__,)


def _reduce_cached_property(cached: functools.cached_property[Any]) -> Any:
    """Pickle it without its lock, which it has before Python 3.12."""
    return functools.cached_property, (cached.func,), {"attrname": cached.attrname}


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


_REDUCERS: dict[type, Callable[[Any], Any]] = {
    types.CodeType: _reduce_code,
    functools.cached_property: _reduce_cached_property,
    type(functools.lru_cache(len)): _reduce_cached,
    typing.NewType: _reduce_new_type,
}
Pickler.dispatch_table = ChainMap(_REDUCERS, *Pickler.dispatch_table.maps)


def travels_by_reference(value: Any) -> bool:
    """Whether cloudpickle stores a function or class as a name to import."""
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None)
    if module in (None, "__main__") or name is None or module not in sys.modules:
        return False
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value and not module_travels_by_value(module)


def module_travels_by_value(name: str) -> bool:
    """Whether cloudpickle stores the functions and classes of a module themselves."""
    return name == "__main__" or any(
        name == registered or name.startswith(registered + ".")
        for registered in cloudpickle.list_registry_pickle_by_value()
    )


def dumps(value: object, pickler: type[Pickler] = Pickler) -> bytes:
    """Pickle a value into memory; raises whatever pickling raises."""

    def dump(make_pickler: Callable[..., Any]) -> bytes:
        with io.BytesIO() as file:
            make_pickler(file).dump(value)
            return file.getvalue()

    return at_any_depth(dump, pickler)


def at_any_depth(dump: Callable[[Callable[..., Any]], _Result], pickler: type[Pickler]) -> _Result:
    """Call `dump` with a pickler, and with one that does not recurse if that recurses too deeply.

    A recursion limit far above Python's own would let the pickler in C overflow the stack instead.
    """
    limit = sys.getrecursionlimit()
    if limit > SAFE_RECURSION:
        with contextlib.suppress(RecursionError):  # there already
            sys.setrecursionlimit(SAFE_RECURSION)
    try:
        try:
            return dump(pickler)
        except (RecursionError, pickle.PicklingError) as error:
            if RecursionError not in {type(error), type(error.__cause__)}:
                raise
        from horovodrunner.pickling.culprit import DeepPickler  # hardly ever needed

        return dump(functools.partial(DeepPickler, reducers=pickler))
    finally:
        sys.setrecursionlimit(limit)
