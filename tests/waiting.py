"""How tests wait: for an event, however long it takes; pytest's own timeout is the only one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.01)


def wait_for_line(pattern: str, log: Path) -> re.Match[str]:
    """Wait until a process has written something into its log."""
    while not (match := re.search(pattern, log.read_text())):
        time.sleep(0.02)
    return match
