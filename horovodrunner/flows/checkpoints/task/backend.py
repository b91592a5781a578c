"""Where checkpoints are kept, as a task reaches it. Runs in: the task (np < 0: the driver)."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from horovodrunner.flows.checkpoints.manifest import Manifest, Part
from horovodrunner.flows.checkpoints.store import Range
from horovodrunner.flows.checkpoints.tree import pieces_of_tree, restore, write_pieces
from horovodrunner.wire.events import (
    CommitCheckpoint,
    DiscardCheckpoint,
    FetchCheckpoint,
    FindCheckpoint,
    ReadCheckpoint,
    UploadCheckpoint,
    UploadPart,
)
from horovodrunner.wire.upload import Piece, TransferClient

__all__ = ["CheckpointBackend", "DriverBackend"]


class CheckpointBackend(Protocol):
    """Keeps checkpoints; every method blocks, and raises an exception when it fails."""

    def put(self, step: int, directory: Path, metrics: Mapping[str, float] | None = None) -> object:
        """Store the files below a directory as the checkpoint of a step, all or nothing."""

    def begin(self, step: int) -> str:
        """Return the place of a checkpoint whose parts come from several ranks."""

    def put_part(self, place: str, rank: int | None, pieces: Iterable[Piece]) -> Part:
        """Store what a rank has saved."""

    def commit(self, place: str, manifest: Manifest) -> object:
        """Let the parts at a place be a checkpoint."""

    def discard(self, place: str) -> None:
        """Give up what is at a place."""

    def find_latest(self) -> tuple[Manifest | None, Sequence[str]]:
        """Find the newest sound checkpoint, and write a sentence about each damaged one."""

    def fetch(self, manifest: Manifest, directory: Path, rank: int | None = None) -> None:
        """Copy a rank's files, or those of all, into an empty directory; check their hashes."""

    def read_into(self, path: Path, manifest: Manifest, ranges: Sequence[Range]) -> None:
        """Write ranges of a checkpoint's files, one after the other, to a new file."""


class DriverBackend:
    """A directory on the driver; a store that the task reaches itself is a backend, too."""

    def __init__(self, client: TransferClient) -> None:
        self._client = client

    def put(self, step: int, directory: Path, metrics: Mapping[str, float] | None = None) -> None:
        request = UploadCheckpoint(self._client.run_id, step, dict(metrics or {}))
        self._client.upload(request, pieces_of_tree(directory))

    def begin(self, step: int) -> str:
        return f"{step}-{secrets.token_hex(8)}"  # the driver makes room when the first part comes

    def put_part(self, place: str, rank: int | None, pieces: Iterable[Piece]) -> Part:
        step = int(place.partition("-")[0])
        request = UploadPart(self._client.run_id, place, step, -1 if rank is None else rank)
        with self._client.exchange(request, pieces) as answers:
            (part,) = (Part.from_json(piece.read()) for piece in answers)
        return part

    def commit(self, place: str, manifest: Manifest) -> None:
        content = manifest.to_json().encode()
        request = CommitCheckpoint(self._client.run_id, place)
        self._client.upload(request, [Piece("manifest", len(content), [content])])

    def discard(self, place: str) -> None:
        self._client.upload(DiscardCheckpoint(self._client.run_id, place), [])

    def find_latest(self) -> tuple[Manifest | None, Sequence[str]]:
        with self._client.download(FindCheckpoint(self._client.run_id)) as pieces:
            (answer,) = (json.loads(piece.read()) for piece in pieces)
        text = answer["manifest"]
        return (Manifest.from_json(text) if text else None), answer["damaged"]

    def fetch(self, manifest: Manifest, directory: Path, rank: int | None = None) -> None:
        request = FetchCheckpoint(self._client.run_id, manifest.step, -1 if rank is None else rank)
        with self._client.download(request) as pieces:
            restore(manifest, directory, pieces, rank)

    def read_into(self, path: Path, manifest: Manifest, ranges: Sequence[Range]) -> None:
        content = json.dumps(ranges).encode()
        request = ReadCheckpoint(self._client.run_id, manifest.step)
        asked = [Piece("ranges", len(content), [content])]
        with self._client.exchange(request, asked) as pieces:
            write_pieces(pieces, path)
