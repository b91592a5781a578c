"""Parts of files of the latest checkpoint, without the rest of it. Runs in: the worker."""

from __future__ import annotations

import itertools
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from horovodrunner.errors import CheckpointError
from horovodrunner.flows.checkpoints.manifest import Manifest
from horovodrunner.processes.worker.context import WorkerContext
from horovodrunner.wire.events import RangesRead, RangesWanted

__all__ = ["TaskSource"]


class TaskSource:
    """Reads a checkpoint of all ranks through the task, which asks for these bytes only."""

    def __init__(self, context: WorkerContext, manifest: Manifest) -> None:
        self._context = context
        self._manifest = manifest

    def files(self) -> Mapping[str, int]:
        """Return the size of every file, by its path from the checkpoint's root."""
        sizes = {file.path: file.size for file in self._manifest.files}
        return sizes | {path: sizes[source] for path, source in self._manifest.copies.items()}

    def content_of(self, path: str) -> str:
        """Return a file's SHA-256."""
        return self._manifest.hashes[path]

    def read(self, ranges: Sequence[tuple[str, int, int]]) -> list[memoryview]:
        """Return the bytes of each range: a path, where it begins, how many bytes it has."""
        question = RangesWanted(json.dumps(ranges).encode())
        answer: RangesRead = self._context.control.ask(question)
        if answer.error:
            raise CheckpointError(
                f"rank {self._context.spec.rank} on {self._context.spec.host} cannot read the "
                f"checkpoint of step {self._manifest.step}: {answer.error}"
            )
        view = _contents(Path(answer.path))
        ends = list(itertools.accumulate(length for _, _, length in ranges))
        return [view[end - length : end] for end, (_, _, length) in zip(ends, ranges, strict=True)]


def _contents(path: Path) -> memoryview:
    """Return the bytes of a file, which goes when nobody has them any more."""
    with path.open("rb") as file:
        path.unlink()
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
