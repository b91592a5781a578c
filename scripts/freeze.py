"""Write constraints.txt from the packages of .venv. Runs in: the command line.

``.venv/bin/python scripts/freeze.py``, after an upgrade was tested. A version that does not exist
for the oldest supported Python gets a marker, so that pip can choose an older one there.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

OLDEST_PYTHON = Version("3.10")
NEWER_PYTHONS = ("3.11", "3.12", "3.13")
# Not pinned: this project, what it builds itself, and what every venv brings along.
NOT_PINNED = {"horovodrunner", "horovod", "pip"}
HEAD = """\
# The versions that were tested together; written by scripts/freeze.py, used by make.
# A marker stands where a version needs a newer Python than the oldest supported one.
"""


def main() -> None:
    """Write one line for each installed package, sorted by name."""
    lines = set()
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"].lower().replace("_", "-")
        if name not in NOT_PINNED:
            version = Version(package.version).public  # without a local part such as "+cpu"
            lines.add(f"{name}=={version}{marker(package.metadata.json.get('requires_python'))}")
    target = Path(__file__).resolve().parent.parent / "constraints.txt"
    target.write_text(HEAD + "".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")


def marker(requires: object) -> str:
    """Return the environment marker for a package that needs the given Pythons."""
    supported = SpecifierSet(str(requires or ""))
    if OLDEST_PYTHON in supported:
        return ""
    oldest = next(python for python in NEWER_PYTHONS if f"{python}.0" in supported)
    return f'; python_version >= "{oldest}"'


if __name__ == "__main__":
    main()
