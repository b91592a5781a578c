"""Records what a run is called with, for those that go on from it. Runs in: the driver.

The same cell in a fresh kernel has the same record: no addresses, no line numbers, no order of
sets, and of arrays, models and DataFrames the type and the shape alone.
"""

from __future__ import annotations

import contextlib
import copyreg
import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from horovodrunner.flows.call.record import HIDDEN, MAX_ENTRIES, MAX_TEXT, RunRecord
from horovodrunner.pickling.installed import is_of_a_python

__all__ = ["describe_values", "looks_secret", "may_be_secret", "record_call", "record_script"]

_MAX_ITEMS = 100
"""A longer collection is data, not a setting: only its length counts."""

_MAX_DEPTH = 6
_HASHED_CHARACTERS = 2**20

_SURELY_SECRET = {"credential", "credentials", "passphrase", "passwd", "password", "pwd", "secret"}
_SECRET_WORDS = _SURELY_SECRET | {"apikey", "auth", "bearer", "cookie", "dsn", "key", "keys"}
_SECRET_WORDS |= {"passwords", "pat", "private", "sas", "secrets", "token", "tokens"}
_SECRET_TEXT = re.compile(
    r"://[^/\s]*:[^/\s]*@"  # a password in a URL
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}|\bgh[opsur]_\w{20}|\bgithub_pat_|\bglpat-|\bhf_\w{20}"
    r"|\bsk-[\w-]{16}|\bxox[a-z]-|\bdapi[0-9a-f]{32}|\beyJ[\w-]{10,}\.|-----BEGIN "
    r"|(?i:\b(?:bearer|basic) [\w+/=.-]{12})"
    r"|(?i:\b(?:password|passwd|pwd|secret|accountkey|token|sig|api_?key)\s*[=:]\s*\S)"
)
_LOOKS_RANDOM = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9+_=-]{32,}")

_HAVE_SHAPES = frozenset({"numpy", "pandas", "polars", "scipy", "tensorflow", "torch"})
_HAVE_ARRAYS = frozenset({"jax", "jaxlib", "tensorflow", "torch"})
_COLLECTIONS = (list, tuple, set, frozenset)
_SIMPLE = frozenset({bool, float, int, str, types.NoneType})
_SCALARS = (bool, int, float, complex, str, bytes, bytearray, enum.Enum, PurePath)
_REPRESENTED = frozenset(
    {
        "datetime.date",
        "datetime.time",
        "datetime.timedelta",
        "decimal.Decimal",
        "fractions.Fraction",
        "uuid.UUID",
    }
)
"""Classes whose objects are shown as they represent themselves."""

_REFERRED = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    functools.partial,
)
"""What a name refers to, rather than what it holds."""

_REDUCED = frozenset(
    {"array", "builtins", "collections", "ipaddress", "operator", "pandas", "pyarrow", "re"}
)
"""Libraries whose objects are values: what they pickle to is the same everywhere."""

_OURS = frozenset({"horovodrunner", "petastorm", "sparkdl"})
_PLAIN_BASES = frozenset({"abc", "builtins", "typing"})
_NOT_CODE = frozenset({"__doc__", "__firstlineno__"})
"""What a class's body stores that is no code; the line only from Python 3.13 on."""

_Seen = dict[int, tuple[int, Any]]
"""Objects whose content was written, by id, each with its number: they may form a circle."""

_FLAGS = (
    inspect.CO_VARARGS
    | inspect.CO_VARKEYWORDS
    | inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)


def record_call(
    run_id: str,
    size: int,
    main: Callable[..., Any],
    kwargs: Mapping[str, Any],
    *,
    exactly: bool = False,
) -> RunRecord:
    """Record what a run is called with: the same for the same call in another process.

    `exactly` adds digests of what is not written out: arrays, DataFrames and long collections.
    """
    writer, main_name = _Writer(exactly=exactly), ""
    # Anybody's objects may do anything: what was written by then is better than no run.
    with contextlib.suppress(Exception):
        for name, value in _arguments(main, kwargs):
            writer.describe(writer.arguments, name, value)
        writer.visit(main, "")
        main_name = _bounded(_name(main))
    writer.finish()
    return RunRecord(
        run_id,
        size,
        f"{sys.version_info[0]}.{sys.version_info[1]}",
        main_name,
        writer.arguments,
        writer.variables,
        {name: _digest("".join(texts)) for name, texts in writer.code.items()},
    )


def record_script(
    run_id: str,
    size: int,
    name: str,
    arguments: Mapping[str, Any],
    code: types.CodeType,
    *,
    exactly: bool = False,
) -> RunRecord:
    """Record what a run of a script is called with."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    texts = describe_values(arguments, exactly=exactly)
    digest = {"": _digest(_code_text(code))}
    return RunRecord(run_id, size, python, _bounded(name), texts, {}, digest)


def describe_values(values: Mapping[str, Any], *, exactly: bool = False) -> dict[str, str]:
    """Write values as texts, what a configuration consists of one by one; no secret is shown."""
    writer = _Writer(exactly=exactly)
    with contextlib.suppress(Exception):  # anybody's objects may do anything
        for name, value in values.items():
            writer.describe(writer.arguments, name, value)
    return writer.arguments


def _arguments(main: Callable[..., Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield main's arguments with its defaults: a default that was edited is another argument."""
    try:
        signature = inspect.signature(main)
        bound = signature.bind(**kwargs)
    except (TypeError, ValueError):
        yield from kwargs.items()
        return
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            yield name, value


class _Writer:
    """Walks through a call and writes down what it finds."""

    def __init__(self, *, exactly: bool = False) -> None:
        self.arguments: dict[str, str] = {}
        self.variables: dict[str, str] = {}
        self.code: dict[str, list[str]] = {}
        self._exactly = exactly
        self._seen: dict[int, Any] = {}
        self._path: list[Any] = []
        self._told: _Seen = {}
        self._beyond: list[tuple[dict[str, str], str]] = []

    def finish(self) -> None:
        """Add a digest of the entries that are too many to be listed."""
        for entries in (self.arguments, self.variables):
            texts = sorted(text for where, text in self._beyond if where is entries)
            if texts:
                entries["others"] = f"{len(texts)} values, {_digest(repr(texts))}"
        if rest := [*self.code][MAX_ENTRIES - 1 :] if len(self.code) > MAX_ENTRIES else []:
            self.code["others"] = [repr((name, self.code.pop(name))) for name in rest]

    def describe(self, entries: dict[str, str], name: str, value: Any, depth: int = 0) -> None:
        """Add a value, or what it consists of, to `entries`."""
        if len(entries) >= MAX_ENTRIES and not self._exactly:
            return
        try:
            is_inside_itself = any(value is each for each in self._path)
            may_have_parts = depth < _MAX_DEPTH and not is_inside_itself
            parts = _parts(value, exactly=self._exactly) if may_have_parts else []
            text = "" if parts else _text(value)
            if self._exactly and not parts and not is_inside_itself:
                text += _content(value, self._told)
        except Exception:  # noqa: BLE001 - the user's own __getattr__, __len__, ... may do anything
            parts, text = [], f"of type {type(value).__qualname__}"
        self._path.append(value)
        for label, item in parts:
            self.describe(entries, f"{name}{label}", item, depth + 1)
        self._path.pop()
        if not parts:
            shown = _concealed(text) if may_be_secret(name, value) else text
            self._enter(entries, name, shown)
        self._follow(value)

    def _enter(self, entries: dict[str, str], name: str, text: str) -> None:
        if self._exactly and len(entries) >= MAX_ENTRIES - 1:
            self._beyond.append((entries, f"{name} {text}"))
        else:
            entries.setdefault(_bounded(name), text)

    def visit(self, called: Any, key: str) -> None:
        """Add the code of something that can be called, and what it uses; main's key is ""."""
        is_full = len(self._seen) >= MAX_ENTRIES and not self._exactly
        if is_full or id(called) in self._seen:
            return
        self._seen[id(called)] = called  # kept: nothing else must get its id
        if isinstance(called, functools.partial):
            self.visit(called.func, key)
            for index, value in enumerate(called.args):
                self.describe(self.variables, f"argument {index} of {_name(called)}", value)
            for name, value in called.keywords.items() if key else ():  # main's are arguments
                self.describe(self.variables, f"{name} of {_name(called)}", value)
        elif isinstance(called, types.MethodType):
            self.describe(self.variables, "self", called.__self__)
            self.visit(called.__func__, key)
        elif isinstance(called, types.FunctionType):
            self._visit_function(called, key)
        elif isinstance(called, type):
            self._visit_class(called)
        elif (wrapped := _wrapped(called)) is not None:
            self.visit(wrapped, key)
        elif not key and not isinstance(called, types.BuiltinFunctionType):
            self.describe(self.variables, "self", called)

    def _visit_function(self, function: types.FunctionType, key: str) -> None:
        code = function.__code__
        if _is_installed(code.co_filename):  # what a library's decorator put around it
            inner = [each.cell_contents for each in function.__closure__ or ()]
            for each in [getattr(function, "__wrapped__", None), *inner]:
                if isinstance(each, types.FunctionType) and _is_the_users(each.__module__):
                    self.visit(each, key)
            return
        self.code.setdefault(_bounded(key), []).append(_code_text(code))
        of = f" of {key}" if key else ""
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a variable that has no value yet
                self._visit_value(f"{name}{of}", cell.cell_contents, code)
        module = function.__globals__.get("__name__", "")
        by_value = module == "__main__"
        for name in sorted(_globals_of(code)):
            is_state = name.startswith("__" if by_value else "_")
            if name in function.__globals__ and not is_state:
                value = function.__globals__[name]
                self._visit_value(name if by_value else f"{module}.{name}", value, code)
        if key:
            positional = code.co_varnames[: code.co_argcount]
            defaults = function.__defaults__ or ()
            pairs = [*zip(reversed(positional), reversed(defaults), strict=False)]
            for name, value in [*pairs, *(function.__kwdefaults__ or {}).items()]:
                self.describe(self.variables, f"{name}{of}", value)

    def _visit_value(self, name: str, value: Any, code: types.CodeType) -> None:
        """Add a variable that code uses; of a module, what it seems to use: ``config.LR``."""
        if self._exactly and isinstance(value, _REFERRED):  # another one may have the same name
            self._enter(self.variables, name, _text(value) + _content(value, self._told))
        if isinstance(value, types.ModuleType):
            held = vars(value) if _is_the_users(value.__name__) else {}
            for each in sorted(_names_in(code) & held.keys()):
                if not each.startswith("_") and not isinstance(held[each], types.ModuleType):
                    self._visit_value(f"{value.__name__}.{each}", held[each], code)
        elif isinstance(value, (type, types.FunctionType, types.MethodType, functools.partial)):
            self._follow(value)
        else:
            self.describe(self.variables, name, value)

    def _follow(self, value: Any) -> None:
        """Visit the user's code that a value is, or is an instance of."""
        if not isinstance(value, (type, types.FunctionType)):
            value = _wrapped(value) or value
        if isinstance(value, (functools.partial, types.MethodType)):
            self.visit(value, _name(value))
        elif isinstance(value, (type, types.FunctionType)):
            if _is_the_users(value.__module__):
                self.visit(value, _name(value))
        elif _is_the_users(type(value).__module__):
            self.visit(type(value), _name(type(value)))

    def _visit_class(self, cls: type) -> None:
        for base in (*cls.__bases__, type(cls)):
            self._follow(base)
        members = getattr(cls, "__members__", {}) if issubclass(cls, enum.Enum) else {}
        for name, held in sorted({**vars(cls), **members}.items()):
            for value in _held_by_class(held):
                if isinstance(value, types.FunctionType):
                    if not (name.startswith("__") and _is_generated(cls, value)):
                        self._follow(value)
                elif _is_setting(name, value, exactly=self._exactly):
                    self.describe(self.variables, f"{cls.__qualname__}.{name}", value)


def _held_by_class(held: Any) -> list[Any]:
    """List the functions that a class holds as a method or property; else what it holds."""
    if isinstance(held, (staticmethod, classmethod)):
        return [held.__func__]
    if isinstance(held, property):
        return [each for each in (held.fget, held.fset, held.fdel) if each is not None]
    if isinstance(held, enum.Enum):
        return [held.value]
    return [held.func] if isinstance(held, functools.cached_property) else [held]


def _is_setting(name: str, value: Any, *, exactly: bool) -> bool:
    """Whether what an object or class holds counts, rather than being its own business."""
    if exactly:
        return not name.startswith("__") and not isinstance(value, types.MemberDescriptorType)
    return not name.startswith("_") and _is_plain(value)


def _parts(  # noqa: PLR0911 - a list of kinds
    value: Any, *, exactly: bool = False
) -> list[tuple[str, Any]]:
    """List what a configuration consists of; nothing for what is one value."""
    if isinstance(value, Mapping):
        if len(value) > _MAX_ITEMS or not all(_is_scalar(key) for key in value):
            return []
        return [(f"[{_text(key)}]", item) for key, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", item) for name, item in zip(value._fields, value, strict=True)]
    if isinstance(value, (list, tuple)):
        if _is_plain(value):
            return []
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, (type, enum.Enum)):
        return []
    if dataclasses.is_dataclass(value):
        return [(f".{each.name}", getattr(value, each.name)) for each in dataclasses.fields(value)]
    return [(f".{name}", item) for name, item in _attributes(value, exactly=exactly)]


def _attributes(value: Any, *, exactly: bool) -> list[tuple[str, Any]]:
    """List the settings of an object that was made to hold some, and not its state."""
    kind = type(value)
    is_namespace = isinstance(value, types.SimpleNamespace) or kind.__name__ == "Namespace"
    is_model = hasattr(kind, "model_fields")  # pydantic's
    # what comes from a library's class (a torch Module, say) has that library's state
    bases = sys.stdlib_module_names if exactly else _PLAIN_BASES
    is_plain_class = _is_the_users(kind.__module__) and all(
        base.__module__.partition(".")[0] in bases or _is_the_users(base.__module__)
        for base in kind.mro()
    )
    if not (is_namespace or is_model or is_plain_class):
        return []
    slots = [
        name
        for each in kind.mro()
        for name, held in vars(each).items()
        if isinstance(held, types.MemberDescriptorType)
    ]
    # not by getattr: a property of the same name would run
    held = dict(getattr(value, "__dict__", {}))
    held |= {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return [
        (name, item)
        for name, item in held.items()
        if _is_setting(name, item, exactly=exactly)
        or ((is_namespace or is_model) and not name.startswith("_"))
    ]


def _is_scalar(value: Any) -> bool:
    return (
        isinstance(value, (*_SCALARS, types.NoneType, types.EllipsisType))
        or _is_represented(value)
        or _is_numpy_scalar(value)
    )


def _is_represented(value: Any) -> bool:
    names = {f"{each.__module__}.{each.__qualname__}" for each in type(value).__mro__}
    return isinstance(value, range) or not names.isdisjoint(_REPRESENTED)


def _is_numpy_scalar(value: Any) -> bool:
    return type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is told in one text, at least by its length."""
    if isinstance(value, _COLLECTIONS):
        if hasattr(value, "_fields") or depth > _MAX_DEPTH:
            return False
        return len(value) > _MAX_ITEMS or all(_is_plain(item, depth + 1) for item in value)
    return _is_scalar(value)


def _text(value: Any) -> str:  # noqa: PLR0911 - a list of kinds
    """Write a value so that equal ones have equal texts in every process."""
    if _is_numpy_scalar(value) and _is_scalar(item := value.item()) and type(item) in _SCALARS:
        value = item
    if value is None or value is ... or isinstance(value, bool):
        return repr(value)
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, int):
        # Python refuses to write long integers in decimal digits
        return int.__repr__(value) if value.bit_length() < 1000 else _bounded(hex(value))
    if isinstance(value, (float, complex)):
        return (float if isinstance(value, float) else complex).__repr__(value)
    if isinstance(value, (str, PurePath)):
        return _quoted(str.__str__(value) if isinstance(value, str) else str(value))
    if isinstance(value, (bytes, bytearray)):
        return _quoted(bytes(value[:_HASHED_CHARACTERS]).decode("latin-1"), len(value), "bytes")
    if _is_represented(value):
        return _bounded(repr(value))
    if isinstance(value, _COLLECTIONS):
        return _bounded(_collection_text(value))
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {len(value)} items"
    return _bounded(_type_text(value))


def _content(value: Any, seen: _Seen) -> str:
    """Write a digest of a value whose text does not say all, if it has the same everywhere."""
    if isinstance(value, _REFERRED):
        module = getattr(value, "__module__", None)
        return f" of {module}" if isinstance(module, str) and not _is_the_users(module) else ""
    digest = hashlib.sha256()
    try:
        if not _add_content(digest, value, seen):
            return ""
    except Exception:  # noqa: BLE001 - anybody's objects may do anything; its text is all there is
        return ""
    return f" ({digest.hexdigest()[:12]})"


def _add_content(digest: Any, value: Any, seen: _Seen) -> bool:  # noqa: PLR0911 - a list of kinds
    """Add to a digest what a value holds; return whether it is known how."""
    library = type(value).__module__.partition(".")[0]
    if isinstance(value, (str, bytes, bytearray)):
        if len(value) <= _HASHED_CHARACTERS:
            return False  # its text has one
        digest.update(value.encode(errors="surrogatepass") if isinstance(value, str) else value)
        return True
    if isinstance(value, _COLLECTIONS) and len(value) > _MAX_ITEMS:
        texts = [_item_text(item, seen) for item in value]
        digest.update(
            repr(sorted(texts) if isinstance(value, (set, frozenset)) else texts).encode()
        )
        return True
    if isinstance(value, Mapping) and len(value) > 0:
        items = [
            f"{_item_text(key, seen)}: {_item_text(item, seen)}" for key, item in value.items()
        ]
        digest.update(repr(sorted(items)).encode())
        return True
    if library in _HAVE_ARRAYS and hasattr(value, "shape") and hasattr(value, "dtype"):
        value, library = _as_array(value), "numpy"
    if library == "numpy" and hasattr(value, "dtype") and hasattr(value, "tobytes"):
        if value.dtype.hasobject:
            digest.update(
                repr([_item_text(item, seen) for item in value.ravel().tolist()]).encode()
            )
        else:
            digest.update(f"{value.dtype.str} {value.shape}".encode())
            digest.update(value.tobytes())
        return True
    is_frame = library == "pandas" and getattr(value, "ndim", 0) in {1, 2}
    if is_frame and hasattr(value, "to_frame" if value.ndim == 1 else "items"):
        _add_frame(digest, value.to_frame() if value.ndim == 1 else value, seen)
        return True
    if library == "scipy" and hasattr(value, "tocoo"):
        parts = value.tocoo()
        for part in (parts.row, parts.col, parts.data):
            digest.update(part.tobytes())
        return True
    if _parts(value, exactly=True):
        digest.update(_item_text(value, seen).encode(errors="surrogatepass"))
        return True
    is_reduced = library in _REDUCED and not isinstance(value, _COLLECTIONS)
    return is_reduced and not _is_scalar(value) and _add_reduced(digest, value, seen)


def _add_reduced(digest: Any, value: Any, seen: _Seen) -> bool:
    """Add to a digest what an object pickles to: a class or a function, and what it is given."""
    made_by = copyreg.dispatch_table.get(type(value))
    # protocol 5 would have objects that are buffers
    reduced = value.__reduce_ex__(4) if made_by is None else made_by(value)
    if isinstance(reduced, str):  # the name of something global
        return False
    kind, *given = reduced
    texts = [_item_text([*each] if isinstance(each, Iterator) else each, seen) for each in given]
    digest.update(repr((_text(kind), texts)).encode())
    return True


def _as_array(value: Any) -> Any:
    """Return what a tensor holds as a NumPy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if "bfloat16" in str(value.dtype) else value
    return value.numpy() if hasattr(value, "numpy") else sys.modules["numpy"].asarray(value)


def _add_frame(digest: Any, frame: Any, seen: _Seen) -> None:
    """Add a DataFrame's columns and index to a digest."""
    pandas = sys.modules["pandas"]
    columns = [("index", frame.index), *((repr(name), each) for name, each in frame.items())]
    for name, column in columns:
        digest.update(f"{name} {column.dtype} {len(column)}".encode())
        if pandas.api.types.infer_dtype(column).startswith("mixed"):
            digest.update(repr([_item_text(item, seen) for item in column]).encode())
        else:
            hashes = pandas.util.hash_pandas_object(column, index=False)
            digest.update(sys.modules["numpy"].asarray(hashes).tobytes())


def _item_text(item: Any, seen: _Seen) -> str:
    """Write an item of a collection so that equal ones have equal texts in every process."""
    is_row = type(item) in {tuple, list}
    if all(type(each) in _SIMPLE for each in (item if is_row else [item])):
        with contextlib.suppress(ValueError):  # too many digits
            return repr(item)
    parts = _parts(item, exactly=True)
    if parts and not isinstance(item, (list, tuple, Mapping)):
        number, before = len(seen), seen.get(id(item))
        if before is not None:
            return f"what was number {before[0]}"
        seen[id(item)] = (number, item)
    if parts:
        return repr([(label, _item_text(each, seen)) for label, each in parts])
    return _text(item) + _content(item, seen)


def _collection_text(value: Any) -> str:
    is_set = isinstance(value, (set, frozenset))
    if len(value) > _MAX_ITEMS:
        return f"a {type(value).__name__} of {len(value)} items"
    items = [_text(item) for item in value]
    if is_set:
        return "{" + ", ".join(sorted(items)) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(items) + "," * (len(items) == 1) + ")"
    return "[" + ", ".join(items) + "]"


def _type_text(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    if isinstance(value, types.ModuleType):
        return f"the module {value.__name__}"
    if isinstance(value, _REFERRED):
        return f"the function {_name(value)}"
    kind = type(value)
    library = kind.__module__.partition(".")[0]
    if library in {"numpy", "torch"} and {"dtype", "device"} & {
        each.__name__ for each in kind.mro()
    }:
        return str(value)
    text = f"of type {kind.__qualname__}"
    if library in _HAVE_SHAPES:
        with contextlib.suppress(Exception):  # it has none, or none yet
            text += f" and shape {tuple(int(length) for length in value.shape)}"
    return text


def _quoted(text: str, length: int | None = None, unit: str = "characters") -> str:
    if looks_secret(text):
        return _concealed(text)
    length = len(text) if length is None else length
    shown = repr(text[:MAX_TEXT])
    if length <= MAX_TEXT and len(shown) <= MAX_TEXT:
        return shown
    digest = _digest(text[:_HASHED_CHARACTERS] + text[-_HASHED_CHARACTERS:])
    return f"{shown[: MAX_TEXT // 2]}… ({length} {unit}, {digest})"


def _bounded(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[: MAX_TEXT // 2]}… ({len(text)} characters, {_digest(text)})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:8]


def _concealed(text: str) -> str:
    # Enough to notice another value, too little to guess the value with.
    return text if text.startswith(HIDDEN) else f"{HIDDEN} {_digest(text)[:4]}"


def may_be_secret(name: str, value: Any) -> bool:
    """Whether a name says that its value is a password, a token, a key or the like."""
    if value is None or isinstance(value, bool):
        return False
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name.partition(" of ")[0]).lower()
    # max_tokens=512 is none
    secret = _SURELY_SECRET if isinstance(value, (int, float)) else _SECRET_WORDS
    return not secret.isdisjoint(re.findall(r"[a-z]+", words))


def looks_secret(text: str) -> bool:
    """Whether a text has the form of a secret, or has one in it."""
    start = text[:20_000]
    return _SECRET_TEXT.search(start) is not None or _LOOKS_RANDOM.fullmatch(start) is not None


def _wrapped(called: Any) -> types.FunctionType | None:
    """Return the function in an object that ``functools.cache``, say, made of it."""
    inner = inspect.getattr_static(called, "__wrapped__", None)
    return inner if isinstance(inner, types.FunctionType) else None


def _name(called: Any) -> str:
    if isinstance(called, functools.partial):
        return _name(called.func)
    return str(getattr(called, "__qualname__", None) or type(called).__qualname__)


def _is_the_users(module: Any) -> bool:
    """Whether a module is the notebook, or a file that was not installed."""
    if module == "__main__":
        return True
    if not isinstance(module, str) or module.partition(".")[0] in _OURS | sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return isinstance(file, str) and not _is_installed(file)


@functools.lru_cache(maxsize=10_000)
def _is_installed(file: str) -> bool:
    return is_of_a_python(os.path.realpath(file))


def _is_generated(cls: type, method: types.FunctionType) -> bool:
    """Whether a method came with ``@dataclass``: the fields are told by themselves."""
    file = method.__code__.co_filename
    return dataclasses.is_dataclass(cls) and (file == "<string>" or _is_installed(file))


def _instructions(code: types.CodeType) -> list[dis.Instruction]:
    """Return code without what only says where it is written and what for."""
    found = [*dis.get_instructions(code)]
    stores_note = [each.opname == "STORE_NAME" and each.argval in _NOT_CODE for each in found]
    loads_note = [*stores_note[1:], False]
    return [
        each
        for each, stores, loads in zip(found, stores_note, loads_note, strict=True)
        if not (stores or loads)
    ]


def _code_text(code: types.CodeType) -> str:
    """Write code without its file, its lines, its docstring and its own name."""
    steps = [
        (each.opname, _constant_text(each.argval) if each.opcode in dis.hasconst else each.arg)
        for each in _instructions(code)
    ]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    return repr((counts, code.co_flags & _FLAGS, names, steps))


def _constant_text(constant: Any) -> str:
    if isinstance(constant, types.CodeType):
        return _code_text(constant)
    if isinstance(constant, tuple):
        return "(" + ", ".join(map(_constant_text, constant)) + ")"
    if isinstance(constant, frozenset):
        return "{" + ", ".join(sorted(map(_constant_text, constant))) + "}"
    return f"{type(constant).__name__} {constant!r}"


def _globals_of(code: types.CodeType) -> set[str]:
    """List the global names that code reads; an attribute of the same name is none."""
    found = set()
    for each in dis.get_instructions(code):
        if each.opname in {"LOAD_GLOBAL", "LOAD_NAME"}:
            found.add(str(each.argval))
        elif isinstance(each.argval, types.CodeType):
            found |= _globals_of(each.argval)
    return found


def _names_in(code: types.CodeType) -> set[str]:
    nested = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*map(_names_in, nested))
