"""When a task takes in the rows that travel with a run. Runs in: the task (np < 0: the driver)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from horovodrunner.errors import DataError
from horovodrunner.flows.outcome.outcome import FailureKind
from horovodrunner.placement.topology import Member, members_by_rank
from horovodrunner.wire.upload import in_thread

__all__ = ["RowsTaker", "data_directories", "with_rows"]


class RowsTaker(Protocol):
    """Takes in the rows of the data sets that travel with the run, for this task's workers."""

    def take(self, scratch: Path) -> tuple[str, ...]:
        """Write them below a directory; return what the peers have to know, for each worker."""

    def finish(self, told: Sequence[str]) -> list[Path]:
        """Return the directories of the data sets: one for each worker, or one for all.

        `told` is what :meth:`take` returned on all tasks, by rank.
        """


async def with_rows(taker: RowsTaker | None, member: Member, scratch: Path) -> Member:
    """Take the rows in, and add to what the task tells its peers what they have to know of them."""
    if taker is None or member.problem:
        return member
    try:
        return replace(member, rows=await in_thread(taker.take, scratch))
    except DataError as error:
        return replace(member, problem=str(error), problem_kind=FailureKind.DATA)


def data_directories(taker: RowsTaker, members: Sequence[Member]) -> list[Path]:
    """Return where the workers find the data sets, now that all tasks' rows are known."""
    tasks = dict.fromkeys(member.partition for member in members_by_rank(members))
    rows = {member.partition: member.rows for member in members}
    return taker.finish([told for partition in tasks for told in rows[partition]])
