"""Runs that start anew beside older checkpoints. Runs in: the driver.

::

    <checkpoint_dir>/step-00000012/…                 the first history
                    /run-0002-1f0c/step-00000000/…   started anew: steps begin at 0 again
                    /run-0003-a9d2/…

Nothing of an older history is moved, replaced or deleted, and it does not count against
``keep_checkpoints``. The newest history that has a checkpoint is the one that runs go on from.
"""

from __future__ import annotations

import re
import secrets

from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.storage import LocalPlace, RemotePlace, open_place

__all__ = ["new_history", "newest_history"]

_NAME = re.compile(r"run-([0-9]{4,})-[0-9a-f]+")


def newest_history(root: CheckpointStore, *, recover: bool = False) -> CheckpointStore:
    """Find the history that a run goes on from.

    Parameters
    ----------
    root
        The run's ``checkpoint_dir``.
    recover
        Whether to put back what a crash left aside; not while another run may write.

    Returns
    -------
    CheckpointStore
        The newest one that has a checkpoint; `root` if none has.

    Raises
    ------
    OSError
        When the directory exists and cannot be listed.
    """
    place = open_place(root.location)
    numbers = _numbers(place)
    for name in sorted(numbers, key=lambda each: (numbers[each], each), reverse=True):
        history = CheckpointStore(place.url(name), root.keep)
        if history.has_any(recover=recover):
            return history
    return root


def new_history(root: CheckpointStore) -> CheckpointStore:
    """Choose the place of a run that starts anew.

    Parameters
    ----------
    root
        The run's ``checkpoint_dir``.

    Returns
    -------
    CheckpointStore
        `root` if there is no checkpoint at all, else one that nothing is in yet.

    Raises
    ------
    OSError
        When the directory exists and cannot be listed.
    """
    place = open_place(root.location)
    numbers = _numbers(place)
    if not numbers and not root.has_any(recover=True):
        return root
    number = max(numbers.values(), default=1) + 1
    # the digits at the end keep two drivers apart that start anew at once
    return CheckpointStore(place.url(f"run-{number:04d}-{secrets.token_hex(2)}"), root.keep)


def _numbers(place: LocalPlace | RemotePlace) -> dict[str, int]:
    matches = [(name, _NAME.fullmatch(name)) for name in place.directories()]
    return {name: int(match[1]) for name, match in matches if match is not None}
