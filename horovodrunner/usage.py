"""Calls of the runner that Python would refuse with less help. Runs in: the driver."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from horovodrunner.deprecated import replace_old_keywords
from horovodrunner.errors import ArgumentTypeError, HorovodRunnerError
from horovodrunner.flows.call.called import called_signature, name_of
from horovodrunner.flows.outcome import tracebacks
from horovodrunner.validation import shown

__all__ = ["explained", "wrong_options", "wrong_run", "wrong_script"]

_Method = TypeVar("_Method", bound=Callable[..., Any])
_Explain = Callable[[inspect.Signature, Sequence[Any], Mapping[str, Any], TypeError], str]


def explained(explain: _Explain | None = None, **new_names: str) -> Callable[[_Method], _Method]:
    """Decorate what users call: its errors explain what to write, and show the user's code.

    `explain` gets the signature, the arguments by position (without self) and by name, and
    Python's error, which is shown where there is none. Keywords of old names are taken by their
    new ones.
    """

    def decorate(method: _Method) -> _Method:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def checked_call(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True  # for pytest, and IPython's debugger
            handled = sys.exc_info()[1]
            try:
                kwargs = replace_old_keywords(kwargs, new_names)
                try:
                    signature.bind(*args, **kwargs)
                except TypeError as error:
                    if explain is None:
                        raise
                    raise ArgumentTypeError(explain(signature, args[1:], kwargs, error)) from None
                return method(*args, **kwargs)
            except (HorovodRunnerError, KeyboardInterrupt) as error:
                # A bare raise would bring the frames back before Python 3.11.
                raise tracebacks.shorten(error, handled)  # noqa: B904 - it is the same one

        # getfullargspec does not look behind a decorator
        checked_call.__signature__ = signature  # type: ignore[attr-defined]
        return checked_call  # type: ignore[return-value]

    return decorate


def wrong_run(
    signature: inspect.Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    error: TypeError,
) -> str:
    """Explain a call of ``run`` that does not fit."""
    if not args:
        return "run() lacks main, the function that every rank is to call: run(train, lr=0.1)"
    main = args[0]
    name = name_of(main) if callable(main) else "train"
    if len(args) > 1:
        taken = called_signature(main) if callable(main) else None
        names = [*(taken.parameters if taken else ())][: len(args) - 1]
        named = _named(names, args[1:], kwargs) or "name=value"
        return (
            f"run({name}, {', '.join(map(shown, args[1:]))}): give main's arguments by name, "
            f"run({name}, {named})"
        )
    if "main" in kwargs:
        return (
            f"run({name}, main=...): 'main' is run's own parameter, so {name} is not given an "
            f"argument of that name: rename it, or run(functools.partial({name}, main=...))"
        )
    return f"run(): {error}"


def wrong_script(
    signature: inspect.Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    error: TypeError,
) -> str:
    """Explain a call of ``run_script`` that does not fit."""
    if not args:
        return 'run_script() lacks the script: run_script("train.py", "--epochs", 3)'
    for name, value in kwargs.items():
        if name not in signature.parameters:
            option = "--" + name.replace("_", "-")
            return (
                f"run_script({shown(args[0])}, {name}=...): give the script's arguments as a "
                f"command line has them, run_script({shown(args[0])}, {option!r}, {shown(value)})"
            )
    return f"run_script(): {error}"


def wrong_options(
    signature: inspect.Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    error: TypeError,
) -> str:
    """Explain a call of the runner's class that does not fit."""
    import difflib  # hardly ever needed

    options = [name for name in signature.parameters if name != "self"]
    if args:
        values, named = ", ".join(map(shown, args)), _named(options, args, kwargs)
        return f"HorovodRunner({values}): options are given by name, HorovodRunner({named})"
    for name in kwargs:
        if name not in options:
            close = difflib.get_close_matches(name, options, 1, 0.5)
            meant = close or [each for each in options if name in each]
            advice = f"do you mean {meant[0]}=...?" if meant else f"it has {', '.join(options)}"
            return f"HorovodRunner has no option {name!r}: {advice}"
    if "np" not in kwargs:
        return (
            "HorovodRunner() lacks np, the number of ranks: np=2 for two on Spark, np=-2 for two "
            "on this machine"
        )
    return f"HorovodRunner(): {error}"


def _named(names: Sequence[str], values: Sequence[Any], given: Mapping[str, Any]) -> str:
    free = [name for name in names if name not in given]
    return ", ".join(f"{k}={shown(v)}" for k, v in zip(free, values, strict=False))
