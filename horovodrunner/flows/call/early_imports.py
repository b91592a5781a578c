"""Which frameworks main will import, found without running any of its code. Runs in: the driver.

What is read is bytecode: that in the pickle, and that of the user's own modules that it names.
Installed packages are not followed; a table says what the well-known ones import.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib
import importlib.util
import inspect
import io
import os
import pickle
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from horovodrunner.pickling.installed import holds_installed_packages, is_of_a_python

__all__ = ["early_imports", "early_imports_of_script"]

_IN_ORDER = (
    "numpy",
    "torch",
    "torch._dynamo",
    "horovod.torch",
    "tensorflow",
    "horovod.tensorflow",
    "horovod.tensorflow.keras",
)
"""Slow modules that a worker may import before it knows its rank; not Lightning, which notes it."""

_FRAMEWORKS = ("numpy", "torch", "tensorflow", "horovod")

_OURS = frozenset({"horovodrunner", "sparkdl", "petastorm", "pyspark", "py4j"})

_MEAN_TENSORFLOW = frozenset({"tf_keras", "tensorflow_datasets", "tensorflow_hub"})
_MEAN_TORCH = frozenset(
    {
        *("accelerate", "diffusers", "fastai", "ignite", "monai", "peft", "sentence_transformers"),
        *("timm", "torch_geometric", "torchaudio", "torchmetrics", "torchvision", "transformers"),
    }
)
_IMPORT_DYNAMO = frozenset({"lightning", "pytorch_lightning"})
_INSTALLED = frozenset(_FRAMEWORKS).union(_OURS, _MEAN_TENSORFLOW, _MEAN_TORCH, _IMPORT_DYNAMO)
"""Packages that are never followed, wherever they are."""

_OF_OPTIMIZERS = frozenset(
    {
        *("optim", "DistributedOptimizer", "DistributedDataParallel", "fully_shard", "backward"),
        *("Trainer", "TrainingArguments"),
    }
)
"""Names in code that trains: torch imports ``torch._dynamo`` when the first optimizer is made."""

_CHANGE_IMPORTS = frozenset(
    {
        *("putenv", "unsetenv", "setenv", "delenv", "monkeypatch", "load_dotenv"),
        *("meta_path", "path_hooks", "addsitedir", "setdlopenflags", "CDLL", "PyDLL"),
        *("import_module", "__import__", "reload", "exec_module", "exec", "run_path", "run_module"),
        *("set_start_method", "sched_setaffinity", "cpu_affinity"),
    }
)
"""Names in code after which importing a framework may give something else than before."""

_COME_FIRST = frozenset({"comet_ml", "ddtrace", "dotenv", "eventlet", "gevent"})
"""Packages that change what is imported after them."""

_VARIABLES = re.compile(
    r"(?:KERAS|TF|OMP|MKL|KMP|GOMP|OPENBLAS|NUMEXPR|CUDA|XLA|TORCH[A-Z]*|PYTORCH|LD)_"
)
"""How the names of environment variables begin that frameworks read when they are imported."""

_READS = frozenset({"get", "copy", "items", "keys", "values"})
"""Methods of ``os.environ`` that change nothing."""

_SILENT = frozenset(
    {
        *("CACHE", "COPY", "DUP_TOP", "EXTENDED_ARG", "NOP", "NOT_TAKEN", "PUSH_NULL", "RESUME"),
        *("SWAP", "TO_BOOL"),
    }
)
"""Instructions that may stand between two that belong together."""

_NO_OBSTACLES = frozenset({"benchmarks", "conftest", "docs", "examples", "setup", "test", "tests"})
"""Names that stand in many directories, and that no framework imports."""

_NESTED_PICKLE = re.compile(rb"\x80[\x02-\x05]")

_MAX_SOURCE_BYTES = 1024 * 1024
"""So much source is read; it takes half a second the first time."""


def early_imports(main: Callable[..., Any], payload: bytes) -> tuple[str, ...]:
    """Return the slow modules that a worker may import while its peers are being gathered.

    They come in an order in which it is safe to import them. There are none when the way of
    importing may matter to main: it or a module that it imports changes the environment or the
    import path, its code cannot be read, or a module of the user's hides an installed one.
    """
    try:
        importlib.invalidate_caches()  # a module may be new, or an archive another one
        search = _Search(_packages_of(main))
        search.follow(payload)
        found = search.frameworks()
        return () if found and _an_installed_module_is_hidden() else found
    except Exception:  # noqa: BLE001 - it is an acceleration, and code can be anything
        return ()


def early_imports_of_script(
    code: types.CodeType, directories: Sequence[str], module: str = ""
) -> tuple[str, ...]:
    """Return the same for a script, or a module that runs as one.

    `directories` come before all others when it imports.
    """
    try:
        importlib.invalidate_caches()
        search = _Search(frozenset([module.partition(".")[0]]), directories)
        search.follow_script(code, module)
        found = search.frameworks()
        return () if found and _an_installed_module_is_hidden(directories) else found
    except Exception:  # noqa: BLE001 - as above
        return ()


class _UnknownError(Exception):
    """What main does before it imports a framework is not known, or changes what it gets."""


class _Search:
    """Follows a pickled call through the user's own modules, and packages of `own`."""

    def __init__(self, own: frozenset[str], first: Sequence[str] = ()) -> None:
        self._own = own
        self._first = first
        self._imported: set[str] = set()
        self._named: set[str] = set()
        self._of_optimizers = set(_OF_OPTIMIZERS)
        self._later: dict[str, list[tuple[_Facts, str]]] = {}
        self._todo: list[tuple[_Facts, str]] = []
        self._bytes_left = _MAX_SOURCE_BYTES

    def follow(self, payload: bytes) -> None:
        """Read all that unpickling imports, and that the code in the pickle names."""
        nested = _NESTED_PICKLE.search(payload, 2)
        if nested is not None and payload.find(b"environ", nested.start()) >= 0:
            raise _UnknownError
        reader = _PickleReader(payload)
        reader.load()
        self._todo += [(_Facts(code, whole=True), "") for code in reader.codes]
        for module, name in reader.named:
            if _is_below(module, "torch.optim"):
                self._name(["optim"])
            self._name(name.split("."))
            self._import(module)
        while self._todo:
            self._take(*self._todo.pop())

    def follow_script(self, code: types.CodeType, module: str) -> None:
        """Read all that a script runs, and what it imports."""
        package = module.rpartition(".")[0]
        self._todo.append((_Facts(code, whole=True, is_main=True), package))
        if package:
            self._import(package)
        while self._todo:
            self._take(*self._todo.pop())

    def frameworks(self) -> tuple[str, ...]:
        """Return what is worth importing early of all that was found."""
        tops = {name.partition(".")[0] for name in self._imported}
        found = tops & {"numpy", "torch", "tensorflow"} | self._imported.intersection(_IN_ORDER)
        if tops & _MEAN_TENSORFLOW:
            found.add("tensorflow")
        if "tensorflow" not in found and tops & (_MEAN_TORCH | _IMPORT_DYNAMO):
            found.add("torch")
        trains = self._named & self._of_optimizers or tops & _IMPORT_DYNAMO
        if trains and found & {"torch", "horovod.torch"}:
            found.add("torch._dynamo")
        return tuple(name for name in _IN_ORDER if name in found)

    def _take(self, facts: _Facts, package: str) -> None:
        if facts.changes_imports:
            raise _UnknownError
        for name, function in facts.later:
            waiting = self._todo if name in self._named else self._later.setdefault(name, [])
            waiting.append((function, package))
        for level, module, names in facts.imports:
            base = importlib.util.resolve_name("." * level + module, package)
            self._import(base)
            for name in names:
                self._import(f"{base}.{name}")
            if _is_below(base, "torch.optim"):
                self._of_optimizers.update(names)
                if "*" in names:
                    self._name(["optim"])
        self._name(facts.names)

    def _name(self, names: Iterable[str]) -> None:
        """Read the functions and classes of these names, in whatever module they are."""
        for name in set(names) - self._named:
            self._named.add(name)
            self._todo += self._later.pop(name, [])

    def _import(self, module: str) -> None:
        """Follow a module, and the packages that are imported before it, if they are the user's."""
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            if name in self._imported:
                continue
            self._imported.add(name)
            if parts[0] in _COME_FIRST:
                raise _UnknownError
            if parts[0] in _INSTALLED | sys.stdlib_module_names | {"__main__", ""}:
                continue
            spec = _spec_of(name, self._first)
            if spec is not None and (parts[0] in self._own or not _is_installed(parts[0], spec)):
                is_package = spec.submodule_search_locations is not None
                package = name if is_package else name.rpartition(".")[0]
                self._todo.append((self._facts_of_module(spec), package))

    def _facts_of_module(self, spec: ModuleSpec) -> _Facts:
        if spec.origin is None:  # a directory without __init__.py
            return _facts_of_source(b"")
        loader: Any = spec.loader
        if spec.origin.endswith(".py") and (path := Path(spec.origin)).is_file():
            source = path.read_bytes()
        elif (text := loader.get_source(spec.name)) is not None:
            source = text.encode()
        elif (code := loader.get_code(spec.name)) is not None:
            return _Facts(code, whole=False)
        else:
            raise _UnknownError
        self._bytes_left -= len(source)
        if self._bytes_left < 0:
            raise _UnknownError
        return _facts_of_source(source)


class _Inert(type):
    """Stands for everything that a pickle names; whatever is done with it, nothing happens."""

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return cls

    def __setitem__(cls, _: Any, __: Any) -> None:
        pass

    def _ignore(cls, *_: Any) -> None:
        pass

    append = extend = add = __setstate__ = _ignore


class _Nothing(metaclass=_Inert):
    def __new__(cls, *_: Any, **__: Any) -> Any:
        return cls


class _PickleReader(pickle.Unpickler):
    """Collects what a pickle names and the code in it, and makes nothing of it."""

    def __init__(self, payload: bytes) -> None:
        super().__init__(io.BytesIO(payload))
        self.named: set[tuple[str, str]] = set()
        self.codes: list[types.CodeType] = []

    def find_class(self, module: str, name: str) -> Any:
        """Note a name instead of importing it."""
        if name == "subimport":
            return self._note_module
        if name == "_builtin_type":
            return lambda builtin: self._code if builtin == "CodeType" else _Nothing
        if (module, name) == ("types", "CodeType"):
            return self._code
        self.named.add((module, name))
        return _Nothing

    def _note_module(self, module: str) -> Any:
        self.named.add((module, ""))
        return _Nothing

    def _code(self, *fields: Any) -> types.CodeType:
        code = types.CodeType(*fields)
        self.codes.append(code)
        return code


@functools.lru_cache(maxsize=1024)
def _facts_of_source(source: bytes) -> _Facts:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Facts(compile(source, "a module", "exec", dont_inherit=True), whole=False)


def _instructions_of(code: types.CodeType) -> Iterator[dis.Instruction]:
    for each in dis.get_instructions(code):
        if each.opname in _SILENT:
            continue
        if "_FAST_" in each.opname and isinstance(each.argval, tuple):  # two in one, since 3.13
            first, second = each.argval
            for name, is_stored in (
                (first, each.opname.startswith("STORE")),
                (second, each.opname.endswith("STORE_FAST")),
            ):
                yield each._replace(opname="STORE_FAST" if is_stored else "LOAD_FAST", argval=name)
            continue
        yield each


class _Facts:
    """What a piece of code imports and names, with what is in it and runs with it.

    Functions in a function count as a part of it; functions of a module, unless it is wanted
    whole, as what may be called later.
    """

    def __init__(self, code: types.CodeType, *, whole: bool, is_main: bool = False) -> None:
        self._is_main = is_main
        self.imports: list[tuple[int, str, tuple[str, ...]]] = []
        """Level, module and names of each import statement."""
        self.names: set[str] = set()
        self.later: list[tuple[str, _Facts]] = []
        """Functions, and methods of classes, that run only where their name is used."""
        self.changes_imports = any(map(_VARIABLES.match, code.co_varnames))
        """Whether it, or anything in it, changes what an import gives."""
        self._found = list(_instructions_of(code))
        self._read(code, whole=whole)
        self._found = []  # facts of modules are kept

    def _read(self, code: types.CodeType, *, whole: bool) -> None:
        skipped_until = -1
        for index, each in enumerate(self._found):
            if each.offset < skipped_until:
                continue
            if "IF_FALSE" in each.opname and self._is_never_true_in_a_worker(index):
                skipped_until = each.argval
            elif each.opname == "IMPORT_NAME":
                self._take_import(index)
            elif each.opname == "IMPORT_FROM":
                self._take_imported_name(index)
            elif each.opname in ("LOAD_CONST", "KW_NAMES"):
                assert each.arg is not None  # noqa: S101 - the constant's number
                constant = code.co_consts[each.arg]
                if isinstance(constant, types.CodeType):
                    self._take_code(constant, whole=whole)
                else:
                    self._take_constant(index, constant)
            elif each.opname.startswith("LOAD_") and isinstance(each.argval, str):
                self._take_name(index, each.argval)

    def _take_code(self, code: types.CodeType, *, whole: bool) -> None:
        is_function = bool(code.co_flags & inspect.CO_OPTIMIZED)
        inner = _Facts(code, whole=whole or is_function, is_main=self._is_main)
        self.changes_imports |= inner.changes_imports
        if is_function and not whole:
            self.later.append((code.co_name, inner))
        else:
            self.imports += inner.imports
            self.names |= inner.names
            self.later += [(code.co_name, method) for _, method in inner.later]

    def _is_never_true_in_a_worker(self, index: int) -> bool:
        """Whether a jump is that of ``if TYPE_CHECKING`` or of ``if __name__ == "__main__"``."""
        before = [self._value(each) for each in range(max(0, index - 3), index)]
        if before[-1:] == ["TYPE_CHECKING"]:
            return True
        return not self._is_main and all(each in before for each in ("__name__", "__main__"))

    def _take_import(self, index: int) -> None:
        module, level, names = (self._value(index - back) for back in (0, 2, 1))
        self.imports.append((level, module, tuple(names or ())))
        # by another name it is not looked for
        is_renamed = not names and self._value(index + 1) != module
        if module.partition(".")[0] in _COME_FIRST or (module in ("os", "sys") and is_renamed):
            self.changes_imports = True

    def _take_imported_name(self, index: int) -> None:
        name = self._value(index)
        module = self.imports[-1][1] if self.imports else ""
        is_renamed = self._value(index + 1) != name
        if is_renamed:  # or else it counts where it is used
            self.names.add(name)
        if (
            name in _CHANGE_IMPORTS
            or (module == "sys" and name in ("path", "modules"))
            or (module == "os" and name in ("environ", "environb") and is_renamed)
        ):
            self.changes_imports = True

    def _take_constant(self, index: int, value: object) -> None:
        words = value if isinstance(value, (tuple, frozenset)) else (value,)
        if any(isinstance(word, str) and _VARIABLES.match(word) for word in words):
            before = [self._value(each) for each in range(max(0, index - 3), index)]
            self.changes_imports |= "environ" not in before and "getenv" not in before
        self.changes_imports |= value == "environ"

    def _take_name(self, index: int, name: str) -> None:
        self.names.add(name)
        of_sys = name in ("path", "modules") and index and self._value(index - 1) == "sys"
        if name in _CHANGE_IMPORTS or (
            (of_sys or name in ("environ", "environb")) and not self._is_only_read(index)
        ):
            self.changes_imports = True

    def _is_only_read(self, index: int) -> bool:
        """Whether what an instruction loads is a mapping or list of which one item is read."""
        after = self._found[index + 1 : index + 3]
        if not after:
            return False
        if after[0].opname in ("LOAD_ATTR", "LOAD_METHOD"):
            return after[0].argval in _READS
        if after[0].opname in ("CONTAINS_OP", "DICT_UPDATE"):
            return True
        return after[0].opname.startswith("LOAD_") and (
            after[-1].opname == "BINARY_SUBSCR" or after[-1].argrepr == "[]"
        )

    def _value(self, index: int) -> Any:
        return self._found[index].argval if index < len(self._found) else None


def _packages_of(main: Any) -> frozenset[str]:
    """Return the packages that main itself comes from, whatever is wrapped around it."""
    found = set()
    wrapped: list[Any] = [main]
    for thing in wrapped:
        if len(wrapped) < 100:  # a wrapper may name itself
            inner = (getattr(thing, name, None) for name in ("func", "__wrapped__", "__self__"))
            wrapped += [each for each in inner if each is not None]
        for named in (thing, type(thing)):
            found.add(str(getattr(named, "__module__", None) or "").partition(".")[0])
    return frozenset(found)


def _spec_of(name: str, first: Sequence[str] = ()) -> ModuleSpec | None:
    """Find a module without importing it, or the package that it is in.

    `first` are directories in which modules are looked for before ``sys.path``.
    """
    path: Sequence[str] | None = None
    parent = name.rpartition(".")[0]
    if not parent and first and (found := PathFinder.find_spec(name, first)) is not None:
        return found
    if parent:
        parent_spec = _spec_of(parent, first)
        if parent_spec is None or parent_spec.submodule_search_locations is None:
            return None
        path = list(parent_spec.submodule_search_locations)
    for finder in sys.meta_path:
        with contextlib.suppress(Exception):  # somebody's import hook
            if (spec := finder.find_spec(name, path)) is not None:
                return spec
    return None


def _is_installed(top: str, spec: ModuleSpec) -> bool:
    if spec.origin is None:
        return False
    if is_of_a_python(spec.origin):
        return True
    root = Path(spec.origin)
    for _ in range(spec.name.count(".") + (1 if spec.submodule_search_locations is None else 2)):
        root = root.parent
    return any(root.glob(f"{top}-*.dist-info"))  # by ``pip install --target``


def _an_installed_module_is_hidden(first: Sequence[str] = ()) -> bool:
    """Return whether a module of the user's would be imported instead of an installed one.

    Frameworks may import it, too; and a worker may learn only later where it is.
    """
    installed = {*sys.stdlib_module_names, *_FRAMEWORKS}
    for entry in reversed([entry or os.getcwd() for entry in [*first, *sys.path]]):  # noqa: PTH109
        try:
            files = os.listdir(entry)  # noqa: PTH208
        except OSError:  # an archive, or not there
            continue
        names = {
            file.partition(".")[0]
            for file in files
            if "." not in file or file.endswith((".py", ".pyc", ".so"))
        }
        if holds_installed_packages(entry):
            installed |= names
        elif any(_is_module(entry, name) for name in names & installed - _NO_OBSTACLES - _OURS):
            return True
    return False


def _is_module(entry: str, name: str) -> bool:
    path = Path(entry, name)
    return not path.is_dir() or (path / "__init__.py").exists()


def _is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")
