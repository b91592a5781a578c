"""``__main__`` as main finds it, and as processes find it that main starts. Runs in: the worker.

multiprocessing has a child that does not fork import the module that ``__main__.__spec__`` names.
That is processes/worker/spawned.py here, and it reads what ``__main__`` held from a file in memory.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from horovodrunner.pickling.modules import dump_names, names_by_value, place_in
from horovodrunner.placement.environment import MAIN_NAMES

__all__ = ["OUT_OF_THE_WAY", "become_main", "lowest_descriptor"]

OUT_OF_THE_WAY = 4000
"""Our own descriptors are moved up to this number, or as far as the limit allows: main may close or
replace what it takes for its own (``os.closerange(3, 1000)``)."""


def lowest_descriptor() -> int:
    """Return from which number on our own descriptors are out of main's way."""
    limit = os.sysconf("SC_OPEN_MAX")
    return OUT_OF_THE_WAY if limit < 0 else max(0, min(OUT_OF_THE_WAY, limit - 24))


def become_main() -> None:
    """Put an empty module in the place of ``__main__``, which is this package's until then."""
    module = _MainModule("__main__")
    module.__builtins__ = builtins  # type: ignore[attr-defined]
    module.__spec__ = _SpecForChildren(module)
    sys.modules["__main__"] = module
    place_in(module)


class _MainModule(ModuleType):
    def __repr__(self) -> str:
        return "<module '__main__'>"


class _SpecForChildren(ModuleSpec):
    """Has the names of ``__main__`` ready as soon as multiprocessing asks what to import."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._kept: tuple[int, dict[str, Any]] = 0, {}
        super().__init__("__main__", None)

    @property
    def name(self) -> str:
        with contextlib.suppress(Exception):  # children that need no names are none the worse
            self._keep_names()
        return "horovodrunner.processes.worker.spawned"

    @name.setter
    def name(self, value: str) -> None:
        pass

    @property
    def parent(self) -> str:
        """Where relative imports begin: a script may be started by ``python -m``."""
        return getattr(self._module, "__package__", None) or ""

    def _keep_names(self) -> None:
        pid, kept = self._kept
        held = names_by_value(self._module)
        if pid == os.getpid() and _ids(held) == _ids(kept):
            return
        names = dump_names()
        made = os.memfd_create("horovodrunner-main")
        # Kept as long as this process: a child may open it at any time.
        descriptor = fcntl.fcntl(made, fcntl.F_DUPFD_CLOEXEC, lowest_descriptor())
        os.close(made)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(names)
        os.environ[MAIN_NAMES] = f"/proc/{os.getpid()}/fd/{descriptor}"
        self._kept = os.getpid(), held


def _ids(names: dict[str, Any]) -> dict[str, int]:
    return {name: id(value) for name, value in names.items()}
