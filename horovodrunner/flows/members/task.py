"""How the tasks of a run exchange one text each. Runs in: the task."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable

from horovodrunner.wire.connection import Connection, connect
from horovodrunner.wire.job import JobSpec

__all__ = ["CONNECT_SECONDS", "Gathering"]

CONNECT_SECONDS = 10.0
"""How long a task tries to reach the driver before it takes Spark's way."""


class Gathering:
    """Exchanges a text through the driver; through Spark where not all tasks reach the driver.

    Parameters
    ----------
    job
        The run.
    partition
        This task's partition.
    all_gather
        Spark's: blocks until all tasks have called it, and gives all texts.
    """

    def __init__(
        self, job: JobSpec, partition: int, all_gather: Callable[[str], list[str]]
    ) -> None:
        self._job = job
        self._partition = partition
        self._all_gather = all_gather
        self.driver_is_out_of_reach = job.driver_address is None
        """Whether it is known already, so that nobody needs to try."""

    async def gather(self, text: str) -> list[str]:
        """Exchange the texts.

        Parameters
        ----------
        text
            This task's.

        Returns
        -------
        list of str
            All tasks', in the order of their partitions.

        Raises
        ------
        ConnectionError
            If the connection to the driver breaks meanwhile, or if Spark tries the stage again.
        """
        connection = await self._connect()
        if connection is not None:
            try:
                if (texts := await self._gather_at_driver(connection, text)) is not None:
                    return texts
            finally:
                await connection.close()
        return await asyncio.to_thread(self._all_gather, text)

    async def _connect(self) -> Connection | None:
        address = self._job.driver_address
        if address is None or self.driver_is_out_of_reach:
            return None
        try:
            return await connect(*address, self._job.token, CONNECT_SECONDS)
        except OSError:
            return None

    async def _gather_at_driver(self, connection: Connection, text: str) -> list[str] | None:
        connection.send("gather", text.encode(), run_id=self._job.run_id, partition=self._partition)
        answer = await connection.receive()
        if answer is None:
            # The driver may have told the others already, so Spark's way could wait for ever.
            raise ConnectionError("the connection to the driver broke while the tasks met")
        if answer.kind == "gathered":
            texts: list[str] = json.loads(zlib.decompress(answer.body))
            return texts
        if answer.kind == "refused":
            raise ConnectionError(str(answer.header.get("why")))
        return None
