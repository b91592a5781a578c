"""The states of PyTorch's objects, and their files. Runs in: the worker.

Objects that every rank has whole are files of rank 0: ``model.pt``. Where one is sharded (FSDP2,
tensor parallelism), each rank writes its parts of the sharded ones, as shards.py has them, and the
others whole. The keys are those of ``torch.distributed.checkpoint.state_dict``: a parameter's
fully qualified name, whatever the module is wrapped in, also in the states of optimizers.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from horovodrunner.errors import ArgumentValueError
from horovodrunner.flows.checkpoints.worker.staging import (
    Copies,
    is_sharded,
    tensors_in,
    without_collections,
)
from horovodrunner.random_state import RandomState

__all__ = ["Objects", "States", "canonical", "has_sharded_parameters", "is_optimizer", "unwrapped"]

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""Attributes that torch.compile and the like put into a parameter's name."""


@dataclass
class States:
    """What a rank has to write."""

    whole: dict[str, Any]
    sharded: dict[str, Any]
    groups: dict[str, list[int]] = field(default_factory=dict)
    """The ranks over which each of the sharded ones is divided."""
    parts: list[Any] = field(default_factory=list)
    """What this rank has to write of sharded ones that were copied."""
    own: dict[str, Any] = field(default_factory=dict)
    """What every rank has another one of: random numbers."""
    every_rank_writes: bool = False
    """Also what it has whole, because main says so."""

    @property
    def is_of_all(self) -> bool:
        """Whether every rank has to write its own, and not rank 0 alone."""
        return bool(self.groups or self.own or self.every_rank_writes)

    @without_collections()
    def copied(self) -> States:
        """Return a copy that main does not change, whatever it does with its tensors."""
        copies = Copies()
        whole, sharded = copies.of_state((self.whole, self.sharded))
        copies.finish()
        parts = self._parts_of(sharded, copies.local) if sharded else []
        return replace(self, whole=whole, sharded={}, parts=parts)

    def write(self, directory: Path, *, is_rank_0: bool) -> None:
        """Write this rank's files."""
        whole = self.whole if self.groups or self.every_rank_writes or is_rank_0 else {}
        for name, state in {**whole, **self.own}.items():
            torch.save(state, directory / f"{name}.pt")
        if self.groups:
            from horovodrunner.flows.checkpoints.worker.shards import write_parts

            parts = self._parts_of(self.sharded, {}) if self.sharded else self.parts
            write_parts(parts, directory, self.groups)

    def _parts_of(self, sharded: dict[str, Any], local: dict[int, Any]) -> list[Any]:
        """List what this rank writes: its parts, and on the lowest rank what all have alike."""
        from horovodrunner.flows.checkpoints.worker.shards import parts_of

        rank = torch.distributed.get_rank()
        plain = {name for name, ranks in self.groups.items() if rank == min(ranks)}
        return parts_of(sharded, plain, local)


class Objects:
    """Modules, optimizers, schedulers and the like, by the names that main gives them."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self.items = dict(objects)

    @functools.cached_property
    def _names(self) -> dict[int, tuple[str, str]]:
        """The module and the key of each parameter, by its id."""
        names: dict[int, tuple[str, str]] = {}
        for name, item in self.items.items():
            if isinstance(item, torch.nn.Module):
                for key, parameter in unwrapped(item).named_parameters():
                    names.setdefault(id(parameter), (name, canonical(key)))
        return names

    @without_collections()
    def states(self, *, every_rank_writes: bool = False) -> States:
        """Return the state of each; tensors are those of the objects, not copies."""
        whole: dict[str, Any] = {}
        sharded: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for name, item in self.items.items():
            if isinstance(item, RandomState):
                own[name] = item.state_dict()
            elif has_sharded_parameters(item):
                sharded[name] = self.state(name)
            else:
                self._refuse_flattened(name)
                state = item.state_dict()
                (sharded if is_sharded(state) else whole)[name] = state
        groups = {name: _ranks_of(self.items[name], state) for name, state in sharded.items()}
        return States(whole, sharded, groups, own=own, every_rank_writes=every_rank_writes)

    def _refuse_flattened(self, name: str) -> None:
        """Refuse an optimizer of FSDP1, which has a part of the state and does not say which."""
        fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
        item = self.items[name]
        if fsdp is None or not is_optimizer(item) or not item.state_dict()["state"]:
            return
        own = {id(parameter) for group in item.param_groups for parameter in group["params"]}
        for module in self.items.values():
            if (
                isinstance(module, torch.nn.Module)
                and any(isinstance(each, fsdp) for each in module.modules())
                and any(id(parameter) in own for parameter in module.parameters())
            ):
                raise ArgumentValueError(
                    f"{name!r} is an optimizer of a FullyShardedDataParallel (FSDP1), of whose "
                    "state each rank has a part without a name: shard the module with "
                    "torch.distributed.fsdp.fully_shard (FSDP2), or gather the state with "
                    "FullyShardedDataParallel.optim_state_dict() and use checkpoint.save()"
                )

    def state(self, name: str) -> Any:
        """Return the state of an object with keys that do not depend on how it is wrapped."""
        item = self.items[name]
        if isinstance(item, torch.nn.Module):
            # keep_vars: to detach a DTensor takes a tenth of a millisecond
            state = unwrapped(item).state_dict(keep_vars=True)
            return {canonical(key): value for key, value in state.items()}
        if is_optimizer(item):
            return self.named(name, item.state_dict())
        return item.state_dict()

    def named(self, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
        """Put the names of parameters for their numbers in an optimizer's state."""
        names: dict[int, str] = {}
        groups = []
        for own, packed in zip(self.names_by_group(name), state["param_groups"], strict=True):
            names.update(zip(packed["params"], own, strict=True))
            groups.append({**packed, "params": own})
        values = {names.get(number, number): value for number, value in state["state"].items()}
        return {"state": values, "param_groups": groups}

    def names_by_group(self, name: str) -> list[list[str]]:
        """Return the names of an optimizer's parameters, those of several modules with theirs."""
        groups = [group["params"] for group in self.items[name].param_groups]
        unknown = [p for group in groups for p in group if id(p) not in self._names]
        if unknown:
            raise ArgumentValueError(
                f"{len(unknown)} of the parameters of {name!r} are of no module that is given with "
                f"it ({', '.join(self.items)}), and sharded state goes by their names: name the "
                f"module, too, save_torch(step, model=model, {name}={name})"
            )
        found = [[self._names[id(p)] for p in group] for group in groups]
        is_of_one = len({module for group in found for module, _ in group}) == 1
        return [
            [key if is_of_one else f"{module}.{key}" for module, key in group] for group in found
        ]


def is_optimizer(item: Any) -> bool:
    """Return whether an object has groups of parameters."""
    return hasattr(item, "param_groups") and hasattr(item, "state_dict")


def has_sharded_parameters(item: Any) -> bool:
    """Return whether a module or an optimizer has parameters that each rank has a part of."""
    if isinstance(item, torch.nn.Module):
        return any(map(is_sharded, itertools.chain(item.parameters(), item.buffers())))
    return is_optimizer(item) and is_sharded([group["params"] for group in item.param_groups])


def _ranks_of(item: Any, state: Any) -> list[int]:
    """Return the ranks of an object's meshes, which stages of a pipeline have for themselves."""
    # before its first step, an optimizer's state has no tensor
    groups = [group["params"] for group in item.param_groups] if is_optimizer(item) else []
    found = (getattr(tensor, "device_mesh", None) for tensor in tensors_in([state, groups]))
    meshes = {id(mesh): mesh for mesh in found if mesh is not None}
    return sorted({int(rank) for mesh in meshes.values() for rank in mesh.mesh.flatten()})


def unwrapped(module: Any) -> Any:
    """Return a module without what torch.compile and DistributedDataParallel put around it."""
    while True:
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module


def canonical(key: str) -> str:
    """Return a parameter's name without what wraps its modules."""
    if not any(wrapper in key for wrapper in _WRAPPERS):
        return key
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)
