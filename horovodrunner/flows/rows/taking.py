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

__all__ = ["RowsTaker", "data_directory", "with_rows"]


class RowsTaker(Protocol):
    """Takes in this task's rows of the data sets that travel with the run."""

    def take(self, scratch: Path) -> str:
        """Write them below a directory, and return what the peers have to know of them."""

    def finish(self, told: Sequence[str]) -> Path:
        """Return the directory of the data sets, given what :meth:`take` returned, by rank."""


async def with_rows(taker: RowsTaker | None, member: Member, scratch: Path) -> Member:
    """Take the rows in, and add to what the task tells its peers what they have to know of them."""
    if taker is None or member.problem:
        return member
    try:
        return replace(member, rows=await in_thread(taker.take, scratch))
    except DataError as error:
        return replace(member, problem=str(error), problem_kind=FailureKind.DATA)


def data_directory(taker: RowsTaker, members: Sequence[Member]) -> str:
    """Return where the worker finds the data sets, now that all tasks' rows are known."""
    return str(taker.finish([member.rows for member in members_by_rank(members)]))
