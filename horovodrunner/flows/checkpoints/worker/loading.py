"""From a checkpoint's files into PyTorch's objects. Runs in: the worker.

What was whole may be sharded now, and the other way round; what was sharded may be so over another
number of ranks. No rank waits for another one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from horovodrunner.errors import ArgumentValueError, CheckpointError
from horovodrunner.flows.checkpoints.manifest import Manifest
from horovodrunner.flows.checkpoints.worker.source import DATA_NAME, INDEX_NAME, Source
from horovodrunner.flows.checkpoints.worker.staging import tensors_in
from horovodrunner.flows.checkpoints.worker.states import (
    Objects,
    canonical,
    has_sharded_parameters,
    is_optimizer,
    unwrapped,
)
from horovodrunner.random_state import RandomState

__all__ = ["Found", "Loading"]


class Found(Protocol):
    """The checkpoint that is loaded."""

    step: int
    world_size: int | None
    _differs: bool

    @property
    def _manifest(self) -> Manifest | None: ...
    @property
    def _own_rank(self) -> int | None: ...
    def source(self) -> Source: ...
    def _source_for(self, bytes_of_every_rank: int) -> Source: ...
    def __truediv__(self, name: str) -> Path: ...


class Loading:
    """Loads objects from one checkpoint, each of them whole or sharded there and here.

    `tell` takes a line for the user, and a key: it is to be shown once.
    """

    def __init__(self, objects: Objects, found: Found, tell: Callable[[str, str], object]) -> None:
        self._objects = objects
        self._tell = tell
        self._found = found
        self._reader: Any = None
        self._metadata: Any = None
        self._sharded: set[str] = set()
        if found.world_size is not None and _holds_shards(found.source()):
            from horovodrunner.flows.checkpoints.worker.shard_reader import ShardReader

            self._reader = ShardReader(found.source(), own_rank=found._own_rank)
            self._metadata = self._reader.read_metadata()
            self._sharded = {str(path[0]) for path in self._metadata.planner_data.values()}
            self._reader.read_from(found._source_for(self._bytes_of_whole_objects()))

    def _bytes_of_whole_objects(self) -> int:
        """Return what every rank reads alike of sharded objects, which are whole here."""
        whole = {
            name
            for name, item in self._objects.items.items()
            if name in self._sharded and not has_sharded_parameters(item)
        }
        paths = self._metadata.planner_data
        parts = self._metadata.storage_data.values()
        return sum(part.length for part in parts if paths[part.key][0] in whole)

    def load(self, name: str) -> None:
        """Load one object, and tell of settings that this has replaced."""
        item = self._objects.items[name]
        made_with = _settings(item)
        self._load(name, item)
        if self._found._differs and (changes := _changes(made_with, _settings(item))):
            self._tell(
                f"checkpoint.settings.{name}",
                f"checkpoint.load_torch() put the saved settings into {name!r}: {changes}. Set "
                "them after loading to use the new ones",
            )

    def _load(self, name: str, item: Any) -> None:
        has_own = (self._found / f"{name}.pt").exists()
        if name in self._sharded and not has_own:
            self._refuse_mixed(name)
            self._fill(name, self._reader, self._metadata)
            return
        if isinstance(item, RandomState) and not has_own and self._found.world_size is not None:
            self._tell(
                "checkpoint.random",
                "the checkpoint has no random state of this rank, which has new random numbers: it "
                f"is of {self._found.world_size} ranks",
            )
            return
        file = self._file_of(name)
        if not has_sharded_parameters(item):
            _load_whole(item, _read(file))
            return
        from horovodrunner.flows.checkpoints.worker.shard_reader import MemoryReader

        whole = _read(file, mmap=isinstance(file, Path))
        if is_optimizer(item):
            whole = self._objects.named(name, whole)
        elif isinstance(item, torch.nn.Module):
            whole = _as_unwrapped(whole, own=self._objects.state(name))
        reader = MemoryReader({name: whole})
        self._fill(name, reader, reader.read_metadata())

    def _file_of(self, name: str) -> Path | io.BytesIO:
        """Return the file of an object that a rank has whole; rank 0's, with other ranks now."""
        path = self._found / f"{name}.pt"
        if path.exists():
            return path
        held = {each.name for each in path.parent.iterdir()}
        if self._found.world_size is not None:
            source = self._found.source()
            files = source.files()
            if (of_rank_0 := f"rank-0/{name}.pt") in files:
                self._tell_of_other_ranks(f"{name}.pt")
                (view,) = source.read([(of_rank_0, 0, files[of_rank_0])])
                return io.BytesIO(view)
            held = {each.removeprefix("rank-0/") for each in files if each.startswith("rank-0/")}
        names = [*sorted(self._sharded), *sorted(held - {INDEX_NAME, DATA_NAME})]
        raise CheckpointError(
            f"the checkpoint of step {self._found.step} has no {name}.pt, only {', '.join(names)}: "
            "load_torch() takes the names that save_torch() was given"
        )

    def _refuse_mixed(self, name: str) -> None:
        """Refuse what is whole on one rank and sharded on others, where no rank knows which."""
        if self._found._own_rank is None and self._found.world_size is not None:
            whole = [f for f in self._found.source().files() if f.endswith(f"/{name}.pt")]
            if whole:
                raise CheckpointError(
                    f"{name!r} was saved whole ({whole[0]}) by some of the "
                    f"{self._found.world_size} ranks of the checkpoint of step {self._found.step} "
                    "and sharded by others: load it with as many ranks"
                )

    def _tell_of_other_ranks(self, file: str) -> None:
        """Say that what a rank other than 0 saved is left aside, if it is something else."""
        manifest = self._found._manifest
        size = self._found.world_size
        if manifest is None or size is None:
            return
        if self._found._own_rank is not None:
            self._tell(
                f"checkpoint.others.{file}",
                f"rank {self._found._own_rank} saved no {file}, and has loaded rank 0's",
            )
            return
        saved = [manifest.files_of(rank).get(file) for rank in range(size)]
        if len({each.sha256 for each in saved if each is not None}) > 1:
            self._tell(
                f"checkpoint.others.{file}",
                f"the {size} ranks of the checkpoint did not save the same {file}, and this run "
                "has another number of ranks: every rank has loaded rank 0's",
            )

    def _fill(self, name: str, reader: Any, metadata: Any) -> None:
        item = self._objects.items[name]
        try:
            if is_optimizer(item):
                self._fill_optimizer(name, reader, metadata)
            else:
                self._fill_in_place(name, reader, metadata)
        except ArgumentValueError:
            raise
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"the checkpoint of step {self._found.step} does not fit {name!r}: {error}. Make "
                "it as it was when it was saved, or load the parts that fit with "
                "torch.distributed.checkpoint.load() and checkpoint.torch_reader()"
            ) from error

    def _fill_in_place(self, name: str, reader: Any, metadata: Any) -> None:
        from horovodrunner.flows.checkpoints.worker.shard_reader import load_into

        item, state = self._objects.items[name], self._objects.state(name)
        if any(each.is_meta for each in tensors_in(state)):
            raise ValueError(
                "it is on the device 'meta', which has no memory: call to_empty(device=...) first"
            )
        is_module = isinstance(item, torch.nn.Module)
        saved = {str(path[1]) for path in metadata.planner_data.values() if path[0] == name}
        if is_module and (unexpected := sorted(saved - set(state))):
            raise ValueError(f"it has no {', '.join(unexpected[:5])}, which the checkpoint has")
        load_into({name: state}, reader, metadata)
        if is_module:  # for its hooks, and what is no tensor; the tensors are its own
            own = unwrapped(item).state_dict(keep_vars=True)
            unwrapped(item).load_state_dict({key: state[canonical(key)] for key in own})
        else:
            item.load_state_dict(state)

    def _fill_optimizer(self, name: str, reader: Any, metadata: Any) -> None:
        from horovodrunner.flows.checkpoints.worker.shard_reader import load_into

        optimizer = self._objects.items[name]
        own = self._objects.names_by_group(name)
        groups = [group["params"] for group in optimizer.param_groups]
        parameters = {
            key: p
            for keys, group in zip(own, groups, strict=True)
            for key, p in zip(keys, group, strict=True)
        }
        state: dict[str, Any] = {}
        for key, path in metadata.planner_data.items():
            if path[0] == name:
                entry = metadata.state_dict_metadata[key]
                _put(state, path, _room_for(entry, parameters.get(str(path[2]))))
        load_into(state, reader, metadata)
        optimizer.load_state_dict(_numbered(state[name], own))


def _read(file: Path | io.BytesIO, *, mmap: bool = False) -> Any:
    """Read what torch.save() wrote, NumPy's random state and other objects included.

    The run's own checkpoints are as trusted as the code that it executes.
    """
    return torch.load(file, map_location="cpu", mmap=mmap, weights_only=False)


def _load_whole(item: Any, state: Any) -> None:
    """Load an object's state; a module may be wrapped here and not there, or the other way round.

    The wrappers are DistributedDataParallel and those of torch.compile.
    """
    if isinstance(item, torch.nn.Module) and state.keys() != item.state_dict().keys():
        inner = unwrapped(item)
        own = {canonical(key): key for key in inner.state_dict()}
        renamed = {own.get(k, k): v for k, v in _as_unwrapped(state, own).items()}
        if renamed.keys() == set(own.values()):
            item, state = inner, renamed
    item.load_state_dict(state)


def _as_unwrapped(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's state with the keys that it has without wrappers."""
    named = {canonical(key): value for key, value in state.items()}
    is_of_ddp = all(k.startswith("module.") for k in named) and not any(
        k.startswith("module.") for k in own
    )
    return {key.removeprefix("module." * is_of_ddp): value for key, value in named.items()}


def _put(state: dict[str, Any], path: tuple[str | int, ...], value: Any) -> None:
    """Put a value where it belongs in a nested state dict of an optimizer."""
    inner: Any = state
    key: Any
    for key, following in zip(path, [*path[1:], None], strict=True):
        if isinstance(inner, list):
            inner.extend([None] * (key + 1 - len(inner)))
        if following is None:
            inner[key] = value
            return
        found = inner[key] if isinstance(inner, list) else inner.get(key)
        if found is None:
            found = inner[key] = [] if isinstance(following, int) else {}
        inner = found


def _room_for(entry: Any, parameter: Any) -> Any:
    """Return the tensor to read into, divided like its parameter; None for an object."""
    if not hasattr(entry, "size"):
        return None
    if parameter is not None and parameter.shape == entry.size:
        return torch.empty_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _numbered(state: Mapping[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """Put numbers for the names of parameters again, as an optimizer's load_state_dict() wants."""
    saved = state["param_groups"]
    if len(saved) != len(names):
        raise ValueError(f"it has {len(names)} groups of parameters, the checkpoint {len(saved)}")
    for number, (group, own) in enumerate(zip(saved, names, strict=True)):
        if differing := sorted(set(group["params"]) ^ set(own)):
            raise ValueError(
                f"group {number} has {len(own)} parameters, the checkpoint's has "
                f"{len(group['params'])}; {differing[0]!r} is in one of them only"
            )
    numbers = {key: n for n, key in enumerate(key for group in names for key in group)}
    return {
        "state": {numbers.get(key, key): value for key, value in state.get("state", {}).items()},
        "param_groups": [
            {**group, "params": [numbers[key] for key in own]}
            for group, own in zip(saved, names, strict=True)
        ],
    }


def _holds_shards(source: Source) -> bool:
    return any(path.endswith(f"/{INDEX_NAME}") for path in source.files())


def _settings(item: Any) -> list[dict[str, Any]]:
    """List an optimizer's settings by group; a scheduler's changes to lr are none."""
    return [
        {
            name: value
            for name, value in {**group, "lr": group.get("initial_lr", group.get("lr"))}.items()
            if isinstance(value, (bool, int, float, tuple)) and name != "initial_lr"
        }
        for group in getattr(item, "param_groups", ())
    ]


def _changes(made_with: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> str:
    """Write which of an optimizer's new settings were replaced."""
    return ", ".join(
        dict.fromkeys(
            f"{setting} is {value!r} again, not {new[setting]!r}"
            for new, old in zip(made_with, loaded, strict=False)
            for setting, value in old.items()
            if setting in new and new[setting] != value
        )
    )
