"""The modules and the source around code that travels by value. Runs in: every process.

What looks for a class or function by its name (pickle, multiprocessing, typing), or for its source
(tracebacks, TorchScript, autograph), goes by its module and its file. In the worker both are there:
``__main__`` and other modules that travel by value hold what travelled of them, and the source is
in the cache of :mod:`linecache`.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import linecache
import os
import pickle
import re
import sys
import typing
import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import cloudpickle

from horovodrunner.pickling.installed import is_of_a_python
from horovodrunner.pickling.pickler import Call, Pickler, dumps, module_travels_by_value
from horovodrunner.placement.environment import MAIN_NAMES

__all__ = [
    "TravellingPickler",
    "call_in_its_modules",
    "dump_in_its_modules",
    "dump_names",
    "load_names",
    "names_by_value",
    "place_in",
]

MAX_SOURCE = 1024 * 1024
"""So many characters of source travel; further files are left out."""

_KEPT = ("__doc__", "__file__", "__package__", "__path__")
"""What a module keeps of its own, beside the names that travel."""

_IDENTIFIER = re.compile(r"[^\W\d]\w*")

_NAMED = (type, FunctionType, type(functools.lru_cache(len)), typing.TypeVar)
"""What pickle stores as a name."""


class TravellingPickler(Pickler):
    """Takes along where the code that it pickles by value belongs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._places: dict[str, Call] = {}
        self._globals: dict[int, Any] = {}
        self._found: list[Any] = []
        self._pickled: dict[int, Any] = {}
        self._mentioned: dict[tuple[str, str], None] = {}
        self._packages = {"builtins", *sys.stdlib_module_names}
        self._files: dict[str, Mapping[str, Any]] = {}

    def reducer_override(self, obj: Any) -> Any:
        """Keep functions in their module, and note what has a name."""
        if type(obj) is _Rest:
            return self._rest()
        if type(obj) is ModuleType and self._travels_whole(obj):
            return self._whole(obj)
        reduced = super().reducer_override(obj)
        if isinstance(obj, _NAMED):
            self._found.append(obj)
            self._pickled[id(obj)] = obj
            self._packages.add(_package_of(obj))
        elif isinstance(obj, ModuleType):
            self._packages.add(_package_of(obj))
        if isinstance(reduced, tuple) and isinstance(obj, FunctionType | type):
            self._note_mentioned(obj)
            if isinstance(obj, FunctionType):
                reduced = self._in_its_module(obj, *reduced)
        return reduced

    def _travels_whole(self, module: ModuleType) -> bool:
        return module.__name__ != "__main__" and self._has_place(module.__name__, vars(module))

    @staticmethod
    def _has_place(name: str, scope: Mapping[str, Any]) -> bool:
        """Whether a scope is that of a module which cannot be imported in the worker."""
        module = sys.modules.get(name)
        return module is not None and vars(module) is scope and module_travels_by_value(name)

    def _place(self, name: str) -> Call:
        """Return what pickles as a module that is empty at first, whatever the driver's holds."""
        if name not in self._places:
            held = vars(sys.modules[name])
            kept = {key: held[key] for key in _KEPT if key in held}
            if "__path__" in kept:
                kept["__path__"] = list(kept["__path__"])
            self._places[name] = Call(_module, name, kept)
        return self._places[name]

    def _in_its_module(self, function: FunctionType, make: Any, args: Any, *rest: Any) -> Any:
        """Make the names of its module a function's globals, not a copy of some."""
        scope = function.__globals__
        self._files.setdefault(function.__code__.co_filename, scope)
        name = scope.get("__name__")
        is_function = make is cloudpickle.cloudpickle._make_function
        if not is_function or not isinstance(name, str) or not self._has_place(name, scope):
            return make, args, *rest
        shared = self._globals.setdefault(id(scope), Call(vars, self._place(name)))
        return make, (args[0], shared, *args[2:]), *rest

    def _note_mentioned(self, obj: Any) -> None:
        """Note names that code reaches by other ways than its globals: forward references."""
        texts = set[str]()
        with contextlib.suppress(Exception):  # from Python 3.14 on they are computed here
            annotations = inspect.get_annotations(obj)
            texts.update(each for each in annotations.values() if type(each) is str)
        if isinstance(obj, FunctionType) and "__main__" in obj.__code__.co_names:
            texts.update(obj.__code__.co_names)  # import __main__
        for name in _IDENTIFIER.findall(" ".join(texts)):
            self._mentioned[obj.__module__, name] = None

    def _whole(self, module: ModuleType) -> Any:
        left_out = {"__builtins__", "__cached__", "__loader__", "__spec__", "__path__"}
        names = {name: value for name, value in vars(module).items() if name not in left_out}
        return _itself, (self._place(module.__name__),), names, None, None, _fill

    def _rest(self) -> Any:
        """Pickle what comes to light only when all else has been pickled."""
        found, self._found = self._found, []
        names: dict[str, dict[str, Any]] = {}
        former: dict[str, dict[str, Any]] = {}
        for obj in found:
            self._sort(obj, names, former)
        for module_name, name in self._mentioned:
            value = vars(sys.modules.get(module_name, builtins)).get(name)
            if module_travels_by_value(module_name) and self._comes_cheaply(value):
                names.setdefault(module_name, {}).setdefault(name, value)
        self._mentioned = {}
        modules = {**names, **former}
        places = [(self._place(m), names.get(m, {}), former.get(m, {})) for m in modules]
        if places:
            return _name, (places, _Rest())
        files, self._files = self._files, {}
        return _add_source, (_source_of(files),)

    def _comes_cheaply(self, value: Any) -> bool:
        """Whether what is only mentioned can come along, without another package's import."""
        if isinstance(value, _NAMED) and module_travels_by_value(str(value.__module__)):
            return self._can_come(value)
        is_importable = isinstance(value, (*_NAMED, ModuleType)) or _package_of(value) == "typing"
        return is_importable and _package_of(value) in self._packages

    def _can_come(self, value: Any) -> bool:
        """Try it only where it does not come anyway: a class may lead to large data."""
        if id(value) in self._pickled:
            return True
        if not _can_be_pickled(value):
            return False
        self._pickled[id(value)] = value
        return True

    def _sort(self, obj: Any, names: Any, former: Any) -> None:
        """Find out under which name an object is found, if it still is."""
        path = str(getattr(obj, "__qualname__", None) or getattr(obj, "__name__", "<>"))
        module_name = str(obj.__module__)
        module = sys.modules.get(module_name)
        if module is None or "<" in path or not module_travels_by_value(module_name):
            return
        top, _, inner = path.partition(".")
        outermost = found = vars(module).get(top)
        for part in filter(None, inner.split(".")):
            found = inspect.getattr_static(found, part, None)
        if found is obj and (not inner or self._can_come(outermost)):
            names.setdefault(module_name, {})[top] = outermost
        elif not inner:  # a cell was run again, say
            former.setdefault(module_name, {})[top] = obj


def _package_of(value: Any) -> str:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return str(name).partition(".")[0]


def _can_be_pickled(value: object) -> bool:
    try:
        dumps(value)
    except Exception:  # noqa: BLE001 - without it the rest travels as before
        return False
    return True


class _Rest:
    """Stands for what is known only when all before it has been pickled."""


def call_in_its_modules(main: Any, kwargs: Mapping[str, Any], argv: Sequence[str] | None) -> object:
    """Make what a :class:`TravellingPickler` pickles so that ``(main, kwargs)`` comes out."""
    return Call(_opened, main, dict(kwargs), None if argv is None else [*argv], _Rest())


def dump_in_its_modules(value: object) -> bytes:
    """Pickle a value so that what travels by value with it is found by name, too."""
    return dumps(Call(_first, value, _Rest()), TravellingPickler)


def _first(value: Any, _: None) -> Any:
    return value


def _opened(
    main: Any, kwargs: dict[str, Any], argv: list[str] | None, _: None
) -> tuple[Any, dict[str, Any]]:
    if argv is not None and _places is not None:
        sys.argv[:] = argv
        sys.orig_argv[:] = [sys.executable, *argv]
    return main, kwargs


# What follows is called while a call is unpickled.

_places: dict[str, ModuleType] | None = None
"""The modules that were made here; None where nothing may take a module's place: on the driver."""

_unread: dict[str, ModuleSpec] = {}
"""Modules of which a file is here, too, that was not needed yet."""


def place_in(main: ModuleType) -> None:
    """Put what is unpickled from now on into this module, and into others that are made."""
    global _places
    _places = {"__main__": main}


class _TravelledModule(ModuleType):
    """A module that holds what travelled of it; the rest is read when it is asked for."""

    def __getattr__(self, name: str) -> Any:
        is_special = name.startswith("__") and name.endswith("__")
        spec = None if is_special else _unread.pop(self.__name__, None)
        if spec is not None and spec.loader is not None:
            travelled = dict(vars(self))
            try:
                spec.loader.exec_module(self)
            finally:
                vars(self).update(travelled)
        if name in vars(self):
            return vars(self)[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def _module(name: str, kept: Mapping[str, Any]) -> ModuleType:
    """Return the module of a name that holds what travels of it."""
    made = _places if _places is not None else {}
    if name not in made:
        made[name] = ModuleType(name) if _places is None else _make_module(name)
    module = made[name]
    for key, value in kept.items():
        if key != "__path__" or not hasattr(module, key):
            setattr(module, key, value)
    if name != "__main__" and _places is not None:
        cloudpickle.register_pickle_by_value(module)  # as on the driver
    return module


def _make_module(name: str) -> ModuleType:
    if name in sys.modules:  # imported by what travels by reference
        return sys.modules[name]
    module = _TravelledModule(name)
    module.__builtins__ = builtins  # type: ignore[attr-defined]
    if (spec := _spec_of(name)) is not None:
        module.__spec__ = _unread[name] = spec
        if spec.submodule_search_locations is not None:
            module.__path__ = spec.submodule_search_locations
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        holder = _make_module(parent)
        if not hasattr(holder, "__path__"):
            holder.__path__ = []
        setattr(holder, last, module)
    return module


def _spec_of(name: str) -> ModuleSpec | None:
    """Find a module's file without importing anything, not even its package."""
    spec, path, parts = None, None, name.split(".")
    for count in range(1, len(parts) + 1):
        full_name = ".".join(parts[:count])
        found = (finder.find_spec(full_name, path) for finder in sys.meta_path)
        spec = next((each for each in found if each is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _itself(module: ModuleType) -> ModuleType:
    return module


def _fill(module: ModuleType, names: Mapping[str, Any]) -> None:
    _unread.pop(module.__name__, None)  # it is complete
    vars(module).update(names)


def _name(places: Iterable[tuple[ModuleType, dict[str, Any], dict[str, Any]]], _: None) -> None:
    for module, names, former in places:
        vars(module).update(names)
        for name, value in former.items():
            vars(module).setdefault(name, value)


def _source_of(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the text of those files that may be unknown in the worker."""
    texts: list[str] = []
    left = MAX_SOURCE
    for file, scope in files.items():
        if is_of_a_python(file):
            continue
        text = ""
        with contextlib.suppress(Exception):  # a loader of somebody's
            text = "".join(linecache.getlines(file, dict(scope)))
        if text and "\0" not in text and len(text) <= left:
            left -= len(text)
            texts += [file, text]
    return zlib.compress("\0".join(texts).encode(errors="surrogatepass")) if texts else b""


def _add_source(compressed: bytes) -> None:
    if _places is None or not compressed:
        return
    texts = zlib.decompress(compressed).decode(errors="surrogatepass").split("\0")
    for file, text in zip(texts[::2], texts[1::2], strict=True):
        # without a time of change it is never compared with a file
        linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file


def names_by_value(module: ModuleType) -> dict[str, Any]:
    """Return what pickle would store as a name of ``__main__``."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _NAMED) and getattr(value, "__module__", None) == module.__name__
    }


def dump_names() -> bytes:
    """Pickle what the modules that were made here hold, as far as that is possible."""
    modules = dict(_places or {})
    names = {name: names_by_value(module) for name, module in modules.items()}
    try:
        call = dumps((names, _Rest()), TravellingPickler)
    except Exception:  # noqa: BLE001 - a lock that main has put into a global, say
        for held in names.values():
            for name in [name for name, value in held.items() if not _can_be_pickled(value)]:
                del held[name]
        call = dumps((names, _Rest()), TravellingPickler)
    return pickle.dumps([name for name in modules if name != "__main__"]) + call


def load_names(main: ModuleType) -> None:
    """Put in their places, once, the names that this process's parent holds."""
    if _places is None:
        place_in(main)
        with contextlib.suppress(KeyError), Path(os.environ[MAIN_NAMES]).open("rb") as file:
            pickle.load(file)  # noqa: S301 - the parent's memory
            pickle.load(file)  # noqa: S301
