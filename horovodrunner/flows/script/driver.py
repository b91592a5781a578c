"""Makes a script ready to travel, or refuses it. Runs in: the driver."""

from __future__ import annotations

import errno
import hashlib
import importlib
import os
import shlex
import sys
import types
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from decimal import Decimal
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError, ConfigurationError
from horovodrunner.flows.call.driver import PickledCall
from horovodrunner.flows.call.early_imports import early_imports_of_script
from horovodrunner.flows.call.record import MAX_ENTRIES, RunRecord
from horovodrunner.flows.script.worker import Script
from horovodrunner.pickling import payload
from horovodrunner.pickling.installed import is_of_a_python

__all__ = ["ScriptCall", "prepare_script"]


class ScriptCall(Script):
    """A script as the driver knows it; what travels of it is a :class:`Script`."""

    code: types.CodeType
    left_out: Sequence[str] = ()

    def __reduce__(self) -> Any:
        return Script, tuple(getattr(self, each.name) for each in fields(Script))

    @property
    def what(self) -> str:
        """What its pickle's size is the size of, with the verb."""
        if self.archive is None:
            return f"{self.name} and its arguments have, pickled,"
        return f"{self.name} and its code directory {self.root} have, packed,"

    def pickle(self) -> PickledCall:
        """Pickle it so that it finds a fresh process, as from a shell."""
        content = payload.dump_call(self, {}, with_settings=False)
        return PickledCall(content, self._early_imports())

    def advice(self) -> str:
        """Name what is largest in the code directory."""
        from horovodrunner.flows.script.packing import largest_entries

        return (
            f". Largest, before they were packed: {largest_entries(self.archive or b'')}. Name a "
            "directory that has only the code with code_dir="
        )

    def record(self, run_id: str, size: int, *, exactly: bool = False) -> RunRecord:
        """Record what a run calls; `exactly` with the modules that lie beside the script."""
        from horovodrunner.flows.call.recording import record_script

        arguments: dict[str, Any] = self.named_arguments
        if exactly:  # `--names a b` is not `--names "a b"`, nor is `--name given` the same as alone
            arguments = {name: shlex.join(words) or True for name, words in self._named().items()}
        record = record_script(run_id, size, self.name, arguments, self.code, exactly=exactly)
        if not exactly:
            return record
        from horovodrunner.flows.script.packing import digests_of_modules

        modules = digests_of_modules(Path(self.root), self.left_out)
        own = Path(self.root, self.file)
        modules.pop(
            _inside(self.root, own, self.name), None
        )  # its code counts, its comments do not
        if len(modules) > MAX_ENTRIES // 2:
            modules = {"what lies beside it": _digest(repr(sorted(modules.items())))}
        return replace(record, code={**record.code, **modules})

    @property
    def named_arguments(self) -> dict[str, str]:
        """Its arguments by name, for records: ``--epochs 3`` as ``{"epochs": "3"}``."""
        return {name: " ".join(words) or "given" for name, words in self._named().items()}

    def _named(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        name, position = "", 0
        for word in self.arguments:
            if word.startswith("-") and not _is_number(word) and word.strip("-"):
                option, equals, value = word.partition("=")
                name = option.lstrip("-")
                found.setdefault(name, []).extend([value] if equals else [])
                name = "" if equals else name
            elif name:
                found[name].append(word)
            else:
                position += 1
                found[f"argument {position}"] = [word]
        return found

    def _early_imports(self) -> tuple[str, ...]:
        """Return the slow modules that the workers may import before they run it."""
        first = [str(Path(self.root, self.import_from))]
        if self.module:
            first.insert(0, os.getcwd())  # noqa: PTH109
        return early_imports_of_script(self.code, first, self.module)


def prepare_script(
    script: Any, arguments: Sequence[Any], code_dir: Any, *, travels: bool, left_out: Sequence[str]
) -> ScriptCall:
    """Check a script and its arguments, and pack the code beside it if it is to travel.

    `left_out` are directories that do not travel, though they may lie in the code directory.
    """
    name = checked.path("script", script)
    top: str | None
    if name == "-m":
        if not arguments:
            raise ArgumentTypeError(
                'run_script("-m") lacks the module: run_script("-m", "package.train")'
            )
        module, *arguments = arguments
        module = checked.text("the module after -m", module)
        call = f"-m {module}"
        origin, top = _find_module(module)
    else:
        module, call = "", name
        origin = _find_script(name)
        top = str(_directory_of_script(origin, code_dir))
    words = tuple(_word(place, each) for place, each in enumerate(arguments, start=1))
    code = _compiled(origin, call)
    root = _code_directory(code_dir, top or os.getcwd())  # noqa: PTH109
    is_here = top is not None or code_dir is not None
    file = "" if module else _inside(root, origin, call)
    made = ScriptCall(
        call,
        root,
        words,
        file=str(origin) if origin.is_symlink() and not (module or travels) else file,
        module=module,
        import_from="." if top is None else _inside(root, Path(top), call),
        working_directory=_working_directory(root),
        archive=_packed(root, left_out) if travels and is_here else None,
    )
    vars(made).update(code=code, left_out=left_out)
    return made


def _packed(root: str, left_out: Sequence[str]) -> bytes:
    from horovodrunner.flows.script.packing import pack  # functions travel without it

    return pack(Path(root), left_out)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def _find_script(name: str) -> Path:
    path = Path(os.path.abspath(name))  # noqa: PTH100 - __file__ names a link, not its end
    try:
        path.stat()
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENOTDIR}:
            raise ArgumentValueError(
                f"script={checked.shown(name)} cannot be read: {error.strerror}"
            ) from None
    if path.is_dir():
        if not (path / "__main__.py").is_file():
            raise ArgumentValueError(
                f"script={name!r} is a directory without a __main__.py: give the script in it, or "
                'run_script("-m", "package.module")'
            )
        path /= "__main__.py"
    if not path.is_file():
        words = name.split()
        advice = f"there is no such file in {os.getcwd()}"  # noqa: PTH109
        if len(words) > 1 and Path(words[0]).is_file():
            advice = f"give its arguments one by one, run_script({', '.join(map(repr, words))})"
        elif path.exists():
            advice = "it is no regular file"
        raise ArgumentValueError(f"script={name!r}: {advice}")
    if path.suffix == ".ipynb":
        raise ArgumentValueError(
            f"script={name!r} is a notebook: run a function of it, run(train), or make a script "
            f"of it with `jupyter nbconvert --to script {name}`"
        )
    return path


def _directory_of_script(origin: Path, code_dir: Any) -> Path:
    """Return where the script's imports look first: beside the file that a link leads to."""
    real = origin.resolve().parent
    is_out = code_dir is not None and not real.is_relative_to(Path(str(code_dir)).resolve())
    return origin.parent if is_out or not origin.is_symlink() else real


def _find_module(module: str) -> tuple[Path, str | None]:
    """Find a module's file without importing it, and the directory that its package lies in.

    The directory is None for what is installed, which the executors have, too.
    """
    importlib.invalidate_caches()
    spec: ModuleSpec | None = None
    places: list[str] | None = None
    wanted = "give a name as `python -m` takes it, package.module"
    if not all(part.isidentifier() for part in module.split(".")):
        raise ArgumentValueError(f"-m {module}: {wanted}")
    names = module.split(".")
    for count in range(1, len(names) + 1):
        spec = _spec(".".join(names[:count]), places)
        if spec is None:
            break
        places = list(spec.submodule_search_locations or ())
        if count < len(names) and spec.submodule_search_locations is None:
            spec = None
            break
    if spec is not None and spec.submodule_search_locations is not None:
        spec = _spec(f"{module}.__main__", places)
        if spec is None:
            raise ArgumentValueError(
                f"-m {module}: it is a package without a __main__.py; name a module in it"
            )
        names.append("__main__")
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ArgumentValueError(
            f"-m {module}: there is no such module in {os.getcwd()} or in sys.path; {wanted}"  # noqa: PTH109
        )
    origin = Path(os.path.abspath(spec.origin))  # noqa: PTH100
    if is_of_a_python(str(origin)):
        return origin, None
    return origin, str(origin.parents[len(names) - 1])


def _spec(name: str, places: Sequence[str] | None) -> ModuleSpec | None:
    if places is not None:
        return PathFinder.find_spec(name, places)
    here = PathFinder.find_spec(name, [os.getcwd()])  # noqa: PTH109 - as `python -m` does
    if here is not None and here.loader is not None:
        return here
    for finder in sys.meta_path:
        if (spec := finder.find_spec(name, None)) is not None:
            return spec
    return here


def _compiled(path: Path, call: str) -> types.CodeType:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ArgumentValueError(f"{call} cannot be read: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the ranks show them
            return compile(source, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        line = f"\n    {error.text.strip()}" if error.text else ""
        raise ConfigurationError(
            f"{call} is no Python that can be run: {type(error).__name__}: {error.msg} "
            f"({path}{where}){line}"
        ) from None
    except ValueError as error:  # null bytes, before Python 3.12
        raise ConfigurationError(f"{call} is no Python that can be run: {error} ({path})") from None


def _word(place: int, value: Any) -> str:
    """Return an argument as a command line has it."""
    found = checked.plain(value)
    name = f"argument {place} of the script, {checked.shown(value)}"
    if isinstance(found, str):
        word = str.__str__(found)
    elif isinstance(found, bool) or not isinstance(found, (int, float, Decimal, os.PathLike)):
        instead = "give words, numbers or paths, one by one"
        if isinstance(found, (list, tuple)):
            instead = "give its items one by one, with a * before it: run_script(script, *words)"
        elif isinstance(found, bool):
            instead = f"give the option alone, or the text {str(found)!r}"
        raise ArgumentTypeError(f"{name}: a command line has no {type(value).__name__}; {instead}")
    else:
        word = os.fspath(found) if isinstance(found, os.PathLike) else str(found)
        if not isinstance(word, str):
            raise ArgumentTypeError(f"{name}: a path of bytes; give a str")
    if "\0" in word:
        raise ArgumentValueError(f"{name}: an argument has no null character")
    return word


def _code_directory(code_dir: Any, default: str) -> str:
    if code_dir is None:
        return default
    given = checked.path("code_dir", code_dir)
    if not Path(given).is_dir():
        raise ArgumentValueError(f"code_dir={given!r}: it must be a directory of this machine")
    return os.path.abspath(given)  # noqa: PTH100


def _inside(root: str, path: Path, call: str) -> str:
    for start, full in ((Path(root), path), (Path(root).resolve(), path.resolve())):
        if full.is_relative_to(start):
            return str(full.relative_to(start))
    raise ArgumentValueError(
        f"code_dir={root!r}: {call} ({path}) is not in it; name a directory that it is in"
    )


def _working_directory(root: str) -> str:
    """Return where this process is within the code directory, or its top."""
    try:
        here = Path.cwd()
    except OSError:  # somebody has deleted it
        return "."
    top = Path(root).resolve()
    return str(here.relative_to(top)) if here.is_relative_to(top) else "."


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
