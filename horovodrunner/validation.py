"""Arguments are checked before anything is launched. Runs in: every process.

Each function returns the plain Python value that it has checked, whatever NumPy, PyTorch or an enum
made of it, and that value is the one to use: ``np.int64(2)`` overflows and is no JSON.
"""

from __future__ import annotations

import functools
import operator
import os
import shlex
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from decimal import Decimal
from numbers import Real
from pathlib import PurePath
from typing import Any

from horovodrunner.errors import ArgumentTypeError, ArgumentValueError
from horovodrunner.flows.call.called import called_signature, misfit, name_of, what_runs_later
from horovodrunner.formatting import cut
from horovodrunner.storage import is_url

__all__ = [
    "boolean",
    "boolean_or",
    "callback",
    "choice",
    "command_line",
    "exception_types",
    "free_names",
    "integer",
    "integer_or",
    "main",
    "name",
    "names",
    "number",
    "path",
    "plain",
    "resources",
    "runs_at_once",
    "seconds",
    "shown",
    "text",
]

_SHOWN_CHARS = 200
_NUMBERS: Any = (Real, Decimal)


def plain(value: Any) -> Any:
    """Return the Python value of a scalar, a 0-d array or a 0-d tensor; others as they are."""
    if isinstance(value, (bool, int, float)) and type(value).__module__ == "builtins":
        return value
    if getattr(value, "shape", None) != ():
        return value
    if not hasattr(value, "item") and callable(getattr(value, "numpy", None)):
        value = value.numpy()  # a tensor of TensorFlow
    try:
        return value.item()
    except Exception:  # noqa: BLE001 - it is somebody's object, and is refused as what it is
        return value


def shown(value: Any) -> str:
    """Show a value in one short line, for an error."""
    try:
        return cut(" ".join(repr(value).split()), _SHOWN_CHARS)
    except Exception:  # noqa: BLE001 - it is somebody's object
        return f"({type(value).__name__})"


def _wrong_type(name: str, given: Any, wanted: str) -> ArgumentTypeError:
    return ArgumentTypeError(
        f"{name}={shown(given)}: it must be {wanted}, got {type(given).__name__}"
    )


def boolean(name: str, value: Any) -> bool:
    """Check a bool, NumPy's included."""
    found = plain(value)
    if not isinstance(found, bool):
        raise _wrong_type(name, value, "True or False")
    return found


def boolean_or(other: str, name: str, value: Any) -> bool | str:
    """Check a yes or no that may be left to something else."""
    found = plain(value)
    if isinstance(found, bool):
        return found
    if isinstance(found, str) and found == other:
        return other
    raise _wrong_type(name, value, f"{other!r}, True or False")


def integer(name: str, value: Any, at_least: int | None = None) -> int:
    """Check a whole number; a bool is none."""
    found = plain(value)
    if isinstance(found, bool):
        raise ArgumentTypeError(f"{name}={shown(value)}: it must be an int, not a bool")
    try:
        found = int(operator.index(found))  # an enum's member stands for its number
    except Exception:  # noqa: BLE001 - an array of several numbers raises what it likes
        raise _wrong_type(name, value, "an int") from None
    if at_least is not None and found < at_least:
        raise ArgumentValueError(f"{name}={found}: it must be at least {at_least}")
    return found


def integer_or(other: str, name: str, value: Any, at_least: int) -> int | str:
    """Check a whole number that may be left to something else."""
    found = plain(value)
    if isinstance(found, str):
        if found == other:
            return other
        raise ArgumentValueError(f"{name}={shown(value)}: it must be {other!r} or a whole number")
    return integer(name, value, at_least)


def number(name: str, value: Any, unit: str = "") -> float:
    """Check a number, as a float; a bool is none."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, _NUMBERS):
        raise _wrong_type(name, value, f"a number of {unit}" if unit else "a number")
    try:
        return float(found)
    except (OverflowError, ValueError) as error:
        raise ArgumentValueError(f"{name}={shown(value)}: {error}") from None


def seconds(name: str, value: Any) -> float:
    """Check a time span of more than 0 seconds."""
    found = number(name, value, "seconds")
    if not found > 0:
        raise ArgumentValueError(f"{name}={shown(value)}: it must be more than 0 seconds")
    return found


def text(name: str, value: Any) -> str:
    """Check a str."""
    found = plain(value)
    if not isinstance(found, str):
        raise _wrong_type(name, value, "a str")
    return str.__str__(found)


def name(option: str, value: Any, most: int) -> str:
    """Check a short text that can be shown in one line."""
    found = text(option, value)
    if not found.strip():
        raise ArgumentValueError(f"{option}={found!r}: it must not be empty")
    if not found.isprintable():
        raise ArgumentValueError(f"{option}={shown(found)}: it must be printable, in one line")
    if len(found) > most:
        raise ArgumentValueError(
            f"{option}={shown(found)}: it has {len(found)} characters, and {most} is the most"
        )
    return found.strip()


def names(name: str, value: Any) -> list[str]:
    """Check a list of names: anything but a str that one can iterate over."""
    value = plain(value)
    if isinstance(value, str):
        raise ArgumentTypeError(f"{name}={value!r}: give a list, [{value!r}]")
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        raise ArgumentTypeError(
            f"{name}={shown(value)}: give a list of names, got {type(value).__name__}"
        )
    return [text(f"{name}[{place}]", each) for place, each in enumerate(value)]


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Check one of a few words."""
    word = plain(value)
    if not isinstance(word, str) or word not in choices:
        listed = ", ".join(map(repr, choices[:-1]))
        raise ArgumentValueError(f"{name}={shown(value)}: it must be {listed} or {choices[-1]!r}")
    return str.__str__(word)


def command_line(name: str, value: Any) -> list[str]:
    """Check words of a command line, or text that is split into them as a shell does it."""
    value = plain(value)
    if isinstance(value, str):
        try:
            return shlex.split(value)
        except ValueError as error:
            raise ArgumentValueError(f"{name}={value!r}: {error}") from None
    example = f"give words, such as {name}=['--cycle-time-ms', '2'], or one str"
    if not isinstance(value, (list, tuple)):
        raise ArgumentTypeError(f"{name}={shown(value)}: {example}")
    for word in value:
        if not isinstance(word, str):
            raise ArgumentTypeError(f"{name}: {shown(word)} is no str; {example}")
    return [str.__str__(word) for word in value]


def path(name: str, value: Any) -> str:
    """Check a path or URL."""
    try:
        found = os.fspath(plain(value))
    except TypeError:
        found = None
    if not isinstance(found, str):
        raise _wrong_type(name, value, "a path or a URL")
    if not found:
        raise ArgumentValueError(f"{name}={shown(value)}: it must not be empty")
    if isinstance(value, PurePath) and is_url(found):
        raise ArgumentTypeError(
            f"{name}={value!r} is a URL in a path object, which drops slashes: give it as a str"
        )
    return str.__str__(found)


def exception_types(name: str, value: Any) -> tuple[type[BaseException], ...]:
    """Check one or more types of exceptions."""
    try:
        types = (value,) if isinstance(value, type) else tuple(value)
    except TypeError:
        types = (value,)
    for item in types:
        if not (isinstance(item, type) and issubclass(item, BaseException)):
            raise ArgumentTypeError(
                f"{name}: {item!r} is not a type of exception; give a tuple such as (OSError,)"
            )
    return types


def resources(name: str, value: Any) -> dict[str, float]:
    """Check what a task takes of its executor: amounts by Spark's names of resources."""
    example = "give amounts by name, such as {'cpus': 4, 'gpu': 1}"
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ArgumentTypeError(f"{name}={value!r}: {example}")
    if not value:
        raise ArgumentValueError(f"{name}={value!r}: it must not be empty; {example}")
    if "gpus" in value:
        raise ArgumentValueError(f"{name}={value!r}: Spark's name for GPUs is 'gpu'")
    amounts: dict[str, float] = {}
    for resource, given in value.items():
        try:
            amount = number(resource, given)
        except ArgumentTypeError:
            problem = f"the amount of {resource!r} is no number"
            raise ArgumentTypeError(f"{name}={value!r}: {problem}") from None
        whole = amount.is_integer()
        if not amount > 0 or (not whole and (amount > 1 or resource == "cpus")):
            raise ArgumentValueError(
                f"{name}={value!r}: the amount of {resource!r} must be a whole number"
                + ("" if resource == "cpus" else ", or less than 1 when tasks share one")
            )
        is_int = isinstance(plain(given), int)
        amounts[str.__str__(resource)] = int(amount) if is_int else amount
    return amounts


def callback(name: str, value: Any, argument: str) -> Callable[..., Any]:
    """Check a function that is to be called with one argument, by position."""
    if not callable(value):
        raise _wrong_type(name, value, f"a function of {argument}")
    function: Callable[..., Any] = value
    if problem := misfit(functools.partial(function, None), {}):
        raise ArgumentTypeError(f"{name}: it is called with {argument}, and {problem}")
    runs_at_once(name, function)
    return function


def main(
    function: Any, kwargs: Mapping[str, Any], runner_options: Collection[str] = ()
) -> Callable[..., Any]:
    """Check that a training function can be called with its arguments.

    `runner_options` is what HorovodRunner itself takes: it may have been given to ``run()``.
    """
    if not callable(function):
        raise ArgumentTypeError(
            f"main must be a function, got {type(function).__name__} ({shown(function)}): "
            f"{_function_instead(function)}"
        )
    checked: Callable[..., Any] = function
    if problem := misfit(checked, kwargs):
        options = [name for name in kwargs if name in runner_options and repr(name) in problem]
        where = "".join(f"; {name} is an option of HorovodRunner({name}=...)" for name in options)
        raise ArgumentTypeError(f"{problem}{where}")
    runs_at_once("main", checked)
    return checked


def free_names(function: Any, *names: str) -> None:
    """Refuse a training function with a parameter that ``run()`` has itself."""
    signature = called_signature(function) if callable(function) else None
    parameters = {} if signature is None else signature.parameters
    for taken in names:
        if taken in parameters:
            called = name_of(function)
            raise ArgumentTypeError(
                f"{called} has a parameter {taken!r}, which is run()'s own name: rename that "
                f"parameter of {called}"
            )


def runs_at_once(name: str, function: Callable[..., Any]) -> None:
    """Check that a call runs a function, instead of making a coroutine or a generator of it."""
    later = what_runs_later(function)
    if not later:
        return
    of_async = "async" in later or later == "a coroutine"
    called = f"{'asyncio.run' if of_async else 'list'}({name_of(function)}(...))"
    raise ArgumentTypeError(
        f"{name} must run when it is called, and {name_of(function)} only makes {later} then: give "
        f"a function that returns {called}"
    )


def _function_instead(thing: Any) -> str:
    if isinstance(thing, str):
        return "pass the function itself, run(train), not its name or its file"
    if isinstance(thing, types.ModuleType):
        return f"pass one of its functions, such as run({thing.__name__}.train)"
    if isinstance(thing, (classmethod, property)):
        return "pass the method of the class or of an object, such as run(trainer.train)"
    of_object = "" if type(thing).__module__ == "builtins" else ", or a method: run(trainer.train)"
    return f"pass the function itself, not what it returns: run(train), not run(train()){of_object}"
