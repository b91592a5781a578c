"""What main finds in the notebook without being given it. Runs in: driver and worker.

Settings of libraries, and what was registered with them from cells. They stand before main in the
pickle, each in a pickle of its own that is opened when that library is imported: a Keras model that
main refers to is unpickled by the registered names of its layers.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable
from typing import Any

from horovodrunner.flows.call.import_hook import after_import
from horovodrunner.pickling.buffers import loads
from horovodrunner.pickling.modules import dump_in_its_modules
from horovodrunner.pickling.pickler import Call

__all__ = ["with_context"]

Part = tuple[str, bytes]
"""A library, and the pickle of a function and arguments to call it with once it is imported. It is
in Base64: a pickle within main's would be taken for code that main runs (early_imports)."""


def with_context(value: object) -> Call:
    """Pickle as a value that is unpickled where this process's settings are in force."""
    parts = []
    for library, call in [*_settings_here(), *_registered_here()]:
        with contextlib.suppress(Exception):  # main may do without
            parts.append((library, b2a_base64(dump_in_its_modules(call), newline=False)))
    return Call(_value_of, Call(_restore, parts), value)  # in this order


def _settings_here() -> Iterable[tuple[str, object]]:
    from horovodrunner.flows.call import settings  # where it is not needed it costs a worker time

    for library, changed in settings.changed_settings():
        for name, value in changed.items():
            yield library, (settings.take_over, (library, {name: value}))


def _registered_here() -> Iterable[tuple[str, object]]:
    """Yield what was registered from cells, whether or not main refers to it."""
    from horovodrunner.flows.call import registries

    for entries in registries.of_this_process().values():
        for each in entries:
            if each.is_from_a_cell:
                yield each.registry.partition(".")[0], (registries.repeat, each)


def _value_of(_: object, value: Any) -> Any:
    return value


def _restore(parts: Iterable[Part]) -> None:
    for library, data in parts:
        after_import(library, functools.partial(_restore_part, library, data))


def _restore_part(library: str, data: bytes, _: object) -> None:
    try:
        function, arguments = loads(a2b_base64(data))
    except Exception as error:  # noqa: BLE001 - main may do without
        warnings.warn(
            f"what the driver has set or registered in {library} does not come along: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
    else:
        function(*arguments)
