"""Tensors' parts, back into tensors that may be divided otherwise. Runs in: the worker.

A rank reads the bytes that it needs and no others: of a part in C order the rows that overlap with
its own part. What ``torch.distributed.checkpoint.FileSystemWriter`` has written is read, too.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    Metadata,
    StorageReader,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType

from horovodrunner.errors import CheckpointError
from horovodrunner.flows.checkpoints.worker.shards import ALIGNMENT, Part, read_index
from horovodrunner.flows.checkpoints.worker.source import INDEX_NAME, Range, Source
from horovodrunner.flows.checkpoints.worker.stages import Index, parts_for

__all__ = ["MemoryReader", "ShardReader", "load_into"]

BATCH_BYTES = 128 * 1024 * 1024
_METADATA = ".metadata"


def load_into(state: dict[str, Any], reader: Any, metadata: Any) -> None:
    """Fill a nested state dict in place, without a word to other ranks."""
    planner = DefaultLoadPlanner()
    planner.set_up_planner(state, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    reader.read_data(plan, planner).wait()


class _Reader(StorageReader):  # type: ignore[misc]  # torch is not looked into
    """What all readers of ours do alike."""

    def reset(self, checkpoint_id: Any = None) -> None:
        """Have nothing to forget: a reader belongs to one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        return plans


@dataclass(frozen=True)
class _Wanted:
    """Bytes of a file, and what they are for."""

    item: Any
    part: Part
    start: int
    stop: int


class ShardReader(_Reader):
    """Reads what save_torch() or a FileSystemWriter on every rank wrote.

    `own_rank` is this rank's number, where as many ranks have saved the checkpoint.
    """

    def __init__(
        self,
        source: Source,
        directory: str = "",
        batch_bytes: int = BATCH_BYTES,
        own_rank: int | None = None,
    ) -> None:
        self._source = source
        self._own_rank = own_rank
        self._directory = f"{directory.strip('/')}/" if directory.strip("/") else ""
        self._batch_bytes = batch_bytes
        self._parts: dict[Any, Part] = {}
        self._unreadable: dict[str, str] = {}
        """Why some keys cannot be read."""

    def read_from(self, source: Source) -> None:
        """Read the tensors of the same checkpoint from elsewhere."""
        self._source = source

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        files = sorted(self._source.files(), key=_by_rank)
        indexes = [path for path in files if self._is_named(path, INDEX_NAME)]
        if indexes:
            texts = self._source.read([(path, 0, self._source.files()[path]) for path in indexes])
            found = [
                Index(max(_by_rank(path)[0], 0), *read_index(text, path.removesuffix(INDEX_NAME)))
                for path, text in zip(indexes, texts, strict=True)
            ]
            parts, clashes = parts_for(self._own_rank, found, self._source.content_of)
            metadata = self._metadata_of(parts)
            self._unreadable |= clashes
            return metadata
        metadata = [path for path in files if self._is_named(path, _METADATA)]
        if not metadata:
            raise CheckpointError(
                f"there is no {INDEX_NAME} of save_torch() and no {_METADATA} of "
                f"torch.distributed.checkpoint.save() in {self._directory or 'the checkpoint'}, "
                f"only {', '.join(files[:10]) or 'nothing'}"
            )
        (text,) = self._source.read([(metadata[0], 0, self._source.files()[metadata[0]])])
        # torch's own format; as trusted as the code that the run executes
        return self._metadata_of_torch(pickle.loads(text), files)  # noqa: S301

    def set_up_storage_reader(
        self, metadata: Any, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self._parts = metadata.storage_data

    def prepare_local_plan(self, plan: Any) -> Any:
        for item in plan.items:
            if item.storage_index.fqn in self._unreadable:
                raise CheckpointError(self._unreadable[item.storage_index.fqn])
        return plan

    def read_data(self, plan: Any, planner: Any) -> Any:
        wanted = [each for item in plan.items for each in self._wanted(item)]
        wanted.sort(key=lambda each: (each.part.file, each.start))
        for batch in _batches(wanted, self._batch_bytes):
            ranges, places = _merged(batch, self._source.files())
            views = self._source.read(ranges)
            for each, place in zip(batch, places, strict=True):
                begin = each.start - ranges[place][1]
                _deliver(each, views[place][begin : begin + each.stop - each.start], planner)
        return _done()

    def _is_named(self, path: str, name: str) -> bool:
        return path == self._directory + name or (
            path.startswith("rank-") and path.partition("/")[2] == self._directory + name
        )

    def _metadata_of(self, parts: Iterable[Part]) -> Any:
        """Compose what all ranks have written; what several wrote alike is the lowest one's."""
        entries: dict[str, Any] = {}
        paths: dict[str, tuple[str | int, ...]] = {}
        kept: dict[Any, Part] = {}
        for part in parts:
            paths.setdefault(part.key, part.path)
            if part.size is None:
                entries.setdefault(part.key, BytesStorageMetadata())
                kept.setdefault(MetadataIndex(part.key), part)
                continue
            properties = TensorProperties(dtype=getattr(torch, part.dtype))
            new = TensorStorageMetadata(properties, torch.Size(part.size), [])
            entry = entries.setdefault(part.key, new)
            index = MetadataIndex(part.key, part.offsets)
            if 0 not in part.sizes and index not in kept:
                kept[index] = part
                chunk = ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes))
                entry.chunks.append(chunk)
        self._unreadable = dict(_incomplete(entries))
        return Metadata(entries, planner_data=paths, storage_data=kept)

    def _metadata_of_torch(self, metadata: Any, files: Iterable[str]) -> Any:
        """Find the files of a FileSystemWriter, each of which one rank has."""
        paths = {file.rpartition("/")[2]: file for file in files if self._is_below(file)}
        parts = {}
        for index, info in metadata.storage_data.items():
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(
                    f"{index.fqn!r} was written with extensions {info.transform_descriptors}, "
                    "which only the FileSystemReader undoes: load it with that, from a directory"
                )
            if info.relative_path not in paths:
                raise CheckpointError(
                    f"{info.relative_path}, which {_METADATA} names, is not in the checkpoint: "
                    'save on every rank, within checkpoint.save(step, ranks="all")'
                )
            parts[index] = Part(
                index.fqn,
                (),
                "torch",
                size=None if index.offset is None else (),
                file=paths[info.relative_path],
                offset=info.offset,
                length=info.length,
            )
        return replace(metadata, storage_data=parts)

    def _is_below(self, path: str) -> bool:
        return self._is_named(path, path.rpartition("/")[2])

    def _wanted(self, item: Any) -> Iterator[_Wanted]:
        """Turn what is wanted of a part into ranges of its file, of at most a batch each."""
        part = self._parts[item.storage_index]
        if part.encoding != "raw" or not part.sizes:
            yield _Wanted(item, part, part.offset, part.offset + part.length)
            return
        row_bytes = part.length // part.sizes[0]
        rows = max(1, self._batch_bytes // row_bytes)
        for first in range(0, item.lengths[0], rows):
            count = min(rows, item.lengths[0] - first)
            block = replace(
                item,
                dest_offsets=_further(item.dest_offsets, first),
                storage_offsets=_further(item.storage_offsets, first),
                lengths=torch.Size((count, *item.lengths[1:])),
            )
            start = part.offset + block.storage_offsets[0] * row_bytes
            yield _Wanted(block, part, start, start + count * row_bytes)


class MemoryReader(_Reader):
    """Reads from a state dict of whole tensors."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._planner = DefaultSavePlanner()
        self._planner.set_up_planner(state, is_coordinator=True)
        self._plan = self._planner.create_local_plan()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        _, metadata = create_default_global_save_plan([self._plan])
        return replace(metadata, planner_data=self._plan.planner_data)

    def set_up_storage_reader(
        self, metadata: Any, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Have nothing to set up."""

    def read_data(self, plan: Any, planner: Any) -> Any:
        contents = {item.index: item for item in self._plan.items}
        for item in plan.items:
            content = self._planner.resolve_data(contents[item.storage_index])
            if item.type == LoadItemType.BYTE_IO:
                content.seek(0)
                planner.load_bytes(item, content)
            else:
                _copy(_narrowed(content, item.storage_offsets, item.lengths), item, planner)
        return _done()


def _done() -> Any:
    done = torch.futures.Future()
    done.set_result(None)
    return done


def _by_rank(path: str) -> tuple[int, str]:
    number = path.partition("/")[0].removeprefix("rank-")
    return (int(number) if number.isdecimal() else -1), path


def _incomplete(entries: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, entry in entries.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        held, whole = sum(math.prod(chunk.sizes) for chunk in entry.chunks), math.prod(entry.size)
        if held != whole:
            yield key, f"the checkpoint holds {held} of the {whole} elements of {key!r}"


def _further(offsets: Sequence[int], rows: int) -> Any:
    return torch.Size((offsets[0] + rows, *offsets[1:]))


def _batches(wanted: Iterable[_Wanted], limit: int) -> Iterator[list[_Wanted]]:
    batch: list[_Wanted] = []
    size = 0
    for each in wanted:
        if batch and size + each.stop - each.start > limit:
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += each.stop - each.start
    if batch:
        yield batch


def _merged(batch: Sequence[_Wanted], sizes: Mapping[str, int]) -> tuple[list[Range], list[int]]:
    """Merge what touches; return the ranges, and for each that is wanted which one it is in.

    They begin and end so that tensors are aligned wherever the ranges are put one after the other.
    """
    ranges: list[Range] = []
    places = []
    for each in batch:
        start = each.start - each.start % ALIGNMENT
        stop = min(each.stop + -each.stop % ALIGNMENT, sizes[each.part.file])
        path, offset, length = ranges[-1] if ranges else ("", 0, 0)
        if path == each.part.file and start <= offset + length:
            ranges[-1] = path, offset, max(length, stop - offset)
        else:
            ranges.append((each.part.file, start, stop - start))
        places.append(len(ranges) - 1)
    return ranges, places


def _deliver(wanted: _Wanted, view: memoryview, planner: Any) -> None:
    item, part = wanted.item, wanted.part
    if item.type == LoadItemType.BYTE_IO:
        planner.load_bytes(item, io.BytesIO(view))
    elif part.encoding == "raw":
        writable = memoryview(bytearray(view)) if view.readonly else view
        flat = torch.frombuffer(writable, dtype=getattr(torch, part.dtype))
        rows = flat.reshape(item.lengths[:1] + part.sizes[1:])
        _copy(_narrowed(rows, (0, *item.storage_offsets[1:]), item.lengths), item, planner)
    else:
        tensor = torch.load(io.BytesIO(view), map_location="cpu", weights_only=True)
        _copy(_narrowed(tensor, item.storage_offsets, item.lengths), item, planner)


def _narrowed(tensor: Any, offsets: Sequence[int], lengths: Sequence[int]) -> Any:
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=False)):
        if length != tensor.size(dim):
            tensor = tensor.narrow(dim, offset, length)
    return tensor


def _copy(tensor: Any, item: Any, planner: Any) -> None:
    with torch.no_grad():
        target = planner.resolve_tensor(item).detach()
        target.copy_(tensor)
        planner.commit_tensor(item, target)
