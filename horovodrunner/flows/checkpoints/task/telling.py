"""What the user is told of checkpoints that are not stored. Runs in: partition 0's task."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from horovodrunner.formatting import ranks_in_words

__all__ = ["CheckpointNotes"]


class CheckpointNotes:
    """Writes the lines; `note` takes one for the user, `on_error` one about a checkpoint's loss."""

    def __init__(
        self, size: int, note: Callable[[str], None], on_error: Callable[[str], None]
    ) -> None:
        self._size = size
        self._note = note
        self._on_error = on_error
        self._noted: set[str] = set()

    def not_stored(self, step: int, problem: str | Exception) -> None:
        """Tell that a checkpoint could not be stored, and why."""
        if isinstance(problem, Exception):
            kind = "" if type(problem) is OSError else f"{type(problem).__name__}: "
            problem = f"{kind}{problem}"
        self._on_error(
            f"the checkpoint of step {step} was not stored: {problem}. Older checkpoints are intact"
        )

    def incomplete(self, step: int, missing: Iterable[int], why: str) -> None:
        """Tell that a checkpoint of all ranks lacks those of some."""
        count = self._size - len(set(missing))
        self._on_error(
            f"the checkpoint of step {step} has {count} of {self._size} ranks' files: {why}. It "
            "does not count; older checkpoints are intact"
        )

    def mixed(self, step: int, others: Iterable[int], *, is_stored: bool) -> None:
        """Tell that some ranks took a checkpoint for one of all ranks, and rank 0 did not.

        `is_stored` says that what rank 0 has saved counts already.
        """
        why = (
            f"objects are sharded, or of RandomState, on {ranks_in_words(others)} and not on rank "
            '0, which saves its own for all: give save_torch(..., ranks="all") on every rank'
        )
        if is_stored:
            self._on_error(f"the checkpoint of step {step} has what rank 0 saved, only: {why}")
        else:
            self.not_stored(step, why)

    def saved_in_haste(self, step: int) -> None:
        """Tell, once, that a checkpoint is skipped because a newer one waits."""
        self._once(
            f"checkpoints are saved faster than they can be stored: step {step} is skipped, the "
            "newest one wins (said once)"
        )

    def far_apart(self, step: int, missing: Iterable[int], others: int) -> None:
        """Tell, once, that a checkpoint is skipped because some ranks are far behind."""
        self._once(
            f"the ranks are far apart: step {step} is skipped, because {ranks_in_words(missing)} "
            f"had not saved it yet when {others} others waited, too (said once)"
        )

    def _once(self, text: str) -> None:
        about = text.partition(":")[0]
        if about not in self._noted:
            self._noted.add(about)
            self._note(text)
