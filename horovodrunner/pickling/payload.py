"""cloudpickle in and out, with the culprit named when it fails. Runs in: every process."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import cloudpickle

from horovodrunner.errors import PayloadError
from horovodrunner.flows.call.called import name_of
from horovodrunner.flows.call.context import with_context
from horovodrunner.formatting import in_one_line
from horovodrunner.pickling.buffers import Layout, SinkError, write_pickle
from horovodrunner.pickling.modules import TravellingPickler, call_in_its_modules
from horovodrunner.pickling.pickler import dumps, travels_by_reference

__all__ = [
    "WARN_BYTES",
    "attach",
    "attachments",
    "dump_call",
    "largest_parts",
    "write_result",
]

_SPARKS_OWN = (b"pyspark.core.broadcast", b"pyspark.broadcast", b"pyspark.sql.connect.session")
"""In the pickles of broadcast variables and of Connect's sessions, which no rank can unpickle."""

WARN_BYTES = 10 * 1024 * 1024
"""A pickled main larger than this is warned about."""


_attachments: ContextVar[dict[str, Any] | None] = ContextVar("attachments", default=None)


@contextlib.contextmanager
def attachments() -> Iterator[dict[str, Any]]:
    """Collect, by name, what :func:`attach` was called with while something is pickled."""
    found: dict[str, Any] = {}
    token = _attachments.set(found)
    try:
        yield found
    finally:
        _attachments.reset(token)


def attach(name: str, thing: object) -> None:
    """Declare, in a ``__reduce__``, that the pickle holds only the name of something."""
    if (found := _attachments.get()) is not None:
        found[name] = thing


def dump_call(
    main: Callable[..., Any],
    kwargs: Mapping[str, Any],
    argv: Sequence[str] | None = None,
    *,
    with_settings: bool = True,
) -> bytes:
    """Pickle a function and its arguments, and ``sys.argv`` for the worker unless it is None.

    `with_settings`: whether it is to find this process's settings of libraries in force.
    Raises PayloadError that names the variable that does not pickle and where it comes from.
    """
    parts = [(f"main ({name_of(main)})", main)]
    parts += [(f"the argument {name!r}", value) for name, value in kwargs.items()]
    try:
        whole = call_in_its_modules(main, kwargs, argv)
        call = dumps(with_context(whole) if with_settings else whole, TravellingPickler)
        if not any(module in call for module in _SPARKS_OWN):
            return call
        from horovodrunner.pickling.culprit import find_culprit

        found = find_culprit(parts)
    except BaseException as error:  # noqa: BLE001 - a __reduce__ may call sys.exit
        from horovodrunner.pickling.culprit import culprit_of  # hardly ever needed

        found = culprit_of(parts, error, f"main ({name_of(main)}) or an argument")
    if found is None:
        return call
    raise PayloadError(
        f"{found.where} cannot be sent to the workers: {found.why.reason}. {found.why.instead}."
    ) from found.error


def write_result(result: object, descriptor: int) -> Layout:
    """Pickle what ``main`` returned into a file.

    Raises PayloadError that names the part that does not pickle, or if the file does not take it.
    """
    try:
        return write_pickle(result, descriptor)
    except SinkError as error:
        raise PayloadError(
            "the value that main returned cannot be kept until it is sent to the driver: "
            f"{in_one_line(error.__cause__ or error)}. It needs as much memory (or, where files "
            "cannot be in memory, as much of the temporary directory) again on the rank's host: "
            "free some there, or return less"
        ) from error
    except BaseException as error:  # noqa: BLE001 - a __reduce__ may call sys.exit
        from horovodrunner.pickling.culprit import culprit_of

        what = "the value that main returned"
        found = culprit_of([(what, result)], error, what)
        raise PayloadError(
            f"{found.where} cannot be sent to the driver: {found.why.reason}. {found.why.returned}."
        ) from found.error


def largest_parts(
    main: Callable[..., Any], kwargs: Mapping[str, Any], at_least_bytes: int
) -> list[tuple[str, int]]:
    """Return where the three largest parts of a call come from, with their pickled bytes."""
    parts = [(f"the argument {name!r}", value) for name, value in kwargs.items()]
    sizes = [(where, _pickled_size(value)) for where, value in [*parts, *_parts_of(main, set())]]
    large = [part for part in sizes if part[1] >= at_least_bytes]
    return sorted(large, key=lambda part: -part[1])[:3]


def _pickled_size(value: object) -> int:
    try:
        return len(dumps(value))
    except Exception:  # noqa: BLE001 - sizes are a courtesy; the real dump has its own error
        return 0


def _parts_of(function: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """List what a callable drags along: globals, closure, defaults, helpers, and ``self``."""
    if id(function) in seen:
        return
    seen.add(id(function))
    where = name_of(function)
    if isinstance(function, types.MethodType):
        yield f"the object that the method {where} belongs to", function.__self__
        yield from _parts_of(function.__func__, seen)
    elif isinstance(function, functools.partial):
        for name, value in function.keywords.items():
            yield f"the argument {name!r} bound by functools.partial", value
        for index, value in enumerate(function.args):
            yield f"positional argument {index} bound by functools.partial", value
        yield from _parts_of(function.func, seen)
    elif isinstance(function, types.FunctionType):
        if travels_by_reference(function):
            return
        for part, value in _variables_of(function, where):
            if isinstance(value, types.FunctionType):
                yield from _parts_of(value, seen)
            elif not isinstance(value, types.ModuleType):
                yield part, value
    elif not isinstance(function, type):
        for name, value in getattr(function, "__dict__", {}).items():
            yield f"the attribute {name!r} of {where}", value


def _variables_of(function: types.FunctionType, where: str) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            yield f"the variable {name!r} in the closure of {where}", cell.cell_contents
    for name in cloudpickle.cloudpickle._extract_code_globals(function.__code__):
        if name in function.__globals__:
            yield f"the global {name!r} used by {where}", function.__globals__[name]
    for index, value in enumerate(function.__defaults__ or ()):
        yield f"default value {index} of {where}", value
    for name, value in (function.__kwdefaults__ or {}).items():
        yield f"the default of {where}'s argument {name!r}", value
