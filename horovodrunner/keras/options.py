"""What a distributed optimizer was asked for. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Options", "groups_of"]


@dataclass(frozen=True)
class Options:
    """What ``DistributedOptimizer()`` was asked for; see there."""

    name: str
    device_dense: str
    device_sparse: str
    compression: Any
    sparse_as_dense: bool
    gradient_predivide_factor: float
    op: Any
    passes_per_step: int
    averages_passes: bool
    groups: int | Sequence[Sequence[Any]] | None
    process_set: Any
    scales_local_gradients: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> Options:
        """Give itself: a copy of a process set would be another one."""
        return self


def groups_of(
    asked: int | Sequence[Sequence[Hashable]] | None, indices: list[int], keys: Sequence[Hashable]
) -> list[list[int]]:
    """Group what is reduced together.

    Parameters
    ----------
    asked
        The number of groups; or the keys of each group, the others being groups of their own; or
        None for no groups.
    indices
        What is to be reduced, as indices of `keys`.
    keys
        A key for each variable.

    Returns
    -------
    list of list of int
        The indices, group by group.

    Examples
    --------
    >>> groups_of(2, [0, 1, 3], "abcd")
    [[0, 1], [3]]
    >>> groups_of(["ad"], [0, 1, 3], "abcd")
    [[0, 3], [1]]
    """
    if asked is None:
        return [[index] for index in indices]
    if isinstance(asked, int):
        size = -(-len(indices) // asked)
        return [indices[start : start + size] for start in range(0, len(indices), size or 1)]
    group_of = {key: number for number, group in enumerate(asked) for key in group}
    groups: dict[Hashable, list[int]] = {}
    for index in indices:
        groups.setdefault(group_of.get(keys[index], ("alone", index)), []).append(index)
    return list(groups.values())
