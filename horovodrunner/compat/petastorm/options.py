"""The arguments that all ways to read take. Runs in: the worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from horovodrunner.compat.petastorm.transform import TransformSpec
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError
from horovodrunner.validation import integer

__all__ = ["ReaderOptions"]

_WITHOUT_EFFECT = {
    "cache_extra_settings",
    "cache_location",
    "cache_row_size_estimate",
    "cache_size_limit",
    "cache_type",
    "convert_early_to_numpy",
    "hdfs_driver",
    "pyarrow_serialize",
    "results_queue_size",
    "shuffle_row_drop_partitions",
    "zmq_copy_buffers",
}
_CHOOSES_ROWS = ("predicate", "filters", "rowgroup_selector")


@dataclass(frozen=True)
class ReaderOptions:
    """What to read, and how: Petastorm's names, checked when it is made."""

    schema_fields: Sequence[str] | None = None
    reader_pool_type: str = "thread"
    workers_count: int = 10
    seed: int | None = None
    shuffle_rows: bool = False
    shuffle_row_groups: bool = True
    num_epochs: int | None = 1
    cur_shard: int | None = None
    shard_count: int | None = None
    transform_spec: TransformSpec | None = None

    @classmethod
    def checked(cls, arguments: Mapping[str, Any]) -> ReaderOptions:
        """Leave out arguments that mean nothing here, and refuse those that cannot be followed."""
        own = dict(arguments)
        for name in _CHOOSES_ROWS:
            if own.pop(name, None) is not None:
                raise ArgumentValueError(
                    f"{name}=...: choosing rows while reading is not supported, since the ranks "
                    "would have different numbers of them. Filter them in Spark: df.filter(...)"
                )
        if "shard_seed" in own:
            shard_seed = own.pop("shard_seed")
            own["seed"] = own.get("seed") if shard_seed is None else shard_seed
        own = {name: value for name, value in own.items() if name not in _WITHOUT_EFFECT}
        unknown = sorted(own.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise ArgumentTypeError(
                f"{', '.join(unknown)}: there is no such argument; there are "
                + ", ".join(cls.__dataclass_fields__)
            )
        return cls(**own)

    def __post_init__(self) -> None:
        if self.reader_pool_type not in ("thread", "process", "dummy"):
            raise ArgumentValueError(
                f"reader_pool_type={self.reader_pool_type!r}: it is 'thread', 'process' or 'dummy'"
            )
        whole = {
            "num_epochs": 1,
            "workers_count": 1,
            "seed": None,
            "shard_count": 1,
            "cur_shard": 0,
        }
        for name, least in whole.items():
            value = getattr(self, name)
            if value is not None or name == "workers_count":
                object.__setattr__(self, name, integer(name, value, least))
        if self.transform_spec is not None and not isinstance(self.transform_spec, TransformSpec):
            raise ArgumentTypeError(
                f"transform_spec={self.transform_spec!r}: give a TransformSpec(function, ...)"
            )
        if (self.cur_shard is None) != (self.shard_count is None):
            raise ArgumentValueError(
                f"cur_shard={self.cur_shard!r}, shard_count={self.shard_count!r}: give both, "
                "hvd.rank() and hvd.size() say, or none to read everything"
            )
        shard, shards = self.shard
        if shard >= shards:
            raise ArgumentValueError(
                f"cur_shard={shard}: with shard_count={shards} shards go from 0 to {shards - 1}"
            )

    @property
    def shard(self) -> tuple[int, int]:
        """Which part is read, of how many."""
        return self.cur_shard or 0, self.shard_count or 1

    @property
    def threads(self) -> int:
        """How many threads read or transform."""
        return 0 if self.reader_pool_type == "dummy" else self.workers_count
