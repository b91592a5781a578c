"""What a call reaches first, whatever is wrapped around what. Runs in: every process.

A decorator may supply arguments by itself, or await what it wraps: ``__wrapped__`` and
``__signature__`` are for readers and do not decide what a call takes and gives.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["called_signature", "misfit", "name_of", "what_runs_later"]

_LRU_CACHE = type(functools.lru_cache(len))

_PLAIN = (bool, int, float, str, type(None))


def called_signature(called: Callable[..., Any]) -> inspect.Signature | None:
    """Return the parameters that a call takes, without annotations; None if it does not tell."""
    try:
        bare = _bare(called)
        return bare and inspect.signature(bare, follow_wrapped=False)
    except Exception:  # noqa: BLE001 - it may be anybody's object
        return None


def misfit(called: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """Return why something cannot be called with these arguments; "" if it can, or may."""
    function: Any = called
    positional: list[Any] = []
    keywords = dict(arguments)
    while isinstance(function, functools.partial):
        positional[:0] = function.args
        keywords = {**function.keywords, **keywords}
        function = function.func
    signature = called_signature(function)
    if signature is None or any(type(each).__name__ == "_PlaceholderType" for each in positional):
        return ""
    try:
        signature.bind(*positional, **keywords)
    except TypeError as error:
        parameters = signature.parameters.values()
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
        unknown = [] if takes_any else [k for k in keywords if k not in signature.parameters]
        bound = [f"{len(positional)} by position"] if positional else []
        given = ", ".join([*bound, *map(repr, keywords)])
        return (
            f"{name_of(function)}{_in_short(signature)} cannot be called with "
            f"{f'the arguments {given}' if given else 'no arguments'}: {error}"
            + (f"; it has no argument {', '.join(map(repr, unknown))}" if unknown else "")
            + ("; give the method of an object" if _lacks_self(function, signature) else "")
        )
    return ""


def what_runs_later(called: Callable[..., Any]) -> str:
    """Return what a call makes instead of running the function, such as "a coroutine", or ""."""
    try:
        function = _bare(called)
    except Exception:  # noqa: BLE001 - it may be anybody's object
        return ""
    for kind, is_so in (
        ("an async generator", inspect.isasyncgenfunction),
        ("a coroutine", inspect.iscoroutinefunction),
        ("a generator", inspect.isgeneratorfunction),
    ):
        if is_so(function):
            return kind
    return ""


def name_of(called: Callable[..., Any]) -> str:
    """Return the qualified name of something that can be called, or of its class."""
    while isinstance(called, functools.partial):
        called = called.func
    name = getattr(called, "__qualname__", None)
    return name if isinstance(name, str) else type(called).__qualname__


def _bare(called: Any) -> Any:  # noqa: PLR0911 - a list of kinds
    """Take off what a callable says of itself; None if it does not tell what it takes.

    By its type, because a proxy has the ``__class__`` of what it stands for.
    """
    kind = type(called)
    if issubclass(kind, types.FunctionType):
        bare = types.FunctionType(
            called.__code__, {}, called.__name__, called.__defaults__, called.__closure__
        )
        bare.__kwdefaults__ = called.__kwdefaults__
        return bare
    if issubclass(kind, types.MethodType):
        return _bound(_bare(called.__func__), called.__self__)
    if issubclass(kind, functools.partial):
        function = _bare(called.func)
        return function and functools.partial(function, *called.args, **called.keywords)
    if issubclass(kind, staticmethod | _LRU_CACHE):  # they hand over all that they are given
        return _bare(called.__wrapped__)
    if issubclass(kind, type):
        own = any("__signature__" in vars(each) for each in called.__mro__)
        return None if own else called
    if issubclass(kind, types.BuiltinFunctionType):
        return called
    call = inspect.getattr_static(kind, "__call__", None)
    return _bound(_bare(call), called) if issubclass(type(call), types.FunctionType) else None


def _bound(function: Any, instance: object) -> Any:
    return function and types.MethodType(function, instance)


def _lacks_self(function: Any, signature: inspect.Signature) -> bool:
    """Whether it seems to be a method that was taken from its class."""
    is_of_class = "." in name_of(function).rpartition("<locals>")[2].lstrip(".")
    return is_of_class and next(iter(signature.parameters), "") == "self"


class _Default:
    """Shows a default value as far as one line has room for it."""

    def __init__(self, value: object) -> None:
        self._text = repr(value) if type(value) in _PLAIN else "..."

    def __repr__(self) -> str:
        return self._text if len(self._text) <= 40 else "..."


def _in_short(signature: inspect.Signature) -> str:
    parameters = [
        each if each.default is each.empty else each.replace(default=_Default(each.default))
        for each in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters))
