"""Tensors of which every rank holds a part, as files of each rank's. Runs in: the worker.

::

    rank-2/shards.bin    the parts that rank 2 writes, one after the other, as they are in memory
          /shards.json   each one's key, dtype, offsets in the whole tensor, place in the file

Nothing is agreed on with other ranks: each knows from a tensor's placement whether it is the one
to write its part. The keys are those of ``torch.distributed.checkpoint``, whose planner finds the
parts. Only its public names are used here, as torch 2.5 to 2.13 have them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.tensor import DTensor

from horovodrunner.flows.checkpoints.worker.source import DATA_NAME, INDEX_NAME
from horovodrunner.flows.checkpoints.worker.staging import identity

__all__ = ["ALIGNMENT", "Content", "Part", "parts_of", "read_index", "write_parts"]

ALIGNMENT = 64
"""Bytes; parts begin at multiples of it, and so does the end of the file."""

_FORMAT = 1

Content = Any
"""A tensor, or the bytes of what is none."""


@dataclass(frozen=True)
class Part:
    """A tensor's part, or an object that is none, and where it is in its file.

    `encoding` is ``"raw"`` for the elements in C order, ``"torch"`` for what ``torch.save`` wrote.
    `size` is that of the whole tensor, None for an object.
    """

    key: str
    path: tuple[str | int, ...]
    encoding: str
    size: tuple[int, ...] | None = None
    dtype: str = ""
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    file: str = DATA_NAME
    offset: int = 0
    length: int = 0


def parts_of(
    state: Mapping[str, Any], plain: Collection[str], local: Mapping[int, Any]
) -> list[tuple[Part, Content]]:
    """List what this rank has to write of several objects' nested state dicts, by their names.

    `plain` names those of which it also writes what all ranks have alike. `local` has copies of
    what DTensors have here, by their ids. There may be no process group: main may have left it.
    """
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(state), is_coordinator=True)
    flat = planner.state_dict
    return [(part, _content(flat[part.key], local)) for part in _planned(planner, plain)]


_last_plan: tuple[Any, list[Part]] = (None, [])


def _planned(planner: Any, plain: Collection[str]) -> list[Part]:
    """Return what this rank has to write; the same as last time, if all is divided as it was.

    To find out takes a third of a millisecond for each tensor.
    """
    global _last_plan
    values = planner.state_dict
    layout = [sorted(plain), *((key, _layout(value)) for key, value in values.items())]
    if _last_plan[0] == layout:
        return _last_plan[1]
    plan = planner.create_local_plan()
    parts = []
    for item in plan.items:
        key, path = item.index.fqn, tuple(plan.planner_data[item.index.fqn])
        value = values[key]
        if _is_first_replica(value) if isinstance(value, DTensor) else path[0] in plain:
            parts.append(_part(key, path, item, value))
    _last_plan = layout, parts
    return parts


def _layout(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.shape, value.dtype, value.placements, value.device_mesh
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)


def _part(key: str, path: tuple[str | int, ...], item: Any, value: Any) -> Part:
    if item.type == WriteItemType.BYTE_IO:
        return Part(key, path, "torch")
    data = item.tensor_data
    return Part(
        key,
        path,
        "raw" if _is_raw(_local(value)) else "torch",
        size=tuple(data.size),
        dtype=str(value.dtype).removeprefix("torch."),
        offsets=tuple(data.chunk.offsets),
        sizes=tuple(data.chunk.sizes),
    )


def _content(value: Any, local: Mapping[int, Any]) -> Content:
    if isinstance(value, torch.Tensor):
        return local[id(value)] if id(value) in local else _local(value)
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _local(tensor: Any) -> Any:
    with torch.no_grad():  # or the copy would be one for autograd
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _is_first_replica(tensor: Any) -> bool:
    """Whether no rank before this one in the tensor's mesh holds the same part."""
    coordinate = tensor.device_mesh.get_coordinate()
    return all(
        place == 0
        for place, placement in zip(coordinate, tensor.placements, strict=True)
        if placement.is_replicate()
    )


def _is_raw(tensor: Any) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
    )


def write_parts(
    parts: Sequence[tuple[Part, Content]],
    directory: Path,
    groups: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write the parts into one file and beside it what they are.

    `groups` has for each object the ranks of the meshes that it is divided over.
    """
    placed: list[Part] = []
    places: dict[Hashable, tuple[int, int]] = {}
    with (directory / DATA_NAME).open("wb") as file:
        for part, content in parts:
            known = id(content) if isinstance(content, bytes) else identity(content)
            if known not in places:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                begin = file.tell()
                if part.size is None or 0 not in part.sizes:
                    file.write(_bytes_of(part, content))
                places[known] = begin, file.tell() - begin
            begin, length = places[known]
            placed.append(replace(part, offset=begin, length=length))
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
    described = [asdict(part) for part in placed]
    index = {"format": _FORMAT, "groups": dict(groups or {}), "parts": described}
    (directory / INDEX_NAME).write_text(json.dumps(index))


def _bytes_of(part: Part, content: Content) -> Any:
    if isinstance(content, bytes):
        return content
    if part.encoding == "raw":
        whole = content.cpu().resolve_conj().resolve_neg().contiguous()
        return whole.reshape(-1).view(torch.uint8).numpy()
    buffer = io.BytesIO()
    torch.save(content.cpu().clone(), buffer)
    return buffer.getbuffer()


def read_index(
    text: bytes | memoryview, directory: str = ""
) -> tuple[list[Part], dict[str, list[int]]]:
    """Read what is in a rank's file, and the objects' groups.

    `directory` is put before the file's name.
    """
    index = json.loads(bytes(text))
    if index.get("format") != _FORMAT:
        raise ValueError(
            f"the format of {directory}{INDEX_NAME} is {index.get('format')!r}; known is {_FORMAT}"
        )
    parts = [_from_json(fields, directory) for fields in index["parts"]]
    return parts, index.get("groups", {})


def _from_json(fields: dict[str, Any], directory: str) -> Part:
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Part(**{**fields, **lists, "file": directory + fields["file"]})
