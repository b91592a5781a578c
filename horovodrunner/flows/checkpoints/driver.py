"""Checkpoints as they reach the driver, and runs that start anew beside older ones.

Runs in: the driver.

::

    <checkpoint_dir>/step-00000012/…                 the first history
                    /run-0002-1f0c/step-00000000/…   started anew: steps begin at 0 again
                    /run-0003-a9d2/…

Nothing of an older history is moved, replaced or deleted, and it does not count against
``keep_checkpoints``. The newest history that has a checkpoint is the one that runs go on from.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator

from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.wire.events import (
    Event,
    FetchCheckpoint,
    FindCheckpoint,
    UploadCheckpoint,
)
from horovodrunner.wire.upload import Piece, TransferHandler

__all__ = ["checkpoint_handlers", "new_history", "newest_history"]

_NAME = re.compile(r"run-([0-9]{4,})-[0-9a-f]+")


def newest_history(root: CheckpointStore, *, recover: bool = False) -> CheckpointStore:
    """Find the newest history that has a checkpoint; `root` if none has.

    `recover` puts back what a crash left aside; not while another run may write.
    """
    numbers = _numbers(root)
    for name in sorted(numbers, key=lambda each: (numbers[each], each), reverse=True):
        history = root.below(name)
        if history.has_any(recover=recover):
            return history
    return root


def new_history(root: CheckpointStore) -> CheckpointStore:
    """Choose the place of a run that starts anew: `root` if there is no checkpoint at all."""
    numbers = _numbers(root)
    if not numbers and not root.has_any(recover=True):
        return root
    number = max(numbers.values(), default=1) + 1
    # the digits at the end keep two drivers apart that start anew at once
    return root.below(f"run-{number:04d}-{secrets.token_hex(2)}")


def _numbers(root: CheckpointStore) -> dict[str, int]:
    matches = [(name, _NAME.fullmatch(name)) for name in root.directories()]
    return {name: int(match[1]) for name, match in matches if match is not None}


def checkpoint_handlers(store: CheckpointStore) -> dict[type[Event], TransferHandler]:
    """Make what serves tasks that upload checkpoints and download the latest one."""

    def put(request: UploadCheckpoint, pieces: Iterator[Piece]) -> None:
        store.put_pieces(request.step, pieces)

    def latest(request: FindCheckpoint, pieces: Iterator[Piece]) -> Iterable[Piece]:
        manifest, damaged = store.find_latest()
        text = "" if manifest is None else manifest.to_json()
        content = json.dumps({"manifest": text, "damaged": damaged}).encode()
        return [Piece("latest", len(content), [content])]

    def fetch(request: FetchCheckpoint, pieces: Iterator[Piece]) -> Iterable[Piece]:
        for manifest in store.manifests():
            if manifest.step == request.step:
                return store.pieces(manifest)
        raise FileNotFoundError(f"there is no checkpoint of step {request.step} any more")

    return {
        UploadCheckpoint: TransferHandler("a checkpoint's transfer (put)", put),
        FindCheckpoint: TransferHandler("a checkpoint's transfer (latest)", latest),
        FetchCheckpoint: TransferHandler("a checkpoint's transfer (fetch)", fetch),
    }
