"""What main finds in the notebook without being given it. Runs in: driver and worker.

Settings of libraries, and what was registered with them from cells. They stand before main in the
pickle, each in a pickle of its own that is opened when main imports that library.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import cloudpickle

from horovodrunner.core import registries, settings
from horovodrunner.core.import_hook import after_import

__all__ = ["InSurroundings", "Part", "restore"]

Part = tuple[str, bytes]
"""A library, and the pickle of a function and arguments to call it with once it is imported."""

_Dumps = Callable[[object], bytes]


class InSurroundings:
    """Pickles as a value that is unpickled where this process's settings are in force.

    What it does not refer to and what was registered from cells comes after it.

    Parameters
    ----------
    value
        The value, which is all that is there afterwards.
    dumps
        Pickles settings and registrations.
    pickled
        Where the ids of registered things are collected that the value refers to.
    """

    def __init__(self, value: object, dumps: _Dumps, pickled: set[int]) -> None:
        self._value = value
        self._settings = _Parts(lambda: _settings_here(dumps))
        self._registered = _Parts(lambda: _registered_beside(dumps, pickled))

    def __reduce__(self) -> tuple[Any, ...]:
        return _value_of, (self._settings, self._value, self._registered)


class _Parts:
    """Pickles as their restoration; they are found when what stands before is pickled."""

    def __init__(self, find: Callable[[], list[Part]]) -> None:
        self._find = find

    def __reduce__(self) -> tuple[Any, ...]:
        return restore, (self._find(),)


def _value_of(_: object, value: Any, __: object) -> Any:
    return value


def restore(parts: Iterable[Part]) -> None:
    """Put settings and registrations in force, each when its library is imported.

    Parameters
    ----------
    parts
        What a :class:`InSurroundings` was pickled with.
    """
    for library, data in parts:
        after_import(library, functools.partial(_restore_part, library, data))


def _restore_part(library: str, data: bytes, _: object) -> None:
    try:
        function, arguments = cloudpickle.loads(data)
    except Exception as error:  # noqa: BLE001 - main may do without
        warnings.warn(
            f"what the driver has set or registered in {library} does not come along: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
    else:
        function(*arguments)


def _settings_here(dumps: _Dumps) -> list[Part]:
    """Pickle the settings that were changed in this process."""
    return _pickled(
        dumps,
        [
            (library, (settings.take_over, (library, {name: value})))
            for library, changed in settings.changed_settings()
            for name, value in changed.items()
        ],
    )


def _registered_beside(dumps: _Dumps, pickled: set[int]) -> list[Part]:
    """Pickle what was registered from cells and is not in the pickle already."""
    return _pickled(
        dumps,
        [
            (each.registry.partition(".")[0], (registries.repeat, each))
            for entries in registries.of_this_process().values()
            for each in entries
            if each.is_from_a_cell and id(each.thing) not in pickled
        ],
    )


def _pickled(dumps: _Dumps, calls: Iterable[tuple[str, object]]) -> list[Part]:
    parts = []
    for library, call in calls:
        with contextlib.suppress(Exception):  # main may do without
            parts.append((library, dumps(call)))
    return parts
