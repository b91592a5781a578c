"""Weights that are spread over a checkpoint's ranks, read into one module. Runs in: the driver."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from horovodrunner.errors import CheckpointError
from horovodrunner.flows.checkpoints.manifest import MANIFEST_NAME, Manifest
from horovodrunner.flows.checkpoints.worker.loading import Loading
from horovodrunner.flows.checkpoints.worker.shard_reader import ShardReader
from horovodrunner.flows.checkpoints.worker.source import Range
from horovodrunner.flows.checkpoints.worker.states import Objects
from horovodrunner.storage import open_storage

__all__ = ["load_shards"]


def load_shards(net: Any, location: str) -> Any:
    """Load what ``checkpoint.save_torch(step, model=...)`` saved of a sharded module."""
    saved = _Saved(location)
    metadata = ShardReader(saved).read_metadata()
    names = {str(path[0]) for path in metadata.planner_data.values()}
    name = next(iter(names)) if len(names) == 1 else "model"
    if name not in names:
        raise CheckpointError(
            f"{location} has no sharded 'model', only {', '.join(sorted(names))}: give a function "
            "as build that loads it with checkpoint.torch_reader()"
        )
    Loading(Objects({name: net}), saved, lambda key, text: None).load(name)
    return net


class _Saved:
    """A checkpoint of all ranks where it is stored; of its files only what is needed is read."""

    _differs = False
    _own_rank = None

    def __init__(self, location: str) -> None:
        self._place = open_storage(location)
        with self._place.open(MANIFEST_NAME) as stream:
            self._manifest = Manifest.from_json(stream.read().decode())
        self.step = self._manifest.step
        self.world_size = self._manifest.world_size

    def source(self) -> _Saved:
        return self

    def _source_for(self, bytes_of_every_rank: int) -> _Saved:
        return self

    def content_of(self, path: str) -> str:
        return self._manifest.hashes[path]

    def files(self) -> Mapping[str, int]:
        sizes = {file.path: file.size for file in self._manifest.files}
        return sizes | {path: sizes[stored] for path, stored in self._manifest.copies.items()}

    def read(self, ranges: Sequence[Range]) -> list[memoryview]:
        return [memoryview(self._read(*each)) for each in ranges]

    def _read(self, path: str, start: int, length: int) -> bytearray:
        stored = self._manifest.copies.get(path, path)
        content = bytearray(self._place.read(stored, start, start + length))
        if len(content) != length:
            raise EOFError(f"{stored} ends {length - len(content)} bytes early")
        return content

    def __truediv__(self, name: str) -> Path:
        return Path(os.devnull, name)  # nothing of it is on this machine
