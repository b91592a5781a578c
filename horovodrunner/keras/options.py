"""What a distributed optimizer was asked for. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import keras

__all__ = ["Options", "groups_of", "key", "native"]


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
        """Return itself: a copy of a process set would be another one."""
        return self

    def has_no_peers(self) -> bool:
        return not self.process_set.included() or self.process_set.size() == 1

    def settings(self) -> dict[str, Any]:
        """Return the arguments of Horovod's allreduce that both frameworks have."""
        return {
            "op": self.op,
            "process_set": self.process_set,
            "prescale_factor": 1.0 / self.gradient_predivide_factor,
            "postscale_factor": self.gradient_predivide_factor,
        }

    def without_local(
        self,
        grads: list[Any],
        variables: Sequence[Any],
        local: Collection[Hashable],
        divide: Callable[[Any, int], Any],
    ) -> list[int]:
        """Return the indices of the gradients to reduce, and scale the ranks' own in place."""
        shared = []
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            if key(variables[index]) not in local:
                shared.append(index)
            elif self.scales_local_gradients:
                grads[index] = divide(grad, self.process_set.size())
        return shared

    def grouped(self, indices: list[int], variables: Sequence[Any]) -> list[list[int]]:
        """Group the indices of what is reduced together."""
        asked = self.groups
        if isinstance(asked, Sequence):
            asked = [[key(variable) for variable in group] for group in asked]
        return groups_of(asked, indices, [key(variable) for variable in variables])


def groups_of(
    asked: int | Sequence[Sequence[Hashable]] | None, indices: list[int], keys: Sequence[Hashable]
) -> list[list[int]]:
    """Group indices of `keys`: into so many groups, or by the keys of each group.

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
    group_of = {each: number for number, group in enumerate(asked) for each in group}
    groups: dict[Hashable, list[int]] = {}
    for index in indices:
        groups.setdefault(group_of.get(keys[index], ("alone", index)), []).append(index)
    return list(groups.values())


def native(variable: Any) -> Any:
    """Return the framework's own variable, which may be in one of Keras's."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def key(variable: Any) -> Hashable:
    """Identify a variable: one of Keras's and the framework's own in it are the same."""
    return id(native(variable))
