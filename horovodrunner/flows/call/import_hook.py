"""Takes part when a module is imported. Runs in: every process."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # it imports a lot, and every worker would pay for it
    from importlib.abc import Loader

__all__ = ["Execute", "after_import", "instead_of_import"]

Execute = Callable[[ModuleType], None]
"""Fills a new module with what its code makes."""

_hooks: dict[str, Callable[[ModuleType, Execute], None]] = {}


def instead_of_import(name: str, hook: Callable[[ModuleType, Execute], None]) -> None:
    """Call `hook` instead of a module's own code."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _hooks[name] = hook


def after_import(name: str, act: Callable[[Any], None]) -> None:
    """Call `act` with a module once it has been imported; at once if that is already so.

    Several may wait for the same module; they are called in turn.
    """
    if name in sys.modules:
        act(sys.modules[name])
        return
    earlier = _hooks.get(name)

    def hook(module: ModuleType, execute: Execute) -> None:
        if earlier is None:
            execute(module)
        else:
            earlier(module, execute)
        act(module)

    instead_of_import(name, hook)


class _Finder:
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _hooks:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _Loader(spec.loader))
        return spec


class _Loader:
    """Stands for a module's own loader until the module is executed."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        _hooks[module.__name__](module, self._own.exec_module)
