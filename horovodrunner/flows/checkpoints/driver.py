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
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from horovodrunner.flows.checkpoints.manifest import Manifest, StoredFile
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.wire.events import (
    CommitCheckpoint,
    DiscardCheckpoint,
    Event,
    FetchCheckpoint,
    FindCheckpoint,
    ReadCheckpoint,
    UploadCheckpoint,
    UploadPart,
)
from horovodrunner.wire.upload import Piece, TransferHandler

__all__ = ["CheckpointReceiver", "new_history", "newest_history"]

MAX_UPLOADS = 4
"""So many ranks send their parts of a checkpoint at once; the others wait."""

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


class CheckpointReceiver:
    """Serves tasks that upload checkpoints, whole or rank by rank, and download the latest one."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._incoming: dict[str, _Incoming] = {}
        self._committed: set[str] = set()
        self._lock = threading.Lock()
        turns = threading.Semaphore(MAX_UPLOADS)
        title = "a checkpoint's transfer"
        self.handlers: dict[type[Event], TransferHandler] = {
            UploadCheckpoint: TransferHandler(f"{title} (put)", self._put),
            UploadPart: TransferHandler(f"{title} (a rank's part)", self._put_part, turns),
            CommitCheckpoint: TransferHandler(f"{title} (commit)", self._commit),
            DiscardCheckpoint: TransferHandler(f"{title} (discard)", self._discard),
            FindCheckpoint: TransferHandler(f"{title} (latest)", self._find_latest),
            FetchCheckpoint: TransferHandler(f"{title} (fetch)", self._fetch),
            ReadCheckpoint: TransferHandler(f"{title} (ranges)", self._read),
        }

    def close(self) -> None:
        """Delete what has come of checkpoints that did not become complete."""
        while self._incoming:
            self._give_up(self._incoming.popitem()[1])

    def _put(self, request: UploadCheckpoint, pieces: Iterator[Piece]) -> None:
        self._store.put_pieces(request.step, pieces, request.metrics)

    def _put_part(self, request: UploadPart, pieces: Iterator[Piece]) -> Iterable[Piece]:
        with self._lock:
            incoming = self._incoming.get(request.place)
            if incoming is None:
                incoming = _Incoming(self._store.begin(request.step))
                self._incoming[request.place] = incoming
        try:
            part = self._store.put_part(incoming.place, _rank_of(request.rank), pieces)
        finally:
            if incoming.is_given_up:  # because of another rank, while this one's was coming
                self._give_up(incoming)
        incoming.files.update((file.path, file) for file in part.files)
        content = part.to_json().encode()
        return [Piece("part", len(content), [content])]

    def _commit(self, request: CommitCheckpoint, pieces: Iterator[Piece]) -> None:
        (manifest,) = (Manifest.from_json(piece.read().decode()) for piece in pieces)
        if request.place in self._committed:
            return  # the answer to an earlier try did not arrive
        incoming = self._incoming[request.place]
        if {file.path: file for file in manifest.files} != incoming.files:
            raise ValueError("the files that the manifest names are not those that have come")
        self._store.commit(incoming.place, manifest)
        del self._incoming[request.place]
        self._committed.add(request.place)

    def _discard(self, request: DiscardCheckpoint, pieces: Iterator[Piece]) -> None:
        incoming = self._incoming.pop(request.place, None)
        if incoming is not None:
            self._give_up(incoming)

    def _give_up(self, incoming: _Incoming) -> None:
        with incoming.giving_up:
            incoming.is_given_up = True
            self._store.discard(incoming.place)

    def _find_latest(self, request: FindCheckpoint, pieces: Iterator[Piece]) -> Iterable[Piece]:
        manifest, damaged = self._store.find_latest()
        text = "" if manifest is None else manifest.to_json()
        content = json.dumps({"manifest": text, "damaged": damaged}).encode()
        return [Piece("latest", len(content), [content])]

    def _fetch(self, request: FetchCheckpoint, pieces: Iterator[Piece]) -> Iterable[Piece]:
        return self._store.pieces(self._manifest_of(request.step), _rank_of(request.rank))

    def _read(self, request: ReadCheckpoint, pieces: Iterator[Piece]) -> Iterable[Piece]:
        (ranges,) = (json.loads(piece.read()) for piece in pieces)
        wanted = [(str(path), int(start), int(length)) for path, start, length in ranges]
        return self._store.read(self._manifest_of(request.step), wanted)

    def _manifest_of(self, step: int) -> Manifest:
        for manifest in self._store.manifests():
            if manifest.step == step:
                return manifest
        raise FileNotFoundError(f"there is no checkpoint of step {step} any more")


def _rank_of(number: int) -> int | None:
    return None if number < 0 else number


@dataclass
class _Incoming:
    """A checkpoint of which parts have come."""

    place: str
    files: dict[str, StoredFile] = field(default_factory=dict)
    is_given_up: bool = False
    giving_up: threading.Lock = field(default_factory=threading.Lock)
