"""Where artifacts lie, and how much of them travels. Runs in: every process."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MAX_RANK_BYTES", "MAX_RUN_BYTES", "directory_of_rank", "directory_of_task"]

MAX_RANK_BYTES = 1024**3
MAX_RUN_BYTES = 8 * 1024**3


def directory_of_task(scratch: Path) -> Path:
    """Return the directory of all ranks of a task."""
    return scratch / "artifacts"


def directory_of_rank(scratch: Path, rank: int) -> Path:
    """Return the directory of one of its ranks."""
    return directory_of_task(scratch) / f"rank-{rank}"
