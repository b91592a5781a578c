"""Tells this package's ``sparkdl`` and ``petastorm`` from others. Runs in: every process."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import NamedTuple

from horovodrunner.flows.logs.showing import warn

__all__ = [
    "Found",
    "find_sparkdl",
    "import_package_instead",
    "other_sparkdls",
    "remedy",
    "warn_of_others",
]


class Found(NamedTuple):
    """The ``sparkdl`` that an import statement would get."""

    path: str
    is_ours: bool


def find_sparkdl() -> Found | None:
    """Find the ``sparkdl`` that gets imported, without importing it."""
    spec = importlib.util.find_spec("sparkdl")
    if spec is None or spec.origin is None:
        return None
    return Found(spec.origin, "horovodrunner" in _source(spec))


def other_sparkdls(own: str) -> list[str]:
    """List what else is called ``sparkdl``: on Python's path, or as an installed distribution.

    A distribution of that name may have put its files among ours, or ours may have replaced its.
    `own` is the path of the ``__init__.py`` that is imported.
    """
    specs = [PathFinder.find_spec("sparkdl", [entry]) for entry in sys.path]
    origins = dict.fromkeys(spec.origin for spec in specs if spec is not None and spec.origin)
    real = os.path.realpath(own)
    found = [origin for origin in origins if os.path.realpath(origin) != real]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found.append(f"the distribution sparkdl {importlib.metadata.version('sparkdl')}")
    return found


def warn_of_others(own: str) -> None:
    """Warn, at the line that imports ``sparkdl``, when others of that name are hidden by ours."""
    others = other_sparkdls(own)
    if others:
        warn(
            f"this is the sparkdl of horovodrunner ({own}), and there is another one, which it "
            f"hides: {', '.join(others)}. Keep one of them: {remedy()}",
            stacklevel=3,
        )


def remedy() -> str:
    """Return what to do where there is more than one ``sparkdl``."""
    return (
        "pip uninstall sparkdl, then pip install --force-reinstall --no-deps "
        f"{_installed_from()}; or import HorovodRunner from horovodrunner"
    )


def _installed_from() -> str:
    """Return what pip installed this package from, as its command takes it."""
    # Imported here, because workers import this module and need them only for a message.
    import json
    import shlex
    from urllib.parse import unquote

    try:
        text = importlib.metadata.distribution("horovodrunner").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    if not text:
        return "the checkout or the wheel of horovodrunner"
    source = json.loads(text)
    url = source["url"]
    place = shlex.quote(unquote(url.removeprefix("file://")) if url.startswith("file://") else url)
    return f"--editable {place}" if source.get("dir_info", {}).get("editable") else place


def import_package_instead(name: str) -> bool:
    """Put a package in the place of our module of the same name, which is being imported.

    Return False if there is no such package on Python's path.
    """
    for entry in sys.path:
        spec = PathFinder.find_spec(name, [entry])
        if spec is None or spec.loader is None or not spec.submodule_search_locations:
            continue
        if spec.origin is not None and "horovodrunner" not in _source(spec):
            sys.modules[name] = package = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(package)
            return True
    return False


def _source(spec: ModuleSpec) -> str:
    get_source = getattr(spec.loader, "get_source", None)
    return (get_source(spec.name) or "") if get_source is not None else ""
