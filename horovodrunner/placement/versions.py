"""What is installed on the driver and on the executors, side by side. Runs in: every process."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping, Sequence

__all__ = [
    "Difference",
    "differences",
    "format_differences",
    "installed_versions",
    "must_fail",
]

_PACKAGES = (
    "horovodrunner",
    "cloudpickle",
    "horovod",
    "torch",
    "tensorflow",
    "tensorflow-cpu",
    "keras",
    "numpy",
)

Difference = tuple[str, str, tuple[tuple[str, str], ...]]
"""A name, the driver's version, and other versions with the host that has them."""


def installed_versions() -> dict[str, str]:
    """Return the versions that matter to a run, by name; "" for what is not installed."""
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = _version(importlib.metadata.distribution(package))
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return versions


def _version(package: importlib.metadata.Distribution) -> str:
    """Return one line of the metadata; parsing all the rest takes each task 30 ms."""
    line = re.search(r"^Version: *(.+)$", package.read_text("METADATA") or "", re.MULTILINE)
    return line[1].strip() if line else package.version


def differences(
    driver: Mapping[str, str], executors: Sequence[tuple[str, Mapping[str, str]]]
) -> list[Difference]:
    """Compare the executors' versions, with their hosts, with the driver's.

    What one side lacks is no difference: the driver may well lack the frameworks.
    """
    found = []
    for name, own in driver.items():
        others = dict.fromkeys(
            (host, version)
            for host, versions in executors
            if (version := versions.get(name, "")) not in {own, ""}
        )
        executors_differ = len({version for _, version in others}) > 1
        if others and (own or executors_differ):
            found.append((name, own, tuple(others)))
    return found


def must_fail(found: Sequence[Difference]) -> bool:
    """Return whether a run cannot work with these differences.

    Functions travel as bytecode, which holds for one minor version of Python; and the driver and
    the tasks have to speak the same version of this package's protocol.
    """
    for name, own, others in found:
        if name == "horovodrunner":
            return True
        if name == "Python" and any(_minor(version) != _minor(own) for _, version in others):
            return True
    return False


def format_differences(found: Sequence[Difference]) -> str:
    """Return differences as a table.

    >>> print(format_differences([("torch", "2.13.0", (("node-7", "2.12.1"),))]))
                     driver        executors
    torch            2.13.0        2.12.1 (node-7)
    """
    lines = [f"{'':16} {'driver':13} executors"]
    for name, own, others in found:
        there = ", ".join(f"{version} ({host})" for host, version in others[:4])
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        lines.append(f"{name:16} {own or '-':13} {there}{more}")
    return "\n".join(lines)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
