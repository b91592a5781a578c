"""A pickler that does not recurse and knows where it is. Runs in: every process.

It is ten times slower than the one in C, and takes over where that one failed: it pickles what is
nested too deeply for the C stack, and names the path to what cannot be pickled, in one pass.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import pickle
import time
import types
from collections.abc import Callable, Generator, Iterable
from itertools import takewhile
from typing import Any, NamedTuple

from horovodrunner.flows.call.called import name_of
from horovodrunner.formatting import full_name, in_one_line
from horovodrunner.pickling.pickler import Pickler
from horovodrunner.pickling.remedies import Remedy, remedy_for

__all__ = ["Culprit", "DeepPickler", "TooDeepError", "culprit_of", "find_culprit"]

MAX_DEPTH = 250_000
"""Containers and objects within each other; a ``__reduce__`` that never ends fills no memory."""

SEARCH_SECONDS = 30.0
"""The search for what cannot be pickled stops after this."""

_KEY_CHARS = 40
"""As much of a key is shown."""

_STEPS_SHOWN = 6
"""As many steps of a path are shown at each of its ends."""

_NO_UNPICKLING = frozenset({"Broadcast", "SparkSession"})
"""Spark's own pickle, and fail to unpickle in another process."""

_Steps = Generator[tuple[object, Any], None, None]
"""What is pickled for an object, with how one gets there from it: a key, or one of these."""

_CALLABLE, _ARGUMENTS, _STATE, _KEY, _ELEMENT, _ITSELF = (object() for _ in range(6))


_PythonPickler: Any = vars(pickle)["_Pickler"]  # its stub is empty


class TooDeepError(pickle.PicklingError):
    """More is within each other than this pickler follows."""


class _OutOfTimeError(Exception):
    """The search has taken long enough."""


class DeepPickler(_PythonPickler):  # type: ignore[misc]
    """Pickles what a Pickler pickles, however deep it is."""

    refused = _NO_UNPICKLING

    def __init__(
        self,
        file: Any,
        buffer_callback: Callable[[pickle.PickleBuffer], object] | None = None,
        deadline: float | None = None,
        reducers: type[Pickler] = Pickler,
    ) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL, buffer_callback=buffer_callback)
        self._reducers = reducers(io.BytesIO(), pickle.HIGHEST_PROTOCOL)
        self._deadline = deadline
        self._begun = 0
        self._open: list[_Steps] = []
        self._way: list[tuple[Any, object]] = []
        self._at: Any = None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Pickle one object and all below it."""
        within = len(self._open)
        self._enter(obj)
        while len(self._open) > within:
            for step, part in self._open[-1]:
                self._way[-1] = self._way[-1][0], step
                if self._enter(part):
                    break
            else:
                self._open.pop()
                self._way.pop()

    def path(self) -> tuple[list[tuple[Any, object]], Any]:
        """Return where pickling failed: the objects on the way with their steps, and the last."""
        if self._open and inspect.getgeneratorstate(self._open[-1]) == inspect.GEN_CLOSED:
            return self._way[:-1], self._way[-1][0]  # it failed between two of its parts
        return self._way, self._at

    def _enter(self, obj: Any) -> bool:
        """Pickle an object, or begin to; return whether parts of it are to follow."""
        kind = type(obj)
        self._begun += 1
        if not self._begun & 0x3FF:
            self.framer.commit_frame()
            if self._deadline is not None and time.monotonic() > self._deadline:
                raise _OutOfTimeError
        known = self.memo.get(id(obj))
        if known is not None:
            self.write(self.get(known[0]))
            return False
        if (leaf := _LEAVES.get(kind)) is not None:
            leaf(self, obj)
            return False
        self._at = obj
        if len(self._open) >= MAX_DEPTH:
            raise TooDeepError(f"it is nested more than {MAX_DEPTH:,} levels deep")
        if (container := _CONTAINERS.get(kind)) is not None:
            steps = container(self, obj)
        else:
            reduced = self._reduce(obj, kind)
            if isinstance(reduced, str):
                self.save_global(obj, reduced)
                return False
            if not isinstance(reduced, tuple) or not 2 <= len(reduced) <= 6:
                raise pickle.PicklingError(
                    "__reduce__ must return a string or a tuple of two to six elements"
                )
            steps = self._rebuild(obj, *reduced)
        self._open.append(steps)
        self._way.append((obj, None))
        return True

    def _reduce(self, obj: Any, kind: type) -> Any:
        if kind.__name__ in self.refused and (known := remedy_for(obj)) is not None:
            raise pickle.PicklingError(known.reason)
        reduced = self._reducers.reducer_override(obj)
        if reduced is not NotImplemented:
            return reduced
        if (reducer := self._reducers.dispatch_table.get(kind)) is not None:
            return reducer(obj)
        if issubclass(kind, (type, types.FunctionType)):
            return obj.__qualname__  # it is found by its name
        return obj.__reduce_ex__(pickle.HIGHEST_PROTOCOL)

    def _tuple(self, obj: tuple[Any, ...]) -> _Steps:
        yield from self._immutable(obj, enumerate(obj), pickle.TUPLE)

    def _frozenset(self, obj: frozenset[Any]) -> _Steps:
        yield from self._immutable(obj, ((_ELEMENT, each) for each in obj), pickle.FROZENSET)

    def _immutable(self, obj: Any, steps: Iterable[tuple[object, Any]], made: bytes) -> _Steps:
        self.write(pickle.MARK)
        yield from steps
        if (known := self.memo.get(id(obj))) is not None:  # it is within itself
            self.write(pickle.POP_MARK + self.get(known[0]))
            return
        self.write(made)
        self.memoize(obj)

    def _list(self, obj: list[Any]) -> _Steps:
        self.write(pickle.EMPTY_LIST)
        self.memoize(obj)
        yield from self._elements(obj)

    def _dict(self, obj: dict[Any, Any]) -> _Steps:
        self.write(pickle.EMPTY_DICT)
        self.memoize(obj)
        yield from self._pairs(obj.items())

    def _set(self, obj: set[Any]) -> _Steps:
        self.write(pickle.EMPTY_SET)
        self.memoize(obj)
        self.write(pickle.MARK)
        for element in obj:
            yield _ELEMENT, element
        self.write(pickle.ADDITEMS)

    def _elements(self, elements: Iterable[Any]) -> _Steps:
        self.write(pickle.MARK)
        yield from enumerate(elements)
        self.write(pickle.APPENDS)

    def _pairs(self, pairs: Iterable[tuple[Any, Any]]) -> _Steps:
        self.write(pickle.MARK)
        for key, value in pairs:
            yield _KEY, key
            yield key, value
        self.write(pickle.SETITEMS)

    def _rebuild(  # noqa: PLR0917 - as __reduce__ returns them
        self,
        obj: Any,
        function: Any,
        args: Any,
        state: Any = None,
        elements: Any = None,
        pairs: Any = None,
        set_state: Any = None,
    ) -> _Steps:
        """Pickle what ``__reduce__`` returned."""
        if not isinstance(args, tuple) or not callable(function):
            raise pickle.PicklingError("__reduce__ must return a callable and a tuple first")
        made = pickle.REDUCE
        if getattr(function, "__name__", "") == "__newobj__":
            made, function, args = pickle.NEWOBJ, args[0], args[1:]
        yield _CALLABLE, function
        yield _ARGUMENTS, args
        self.write(made)
        if (known := self.memo.get(id(obj))) is not None:  # it is within its own arguments
            self.write(pickle.POP + self.get(known[0]))
        else:
            self.memoize(obj)
        if elements is not None:
            yield from self._elements(elements)
        if pairs is not None:
            yield from self._pairs(pairs)
        if state is None:
            return
        if set_state is None:
            yield _STATE, state
            self.write(pickle.BUILD)
            return
        yield _CALLABLE, set_state
        yield _ITSELF, obj
        yield _STATE, state
        self.write(pickle.TUPLE2 + pickle.REDUCE + pickle.POP)


_LEAVES: dict[type, Any] = {
    kind: _PythonPickler.dispatch[kind]
    for kind in (type(None), bool, int, float, str, bytes, bytearray, pickle.PickleBuffer)
}
_CONTAINERS: dict[type, Callable[[DeepPickler, Any], _Steps]] = {
    tuple: DeepPickler._tuple,
    list: DeepPickler._list,
    dict: DeepPickler._dict,
    set: DeepPickler._set,
    frozenset: DeepPickler._frozenset,
}


class _Nowhere:
    def write(self, data: object) -> None:
        pass


class Culprit(NamedTuple):
    """What cannot be pickled."""

    where: str
    error: BaseException
    why: Remedy


def culprit_of(
    parts: Iterable[tuple[str, Any]],
    error: BaseException,
    otherwise: str,
    *,
    by_spark: bool = False,
) -> Culprit:
    """Find what was not pickled, after that has failed, and why; let an interrupt pass."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    found = find_culprit(parts, by_spark=by_spark)
    if found is None and not isinstance(error, Exception):
        raise error  # it came from outside, as a thread's end does
    return found or Culprit(otherwise, error, Remedy(in_one_line(error)))


def find_culprit(
    parts: Iterable[tuple[str, Any]], seconds: float = SEARCH_SECONDS, *, by_spark: bool = False
) -> Culprit | None:
    """Find what cannot be pickled.

    Everything is visited once, in the order in which it is pickled, and nothing is kept.
    """
    pickler = DeepPickler(_Nowhere(), lambda _: False, time.monotonic() + seconds)
    if by_spark:
        pickler.refused = _NO_UNPICKLING - {"Broadcast"}
    for called, value in parts:
        try:
            pickler.save(value)
        except (KeyboardInterrupt, _OutOfTimeError) as stop:
            if isinstance(stop, KeyboardInterrupt):
                raise
            return None  # more than can be looked through
        except BaseException as error:  # noqa: BLE001 - a __reduce__ may call sys.exit
            way, culprit, known = _known_on_the_way(*pickler.path())
            where = _where_it_failed(way, culprit, called)
            why = known or Remedy(in_one_line(error))
            return Culprit(where, error.with_traceback(None), why)
    return None


def _known_on_the_way(
    way: list[tuple[Any, object]], culprit: Any
) -> tuple[list[tuple[Any, object]], Any, Remedy | None]:
    """Stop at what is known to stay in its process: what is within says nothing to the user."""
    for index, (owner, _) in enumerate(way):
        if (known := remedy_for(owner)) is not None:
            return way[:index], owner, known
    return way, culprit, remedy_for(culprit)


def _where_it_failed(way: list[tuple[Any, object]], culprit: Any, called: str) -> str:
    """Return the path and the type, such as ``the argument 'tree'.lock (_thread.lock)``."""
    start, steps, within = called, list[str](), ""
    begin = 0
    while begin < len(way):
        whole, shown, taken = _first_step(way[begin : begin + 4])
        if whole:
            to_function = takewhile(lambda step: not step.startswith(".__reduce__"), steps)
            if (around := [*to_function]) or (start == called and not called.startswith("main (")):
                within = f", in {_path(start, around)},"
            start, steps = shown, []
        elif shown:
            steps.append(shown)
        begin += taken
    return f"{_path(start, steps)} ({full_name(type(culprit))}){within}"


def _path(start: str, steps: list[str]) -> str:
    if len(steps) > 2 * _STEPS_SHOWN + 1:
        left_out = f" … ({len(steps) - 2 * _STEPS_SHOWN:,} more) … "
        steps = [*steps[:_STEPS_SHOWN], left_out, *steps[-_STEPS_SHOWN:]]
    return start + "".join(steps)


def _first_step(  # noqa: PLR0911, PLR0912 - a table of what the parts of objects are called
    way: list[tuple[Any, object]],
) -> tuple[bool, str, int]:
    """Return whether the path starts anew here, what is shown, and how many steps that is."""
    owner, step = way[0]
    kind = type(owner)
    inner: list[Any] = [key for _, key in way[1:]]
    if kind is types.FunctionType and step is _STATE and len(inner) >= 2:
        return _step_in_function(owner, inner)
    if kind is types.MethodType and step is _ARGUMENTS and inner[:1] == [1]:
        return True, f"the object that the method {name_of(owner.__func__)} belongs to", 2
    if issubclass(kind, functools.partial) and step is _STATE and len(inner) >= 2:
        if inner[0] == 1:
            return True, f"positional argument {inner[1]} bound by functools.partial", 3
        if inner[0] == 2:
            return True, f"the argument {_text_of(inner[1])} bound by functools.partial", 3
    if issubclass(kind, type) and step is _STATE and len(inner) >= 2:
        return True, f"the attribute {_text_of(inner[1])} of the class {full_name(owner)}", 3
    if issubclass(kind, types.ModuleType) and step is _ARGUMENTS and inner[:1] == [1] and inner[1:]:
        return False, _attribute(inner[1]), 3
    if kind is types.CellType:
        return False, "", 2
    if step is _STATE and inner and type(way[1][0]) is dict and inner[0] is not _KEY:
        return False, _attribute(inner[0]), 2
    if step is _STATE and len(inner) > 1 and type(way[1][0]) is tuple and type(way[2][0]) is dict:
        return False, _attribute(inner[1]), 3
    if step is _STATE and inner and type(way[1][0]) is list and dataclasses.is_dataclass(kind):
        return False, _attribute(dataclasses.fields(kind)[inner[0]].name), 2  # frozen, with slots
    if step is _STATE and inner[:1] == [4] and full_name(kind) == "numpy.ndarray":
        return False, f"{'' if owner.ndim == 1 else '.flat'}[{_text_of(inner[1])}]", 3
    if issubclass(kind, tuple) and step is _ARGUMENTS and inner:
        return False, f"[{_text_of(inner[0])}]", 2
    if step is _ELEMENT:
        return False, "{…}", 1
    if step is _KEY:
        return False, ".keys()", 1
    for mark, place in ((_CALLABLE, 0), (_ARGUMENTS, 1), (_STATE, 2)):
        if step is mark:
            return False, f".__reduce__()[{place}]", 1
    return False, f"[{_text_of(step)}]", 1


def _step_in_function(function: types.FunctionType, inner: list[Any]) -> tuple[bool, str, int]:
    """Name what of a function does not pickle: `inner` goes from its state inwards."""
    name = name_of(function)
    place = inner[1]
    if inner[0] == 0:
        return True, f"the attribute {_text_of(place)} of {name}", 3
    key = _text_of(inner[2]) if len(inner) > 2 else ""
    if place == "__closure__" and key.isdigit():
        key = repr(function.__code__.co_freevars[int(key)])
    shown = {
        "__globals__": f"the global {key} used by {name}",
        "__closure__": f"the variable {key} in the closure of {name}",
        "__defaults__": f"default value {key} of {name}",
        "__kwdefaults__": f"the default of {name}'s argument {key}",
        "__annotations__": f"the annotation of {name}'s {key}",
    }
    if type(place) is str and place in shown:
        return True, shown[place], 4
    return True, f"{_text_of(place)} of {name}", 3


def _attribute(name: object) -> str:
    return f".{name}" if type(name) is str and name.isidentifier() else f"[{_text_of(name)}]"


def _text_of(key: object) -> str:
    """Show a key without asking it anything, and briefly."""
    if type(key) in {str, bytes}:
        assert isinstance(key, (str, bytes))  # noqa: S101 - for the type checker
        return repr(key) if len(key) <= _KEY_CHARS else repr(key[:_KEY_CHARS])[:-1] + "…'"
    if type(key) is int and key.bit_length() > 200:
        return "an int"
    if type(key) in {int, float, bool, type(None)}:
        return repr(key)
    if type(key) is tuple and len(key) <= 4 and all(type(each) in {str, int} for each in key):
        return f"({', '.join(_text_of(each) for each in key)})"
    return f"a {full_name(type(key))}"
