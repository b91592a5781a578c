"""Which ranks' parts belong together, where objects of one name differ from rank to rank.

Runs in: the worker. Stages of a pipeline are sharded over some ranks each, and all are ``model``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from horovodrunner.flows.checkpoints.worker.shards import Part
from horovodrunner.formatting import ranks_in_words

__all__ = ["Index", "parts_for"]

_EVERYBODY = -1


@dataclass(frozen=True)
class Index:
    """What one rank has written, and for each object which ranks' meshes it is divided over."""

    rank: int
    parts: Sequence[Part]
    groups: Mapping[str, Sequence[int]]


def parts_for(
    own_rank: int | None, indexes: Sequence[Index], content_of: Callable[[str], str]
) -> tuple[list[Part], dict[str, str]]:
    """Return the parts that a rank loads, and for some keys why they cannot be loaded.

    `own_rank` is None where this run has another number of ranks. Then stages that have parts of
    the same key have to be copies of each other; `content_of` tells files with the same content.
    """
    content_of = functools.cache(content_of)
    names = {str(part.path[0]) for index in indexes for part in index.parts}
    stages = {name: _stages(name, indexes) for name in names}
    found: list[Part] = []
    seen: dict[Any, tuple[set[int], str]] = {}
    clashes: dict[str, str] = {}
    for index in indexes:
        for part in index.parts:
            of_name = stages[str(part.path[0])]
            stage = next(each for each in of_name if index.rank in each)
            own = next((each for each in of_name if own_rank in each), None)
            if own is not None and own is not stage:
                continue
            found.append(part)
            content = content_of(part.file)
            first, of_first = seen.setdefault((part.key, part.offsets), (stage, content))
            if first is not stage and content != of_first:
                clashes[part.key] = (
                    f"{part.key!r} was saved by {_words(first)} and by {_words(stage)}, which did "
                    "not have the same: load it with as many ranks as saved it"
                )
    return found, clashes


def _stages(name: str, indexes: Sequence[Index]) -> list[set[int]]:
    """Join the ranks that share meshes; a rank of which nothing is known belongs to all."""
    joined: list[set[int]] = []
    for index in indexes:
        group = {index.rank, *index.groups.get(name, [_EVERYBODY])}
        if not any(part.path[0] == name for part in index.parts) and name not in index.groups:
            continue
        touching = [each for each in joined if each & group]
        joined = [each for each in joined if not each & group]
        joined.append(group.union(*touching))
    return joined


def _words(stage: set[int]) -> str:
    return ranks_in_words(stage - {_EVERYBODY})
