"""A script that runs as ``__main__`` of a rank, as ``python train.py`` would. Runs in: the worker.

On Spark it runs in a copy of the driver's code directory, which lies in the task's own directory
and goes with it.
"""

# Entries of sys.path and of the environment are text.
# ruff: noqa: PTH109, PTH112, PTH118

from __future__ import annotations

import builtins
import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from horovodrunner.flows.call.import_path import before_stdlib
from horovodrunner.flows.outcome.worker import show_paths_as

__all__ = ["Script"]

_MAX_NAMED = 5


@dataclass(frozen=True)
class Script:
    """A script or module with its arguments; calling it runs it."""

    name: str
    """As it was given: ``train.py``, or ``-m pkg.train``."""
    root: str
    """The code directory on the driver."""
    arguments: tuple[str, ...] = ()
    file: str = ""
    """Relative to the code directory, or where it is, if it runs in place; "" for a module."""
    module: str = ""
    import_from: str = "."
    """Where imports look first, relative to the code directory."""
    working_directory: str = "."
    """Where the driver is, relative to the code directory."""
    archive: bytes | None = field(default=None, repr=False)
    """The code directory as a tar file; None where the script runs in place."""

    def __post_init__(self) -> None:
        vars(self)["__qualname__"] = self.name  # as for functions

    def __call__(self) -> None:
        """Run it in this process, which is its own."""
        if self.archive is None:
            self._run(self.root)
            return
        root = self._enter_copy(self.archive)
        before = _files_in(root)
        try:
            self._run(root)
        finally:
            with contextlib.suppress(Exception):  # a note is worth no failure
                _note_lost_files(root, before)

    def _run(self, root: str) -> None:
        sys.path.insert(0, os.path.normpath(os.path.join(root, self.import_from)))
        if self.module:
            sys.path.insert(0, os.getcwd())  # as `python -m` does
            self._run_module()
        else:
            self._run_file(os.path.join(root, self.file))

    def _run_file(self, path: str) -> None:
        typed = self.name if _is_same(self.name, path) else path
        self._set_arguments(typed, [typed])
        code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
        _run_as_main(code, __file__=path, __loader__=SourceFileLoader("__main__", path))

    def _run_module(self) -> None:
        spec = importlib.util.find_spec(self.module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{self.module}.__main__")
        loader: Any = spec and spec.loader
        code = loader and loader.get_code(spec.name)  # type: ignore[union-attr]
        if spec is None or code is None:
            raise ModuleNotFoundError(f"No module named {self.module}", name=self.module)
        self._set_arguments(spec.origin or self.module, ["-m", self.module])
        _run_as_main(
            code,
            __file__=spec.origin,
            __cached__=spec.cached,
            __loader__=loader,
            __package__=spec.parent,
            __spec__=spec,
        )

    def _set_arguments(self, first: str, typed: list[str]) -> None:
        sys.argv[:] = [first, *self.arguments]
        sys.orig_argv[:] = [sys.executable, *typed, *self.arguments]

    def _enter_copy(self, archive: bytes) -> str:
        """Unpack the code, go to where the driver is in it, and import from there."""
        from horovodrunner.processes.worker.context import inherited_context

        context = inherited_context()
        assert context is not None  # noqa: S101 - a copy is run by workers only
        root = _unpack(archive, Path(context.spec.scratch), Path(self.root).name or "root")
        show_paths_as(root, self.root)
        directory = os.path.join(root, self.working_directory)
        os.chdir(directory if os.path.isdir(directory) else root)
        os.environ["PWD"] = os.getcwd()
        sys.path[:] = dict.fromkeys(_moved(sys.path, self.root, root))
        os.environ["PYTHONPATH"] = os.pathsep.join(before_stdlib(sys.path))
        return root


def _run_as_main(code: CodeType, **attributes: object) -> None:
    module = ModuleType("__main__")
    vars(module).update({"__builtins__": builtins, "__cached__": None, **attributes})
    sys.modules["__main__"] = module
    exec(code, vars(module))  # noqa: S102 - that is what it is for


def _unpack(archive: bytes, scratch: Path, name: str) -> str:
    """Return the copy of the code directory; the ranks of one task share it."""
    import tarfile
    import tempfile

    code = scratch / "code"
    if not code.is_dir():
        made = Path(tempfile.mkdtemp(prefix="code-", dir=scratch))
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            # a safeguard of newer Pythons; the archive itself comes with the run's secret
            trusted = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(made / name, **trusted)  # type: ignore[arg-type]  # noqa: S202
        with contextlib.suppress(OSError):  # another rank of this task was faster
            made.rename(code)
    return str(code / name)


def _files_in(root: str) -> set[tuple[str, int]]:
    """Return the files of a directory, and when they were changed."""
    found = set()
    for directory, _, names in os.walk(root):
        if Path(directory).name != "__pycache__":
            paths = (os.path.join(directory, name) for name in names)
            found |= {(os.path.relpath(each, root), os.lstat(each).st_mtime_ns) for each in paths}
    return found


def _note_lost_files(root: str, before: set[tuple[str, int]]) -> None:
    """Name the files that go with the copy: from a shell they would have stayed."""
    from horovodrunner.processes.worker.context import notice

    written = sorted(name for name, _ in _files_in(root) - before)
    if written:
        shown = ", ".join(written[:_MAX_NAMED])
        more = f" and {len(written) - _MAX_NAMED} more" if len(written) > _MAX_NAMED else ""
        notice(
            "files in the copy of the code",
            f"{shown}{more}: written into a copy of the code directory, which is deleted with "
            "the run: write to a full path that outlasts it, or use artifacts.path() or "
            "checkpoint.save()",
        )


def _moved(path: Iterable[str], original: str, copy: str) -> Iterable[str]:
    """Replace directories of the driver's code by those of its copy."""
    for entry in path:
        if entry == original or entry.startswith(original.rstrip(os.sep) + os.sep):
            yield os.path.normpath(os.path.join(copy, os.path.relpath(entry, original)))
        else:
            yield entry


def _is_same(typed: str, path: str) -> bool:
    try:
        return Path(typed).samefile(path)
    except OSError:
        return False
