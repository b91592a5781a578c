"""Finds the base class that a framework wants its callbacks to have. Runs in: the worker."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from operator import attrgetter

__all__ = ["base_classes"]


def base_classes(packages: Sequence[str], attribute: str) -> tuple[type, ...]:
    """Give a class of those packages that are imported already, else of the first one there is.

    Several may be imported: tensorflow alone imports Keras 3, beside which somebody uses tf_keras.
    A callback that has all their base classes suits each of them.

    Parameters
    ----------
    packages
        Names of packages that have such a class, the preferred one first.
    attribute
        Where the class is in each of them.

    Returns
    -------
    tuple of type
        At least one class.

    Raises
    ------
    ImportError
        If none of the packages can be imported.
    """
    imported = [name for name in packages if name in sys.modules]
    find = attrgetter(attribute)
    if imported:
        return tuple(find(importlib.import_module(name)) for name in imported)
    for name in packages:
        try:
            return (find(importlib.import_module(name)),)
        except ModuleNotFoundError:
            continue
    raise ImportError(
        f"none of {', '.join(packages)} is installed here, and this callback needs one: "
        f"pip install {packages[0].partition('.')[0]}"
    )
