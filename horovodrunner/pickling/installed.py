"""What is installed, and what is the user's own. Runs in: every process."""

from __future__ import annotations

import contextlib
import os
import re

__all__ = ["holds_installed_packages", "is_of_a_python"]

_OF_A_PYTHON = re.compile(r"/lib(?:64)?/python[\d.]*(?:/|$)")


def is_of_a_python(path: str) -> bool:
    """Whether a file or directory is where an installed Python keeps modules and packages."""
    return _OF_A_PYTHON.search(path) is not None


def holds_installed_packages(directory: str) -> bool:
    """Whether packages are installed in a directory: a Python's, or one of ``pip --target``."""
    if is_of_a_python(directory):
        return True
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        return any(entry.name.endswith(".dist-info") for entry in entries)
    return False
