"""What a notebook has registered with libraries, to be repeated elsewhere. Runs in: every process.

A class or function that travels by value is another object in the worker, of which no registry
there knows: ``@keras.saving.register_keras_serializable()`` ran on the driver. So its registrations
travel in its pickle, and all that come from cells (a layer of a saved model) before main as well.
No library is imported for that: where it is not there yet, the registration waits for it.
"""

from __future__ import annotations

import abc
import collections.abc
import contextlib
import functools
import numbers
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cloudpickle

from horovodrunner.flows.call.import_hook import after_import

__all__ = [
    "Registered",
    "of_this_process",
    "repeat",
    "with_registrations",
]


class Registered(NamedTuple):
    """A class or function in the registry of a module, and what :func:`repeat` needs besides."""

    registry: str
    thing: Any
    how: Any

    @property
    def is_from_a_cell(self) -> bool:
        """Whether importing a module would not register it."""
        if self.registry == _SAFE_GLOBALS:  # the user's own, whatever they are
            return True
        how = self.how if isinstance(self.how, tuple) else (self.how,)
        return any(map(_is_from_a_cell, (self.thing, *how)))


def _is_from_a_cell(part: Any) -> bool:
    module = getattr(part, "__module__", None)
    return isinstance(part, Callable) and (  # type: ignore[arg-type]
        module == "__main__" or module in cloudpickle.list_registry_pickle_by_value()
    )


_SAFE_GLOBALS = "torch.serialization"


def of_this_process() -> dict[int, list[Registered]]:
    """Return what is registered with the libraries that are imported, by its id."""
    found: dict[int, list[Registered]] = {}
    for name, (entries, _) in _REGISTRIES.items():
        module = sys.modules.get(name)
        if module is None:
            continue
        with contextlib.suppress(Exception):  # another version of the library
            for thing, how in entries(module):
                found.setdefault(id(thing), []).append(Registered(name, thing, how))
    return found


def with_registrations(thing: Any, reduced: Any, entries: list[Registered]) -> Any:
    """Register a class or function that travels by value where it is unpickled."""
    make, args, state, items, pairs, set_state = reduced
    again = [(each.registry, each.how) for each in entries]
    return make, args, (set_state, state, again), items, pairs, _set_state


def _set_state(thing: Any, state: Any) -> None:
    set_state, own, registrations = state
    set_state(thing, own)
    for registry, how in registrations:
        repeat(registry, thing, how)


def repeat(registry: str, thing: Any, how: Any) -> None:
    """Register something as it was where it was pickled, once the library is imported."""
    library = registry.partition(".")[0]

    def register(_: Any) -> None:
        try:
            module = sys.modules.get(registry) or __import__(registry, fromlist=[""])
            _REGISTRIES[registry][1](module, thing, how)
        except Exception as error:  # noqa: BLE001 - another version of the library
            warnings.warn(
                f"{thing!r:.200} is not registered with {library} here, as it was where it came "
                f"from: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    after_import(library, register)


_repeated: dict[tuple[str, Any], Any] = {}
"""What this module registered, by registry and name: a newer one may take its place."""


def _under_name(
    module: Any, name: Any, thing: Any, present: Any, register: Callable[[], object]
) -> None:
    """Register something unless this process has registered something itself by that name."""
    key = module.__name__, name
    if present is None or _repeated.get(key) is present:
        register()
        _repeated[key] = thing


def _keras_tables(module: Any) -> tuple[dict[str, Any], dict[Any, str]]:
    names = vars(module)
    prefix = "" if "GLOBAL_CUSTOM_OBJECTS" in names else "_"
    return names[f"{prefix}GLOBAL_CUSTOM_OBJECTS"], names[f"{prefix}GLOBAL_CUSTOM_NAMES"]


def _of_keras(module: Any) -> Iterator[tuple[Any, Any]]:
    """Both tables: a class that was defined again has a name, and is no longer found by it."""
    objects, names = _keras_tables(module)
    things = {id(thing): thing for thing in (*names, *objects.values())}
    for thing in things.values():
        name = next((name for each, name in names.items() if each is thing), None)
        yield thing, (name, *(key for key, each in objects.items() if each is thing))


def _to_keras(module: Any, thing: Any, how: Any) -> None:
    objects, names = _keras_tables(module)
    name, *keys = how
    if name is not None:
        names[thing] = name
    for key in keys:
        add = functools.partial(objects.__setitem__, key, thing)
        _under_name(module, key, thing, objects.get(key), add)


def _of_copyreg(module: Any) -> Iterator[tuple[Any, Any]]:
    yield from module.dispatch_table.items()


def _to_copyreg(module: Any, thing: Any, how: Any) -> None:
    present = module.dispatch_table.get(thing)
    _under_name(module, thing, how, present, lambda: module.pickle(thing, how))


_ABSTRACT = tuple(
    kind
    for module in (collections.abc, numbers)
    for kind in (getattr(module, name) for name in module.__all__)
    if isinstance(kind, abc.ABCMeta)
)


def _of_abstract_classes(module: Any) -> Iterator[tuple[Any, Any]]:
    for kind in _ABSTRACT:
        for reference in module._get_dump(kind)[0]:
            if (thing := reference()) is not None:
                yield thing, kind


def _to_abstract_class(_: Any, thing: Any, how: Any) -> None:
    how.register(thing)


def _of_safe_globals(module: Any) -> Iterator[tuple[Any, Any]]:
    for each in module.get_safe_globals():
        thing, name = each if isinstance(each, tuple) else (each, None)
        if not thing.__module__.startswith("torch."):  # its own are there
            yield thing, name


def _to_safe_globals(module: Any, thing: Any, how: Any) -> None:
    module.add_safe_globals([thing if how is None else (thing, how)])


_NO_NAME = "NO_SERIALIZED_TYPE_NAME_FOUND"


def _of_pytrees(module: Any) -> Iterator[tuple[Any, Any]]:
    for kind, node in module.SUPPORTED_NODES.items():
        names = module.SUPPORTED_SERIALIZED_TYPES.get(kind)
        serialized = names[1:] if names is not None and names[1] != _NO_NAME else ()
        with_keys = getattr(node, "flatten_with_keys_fn", None)
        yield kind, (node.flatten_fn, node.unflatten_fn, with_keys, *serialized)


def _to_pytrees(module: Any, thing: Any, how: Any) -> None:
    if thing in module.SUPPORTED_NODES:
        return
    flatten, unflatten, with_keys, *serialized = how
    name, dump, load = serialized or (None, None, None)
    module.register_pytree_node(
        thing,
        flatten,
        unflatten,
        serialized_type_name=name,
        to_dumpable_context=dump,
        from_dumpable_context=load,
        flatten_with_keys_fn=with_keys,
    )


def _of_pandas_dtypes(module: Any) -> Iterator[tuple[Any, Any]]:
    for kind in module._registry.dtypes:
        yield kind, None


def _to_pandas_dtypes(module: Any, thing: Any, _: Any) -> None:
    dtypes = module._registry.dtypes
    name = thing.__name__
    present = next((each for each in dtypes if each.__name__ == name and each is not thing), None)

    def register() -> None:
        if present is not None:
            dtypes.remove(present)
        module._registry.register(thing)

    if thing not in dtypes:
        _under_name(module, name, thing, present, register)


def _of_accessors(module: Any) -> Iterator[tuple[Any, Any]]:
    pandas = sys.modules["pandas"]
    for owner in ("DataFrame", "Series", "Index"):
        kind = getattr(pandas, owner)
        for name in kind._accessors:
            accessor = vars(kind).get(name)
            if (thing := getattr(accessor, "_accessor", None)) is not None:
                yield thing, (owner, name)


def _to_accessors(module: Any, thing: Any, how: Any) -> None:
    owner, name = how
    pandas: Any = sys.modules["pandas"]
    present = vars(getattr(pandas, owner)).get(name)

    def register() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it takes an earlier one's place
            getattr(pandas.api.extensions, f"register_{owner.lower()}_accessor")(name)(thing)

    _under_name(module, how, thing, getattr(present, "_accessor", present), register)


def _of_conversions(module: Any) -> Iterator[tuple[Any, Any]]:
    for priority, entries in module._tensor_conversion_func_registry.items():
        for kinds, function in entries:
            for kind in kinds if isinstance(kinds, tuple) else (kinds,):
                yield kind, (function, priority)


def _to_conversions(module: Any, thing: Any, how: Any) -> None:
    function, priority = how
    registry = module._tensor_conversion_func_registry
    if not any(kinds is thing for kinds, _ in registry.get(priority, ())):
        module.register_tensor_conversion_function(thing, function, priority)


def _of_gradients(module: Any) -> Iterator[tuple[Any, Any]]:
    for name, entry in module.gradient_registry._registry.items():
        yield entry["type"], name


def _to_gradients(module: Any, thing: Any, how: Any) -> None:
    entries = module.gradient_registry._registry

    def register() -> None:
        entries.pop(how, None)
        module.RegisterGradient(how)(thing)

    _under_name(module, how, thing, entries.get(how, {}).get("type"), register)


_REGISTRIES: dict[
    str,
    tuple[Callable[[Any], Iterator[tuple[Any, Any]]], Callable[[Any, Any, Any], None]],
] = {
    "_abc": (_of_abstract_classes, _to_abstract_class),
    "copyreg": (_of_copyreg, _to_copyreg),
    "keras.src.saving.object_registration": (_of_keras, _to_keras),
    "pandas.core.accessor": (_of_accessors, _to_accessors),
    "pandas.core.dtypes.base": (_of_pandas_dtypes, _to_pandas_dtypes),
    "tensorflow.python.framework.ops": (_of_gradients, _to_gradients),
    "tensorflow.python.framework.tensor_conversion_registry": (_of_conversions, _to_conversions),
    "tf_keras.src.saving.object_registration": (_of_keras, _to_keras),
    _SAFE_GLOBALS: (_of_safe_globals, _to_safe_globals),
    "torch.utils._pytree": (_of_pytrees, _to_pytrees),
}
"""By the module that keeps it: how to list what is registered, and how to register."""
