"""What a run that goes on from another run's checkpoint is told.

Runs in: the task (np < 0: the driver).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timezone

from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.call.record import calls_another_main, changes
from horovodrunner.flows.checkpoints.manifest import Manifest
from horovodrunner.flows.checkpoints.store import CheckpointStore

__all__ = ["Resumption"]


class Resumption:
    """Notes on partition 0, once in a run, that main goes on from another run's checkpoint."""

    def __init__(self, job: JobSpec, note: Callable[[str], None]) -> None:
        self._job = job
        self._note = note
        self._went_on_from: Manifest | None = None

    def found(self, manifest: Manifest) -> bool:
        """Return whether a checkpoint is of a run that was called with something else."""
        saver, record, location = manifest.run, self._job.record, self._job.checkpoint_location
        if record is None or location is None:
            return False
        if saver is not None and saver.run_id == record.run_id:  # an earlier attempt of this run
            return False
        if saver is None or not calls_another_main(saver, record):
            self._went_on_from = manifest
        found = [] if saver is None else changes(saver, record)
        if self._job.attempt == 1:  # later attempts are announced by the driver
            path = CheckpointStore(location, self._job.retention).path_of(manifest.step)
            for text in _describe_resumption(manifest, path, found):
                self._note(text)
        return bool(found)

    def main_returned(self, *, has_saved: bool) -> None:
        """Note that a run which went on from a checkpoint may have had nothing left to do."""
        if self._went_on_from is not None and not has_saved:
            self._note(
                f"main went on from step {self._went_on_from.step} and returned without saving a "
                "checkpoint. If it has trained nothing, its last epoch was reached before: raise "
                "the number of epochs, or start anew with resume=False"
            )


def _describe_resumption(manifest: Manifest, path: str, differences: Sequence[str]) -> list[str]:
    """Write that a run goes on from an earlier one's checkpoint, and what differs."""
    saved_at = datetime.fromisoformat(manifest.saved_at)
    age = _format_age((datetime.now(timezone.utc) - saved_at).total_seconds())
    unknown = " (what that was called with is not recorded)" if manifest.run is None else ""
    lines = [
        f"going on from step {manifest.step}, saved {age} by an earlier run{unknown}: {path}. "
        "resume=False starts anew"
    ]
    if differences:
        lines.append(
            "warning: this run differs from the one that saved that checkpoint: "
            f"{'; '.join(differences)}. What main loads from it, such as an optimizer's learning "
            "rate, replaces the new values"
        )
    return lines


def _format_age(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        if (count := int(seconds // length)) >= 1:
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"  # or in the future, by another machine's clock
