"""When a task takes in rows that travel with the run. Runs in: the task (np < 0: the driver)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from horovodrunner.errors import DataError
from horovodrunner.flows.checkpoints.task import in_thread
from horovodrunner.placement.topology import Member, members_by_rank
from horovodrunner.wire.job import FailureKind

__all__ = ["RowsTaker", "data_directory", "with_rows"]


class RowsTaker(Protocol):
    """Takes in this task's rows of the data sets that travel with the run."""

    def take(self, scratch: Path) -> str:
        """Write them below a directory, and give what the peers have to know of them."""

    def finish(self, told: Sequence[str]) -> Path:
        """Give the directory of the data sets, once all tasks, by rank, have told what they got."""


async def with_rows(taker: RowsTaker | None, member: Member, scratch: Path) -> Member:
    """Take the rows in, unless the task has a problem already.

    Parameters
    ----------
    taker
        Takes them; None when there are none.
    member
        What the task tells its peers.
    scratch
        The task's directory.

    Returns
    -------
    Member
        With what the peers have to know of the rows, or with what is wrong with them.
    """
    if taker is None or member.problem:
        return member
    try:
        return replace(member, rows=await in_thread(taker.take, scratch))
    except DataError as error:
        return replace(member, problem=str(error), problem_kind=FailureKind.DATA)


def data_directory(taker: RowsTaker, members: Sequence[Member]) -> str:
    """Finish the data sets with what all tasks have told.

    Parameters
    ----------
    taker
        Has taken this task's rows.
    members
        All tasks.

    Returns
    -------
    str
        Where the worker finds them.
    """
    return str(taker.finish([member.rows for member in members_by_rank(members)]))
