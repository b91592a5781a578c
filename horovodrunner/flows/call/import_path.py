"""Where modules are looked for, and in which order. Runs in: every process.

main is to import the modules that it imports in the notebook. So what the user has in front of the
installed packages is in front of them in the worker, too, while the packages themselves are those
of the worker's own Python.
"""

# Entries of sys.path are text, and need not be paths.
# ruff: noqa: PTH100, PTH109, PTH110, PTH113, PTH117, PTH119, PTH120

from __future__ import annotations

import contextlib
import functools
import os
import re
import site
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from horovodrunner.pickling.installed import is_of_a_python

__all__ = ["ImportPath", "before_stdlib", "of_worker", "start_command"]

_ADDED_FILES = re.compile(r"/userFiles-[0-9a-f]{8}-[0-9a-f-]{27}(?=/|$)")
"""Where Spark's driver keeps what is added to a session (addPyFile); an executor's are in its own
working directory."""

_STDLIB = os.path.dirname(os.__file__)
_STDLIB_ZIP = f"python{sys.version_info.major}{sys.version_info.minor}.zip"


@dataclass(frozen=True)
class ImportPath:
    """A process's import path without the directories of its Python itself."""

    first: tuple[str, ...] = ()
    before_packages: tuple[str, ...] = ()
    last: tuple[str, ...] = ()

    @classmethod
    def of_this_process(cls) -> ImportPath:
        """Split this process's ``sys.path``."""
        entries = _absolute(_with_earlier_directories(sys.path))
        stdlib, packages = _boundaries(entries)
        middle, last = entries[stdlib:packages], entries[packages:]
        return cls(
            first=tuple(e for e in entries[:stdlib] if not _is_own(e)),
            before_packages=tuple(e for e in middle if not _is_own(e)),
            # Packages of another Python, which came with this one, may not fit the executor's.
            last=tuple(e for e in last if not _is_own(e) and not is_of_a_python(e)),
        )


def of_worker(users: ImportPath, own: Iterable[object]) -> list[str]:
    """Put the user's directories in their places in a worker's import path."""
    entries = _absolute(own)
    stdlib, _ = _boundaries(entries)
    added = {os.path.basename(e): e for e in entries[:stdlib] if os.path.isfile(e)}

    def place_of(entry: str) -> str | None:
        if entry in entries:
            return entry
        is_added = _ADDED_FILES.search(entry)
        if is_added and is_added.end() == len(entry):
            return os.getcwd() if os.getcwd() in entries else None
        if is_added or not _exists(entry):
            return added.get(os.path.basename(entry))
        return entry

    def here(lent: Sequence[str]) -> list[str]:
        places = (place_of(entry) for entry in lent)
        return list(dict.fromkeys(place for place in places if place is not None))

    first, middle = here(users.first), here(users.before_packages)
    middle = [e for e in middle if e not in first]
    rest = [e for e in entries if e not in first and e not in middle]
    _, packages = _boundaries(rest)
    path = [*first, *rest[:packages], *middle, *rest[packages:]]
    return [*path, *(e for e in here(users.last) if e not in path)]


def before_stdlib(path: Sequence[str]) -> list[str]:
    """Return what a child's ``PYTHONPATH`` has to be: the rest its own Python adds."""
    return list(path[: _boundaries(path)[0]])


def start_command(module: str) -> list[str]:
    """Return the command that runs a module which this process can import.

    The directories of the user must not get in the way of a start: a ``queue.py`` among them, or
    in the working directory, would be taken for the standard library's.
    """
    entries = _absolute(sys.path)
    loaded = [sys.modules.get(name) for name in (module.partition(".")[0], "cloudpickle")]
    roots = [os.path.dirname(os.path.dirname(m.__file__)) for m in loaded if m and m.__file__]
    path = list(dict.fromkeys([*filter(_is_stdlib, entries), *roots, *entries]))
    source = (
        f"import sys; sys.path[:] = {path!a}; import runpy; "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", source]


def _absolute(path: Iterable[object]) -> list[str]:
    """Return a path's entries once each, those that mean a directory in full."""
    entries = (entry for entry in path if isinstance(entry, str))  # Python ignores others, too
    try:
        os.getcwd()
    except OSError:  # somebody has deleted it: what is relative to it is nowhere
        entries = (e for e in entries if e and (os.path.isabs(e) or not os.path.exists(e)))
    # What names no file belongs to a hook (sys.path_hooks), which knows what it means.
    full = (os.path.abspath(e) if not e or os.path.exists(e) else e for e in entries)
    return list(dict.fromkeys(full))


def _with_earlier_directories(path: Sequence[object]) -> list[object]:
    """Put the directories that relative entries meant before ``os.chdir`` in front of them.

    Modules that were imported from there are those that the notebook goes on using.
    """
    relative = [e for e in path if isinstance(e, str) and not os.path.isabs(e)]
    first = next((e for e in relative if not e or os.path.exists(e)), None)
    if first is None:
        return [*path]
    known = {os.path.realpath(e) for e in _absolute(path) if os.path.isabs(e)}
    earlier = dict[str, None]()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if "." in name or not isinstance(file, str) or name == "__main__":
            continue
        directory, base = os.path.split(file)
        if base == "__init__.py":
            directory = os.path.dirname(directory)
        is_known = os.path.realpath(directory) in known or is_of_a_python(directory)
        if not is_known and os.path.isabs(file) and not _is_found(name, file):
            earlier[directory] = None
    return [*path[: path.index(first)], *earlier, *path[path.index(first) :]]


def _is_found(name: str, file: str) -> bool:
    """Whether an import finds the same file now: an editable install has a finder of its own."""
    for finder in sys.meta_path:
        with contextlib.suppress(Exception):  # it is somebody else's
            spec = finder.find_spec(name, None)
            if spec is not None:
                return spec.origin == file
    return False


def _boundaries(entries: Sequence[str]) -> tuple[int, int]:
    """Return where the standard library begins, and where the installed packages do."""
    indices = range(len(entries))
    stdlib = next((i for i in indices if _is_stdlib(entries[i])), len(entries))
    own = (i for i in indices[stdlib:] if _is_own(entries[i]) and not _is_stdlib(entries[i]))
    return stdlib, next(own, len(entries))


def _is_stdlib(entry: str) -> bool:
    name = os.path.basename(entry)
    is_inside = entry == _STDLIB or entry.startswith(_STDLIB + os.sep)
    return (is_inside and not name.endswith("-packages")) or name == _STDLIB_ZIP


def _is_own(entry: str) -> bool:
    """Whether a directory is there because of the Python that runs, not of the user."""
    return (
        _is_stdlib(entry) or entry.startswith(_STDLIB + os.sep) or entry in _package_directories()
    )


@functools.cache
def _package_directories() -> frozenset[str]:
    return frozenset([*site.getsitepackages(), site.getusersitepackages()])


def _exists(entry: str) -> bool:
    """Whether there is such a directory or archive; modules may lie deeper in an archive."""
    path = Path(entry)
    return path.exists() or any(parent.is_file() for parent in path.parents)
