"""What ranks have left, in a directory of the driver. Runs in: the driver."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from horovodrunner.flows.artifacts.driver import put_file
from horovodrunner.flows.artifacts.places import MAX_RUN_BYTES
from horovodrunner.flows.artifacts.task import pieces_of
from horovodrunner.flows.checkpoints.manifest import safe_path
from horovodrunner.flows.observer import Observer
from horovodrunner.formatting import format_bytes
from horovodrunner.wire.events import FrameError, UploadArtifacts
from horovodrunner.wire.upload import Piece, TransferHandler

__all__ = ["ArtifactStore"]

_OF_A_RANK = re.compile(r"rank-[0-9]+/.")


class ArtifactStore(Observer):
    """Takes files into ``rank-N/`` of a directory, which is made when the first one comes.

    Without a directory of the user's it is a temporary one, which goes with this object.
    What an earlier attempt left is moved to ``attempt-N/``.
    """

    title = "keeping the ranks' artifacts"

    def __init__(self, directory: Path | None = None) -> None:
        self._wanted = directory
        self._lock = threading.Lock()
        self._bytes = 0
        self._attempt = 1
        self.directory: Path | None = None
        """Where the files are; None as long as there are none."""
        self.discard: Callable[[], object] = lambda: None
        """Deletes a temporary directory now."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the directory to this one: a copy knows where it is, and does not delete it."""
        return {**vars(self), "_lock": None, "discard": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock(), discard=lambda: None)

    @property
    def handler(self) -> TransferHandler:
        """What takes in uploads."""
        return TransferHandler("an artifact's transfer", self._receive)

    def begin(self, attempt: int) -> None:
        if self.directory is not None:
            for folder in self.directory.glob("rank-*"):
                kept = self.directory / f"attempt-{self._attempt}" / folder.name
                kept.parent.mkdir(exist_ok=True)
                folder.rename(kept)
        self._attempt = attempt

    def take(self, files: dict[str, Path]) -> None:
        """Copy files of ranks that ran on the driver itself."""
        self._put_all(pieces_of(files))

    def _receive(self, request: UploadArtifacts, pieces: Iterator[Piece]) -> None:
        self._put_all(pieces)

    def _put_all(self, pieces: Iterable[Piece]) -> None:
        """Take all that can be taken, and raise what was wrong with the others at the end."""
        problems = []
        for piece in pieces:
            try:
                self._put(piece)
            except (ConnectionError, TimeoutError):  # nothing comes after it
                raise
            except (OSError, ValueError) as error:
                problems.append(str(error))
        if problems:
            more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
            raise OSError(f"{problems[0]}{more}; the others are kept")

    def _put(self, piece: Piece) -> None:
        if not _OF_A_RANK.match(piece.name):
            raise FrameError(f"an artifact called {piece.name!r:.80}, which is of no rank")
        name = safe_path(piece.name)
        with self._lock:
            if self._bytes + piece.size > MAX_RUN_BYTES:
                raise OSError(
                    f"{name} has {format_bytes(piece.size)}, and with it the run's artifacts have "
                    f"more than {format_bytes(MAX_RUN_BYTES)}"
                )
            self._bytes += piece.size
            directory = self._make_directory()
        target = directory / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            put_file(target, piece.chunks)
        except BaseException:
            with self._lock:
                self._bytes -= piece.size
            raise

    def _make_directory(self) -> Path:
        if self.directory is None:
            if self._wanted is not None:
                self._wanted.mkdir(parents=True, exist_ok=True)
                self.directory = self._wanted
            else:
                self.directory = Path(tempfile.mkdtemp(prefix="artifacts-of-a-run-"))
                remove = weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
                self.discard = remove
        return self.directory
