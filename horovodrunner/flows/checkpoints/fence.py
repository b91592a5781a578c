"""Which of several drivers may still write a run's checkpoints. Runs in: the driver and the task.

::

    <checkpoint_dir>/key-nightly-9f…/4c1e…/epoch-000001/…
                                          /epoch-000002/claimed.json      a driver has begun
                                                       /resumed.json      it has taken over
                                                       /step-00000012/…

Every driver of a run has a directory of its own, an epoch. It may write as long as there is no
newer one; what it writes after that, because it looked just before, nobody looks at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["CLAIMED", "RESUMED", "Fence", "epoch_name", "epochs_among"]

CLAIMED = "claimed.json"
RESUMED = "resumed.json"

_EPOCH = re.compile(r"epoch-([0-9]{6,})")


@dataclass(frozen=True)
class Fence:
    """The epoch that a store belongs to."""

    number: int
    prunes_older: bool = True
    """Whether older epochs are deleted once this one has stored a checkpoint."""


def epoch_name(number: int) -> str:
    """Return the name of an epoch's directory.

    >>> epoch_name(3)
    'epoch-000003'
    """
    return f"epoch-{number:06d}"


def epochs_among(names: Iterable[str]) -> list[int]:
    """Return the numbers of the epochs among names of directories, the newest first."""
    matches = (_EPOCH.fullmatch(name) for name in names)
    return sorted((int(match[1]) for match in matches if match is not None), reverse=True)
