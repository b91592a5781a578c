"""What an environment that was packed needs of the machine it runs on. Runs in: every process."""

from __future__ import annotations

import contextlib
import json
import platform
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["FILE", "PackedEnvironment"]

FILE = "horovodrunner-environment.json"
"""Its name, in the root of an environment that ``python -m horovodrunner pack`` has packed."""


@dataclass(frozen=True)
class PackedEnvironment:
    """What the archive says of itself."""

    python: str
    machine: str
    glibc: str
    """The newest version that a file in it asks for, ``2.34``; empty for none."""
    digest: str
    packages: dict[str, str]

    def to_bytes(self) -> bytes:
        """Write it as the archive has it."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def of_this_process(cls, prefix: str = sys.prefix) -> PackedEnvironment | None:
        """Return what is said of this process's environment, if it was packed."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return cls(**json.loads((Path(prefix) / FILE).read_text()))
        return None

    def problem_here(self) -> str:
        """Return why it cannot work on this machine; empty if nothing is known against it."""
        name, version = platform.libc_ver()
        if name != "glibc" or not self.glibc or _numbers(version) >= _numbers(self.glibc):
            return ""
        return (
            f"the packed environment needs glibc {self.glibc}, and {socket.gethostname()} has "
            f"{version}: build and pack it on a machine like this one, or an older one"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
