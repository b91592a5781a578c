"""The checkpoints that are kept, as users see them. Runs in: the driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from horovodrunner.flows.checkpoints.store import CheckpointStore

__all__ = ["SavedCheckpoint", "saved_in"]


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is kept.

    Parameters
    ----------
    step
        The step that :func:`horovodrunner.checkpoint.save` was given.
    path
        Its directory: a path on the driver, or a URL.
    size
        Bytes of all its files.
    time
        When it was complete, in UTC.
    metrics
        Numbers to compare it by: those that it was saved with, or that were reported before.
    world_size
        How many ranks have saved their own into it; None: rank 0 has for all.
    """

    step: int
    path: str
    size: int
    time: datetime
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    world_size: int | None = None


def saved_in(store: CheckpointStore) -> tuple[SavedCheckpoint, ...]:
    """List the checkpoints of a store, the newest one last."""
    return tuple(
        SavedCheckpoint(
            step=manifest.step,
            path=store.path_of(manifest.step),
            size=manifest.size,
            time=datetime.fromisoformat(manifest.saved_at),
            metrics=manifest.metrics,
            world_size=manifest.world_size,
        )
        for manifest in reversed(store.manifests())
    )
