"""Where the tasks of a run exchange one text each. Runs in: the driver.

Spark's own ``allGather`` looks once a second whether it is complete, so it takes a second whatever
it exchanges (``BarrierTaskContext.runBarrier``). It remains the way of tasks that cannot reach the
driver; and since all tasks must go the same way, it is the driver that decides.
"""

from __future__ import annotations

import asyncio
import json
import zlib

from horovodrunner.wire.connection import Connection
from horovodrunner.wire.frames import Frame

__all__ = ["GatherPoint"]

PATIENCE_SECONDS = 15.0
"""How long the first task waits for the last one, which may be unable to reach the driver."""


class GatherPoint:
    """Takes a text from every task and gives each of them all texts.

    Parameters
    ----------
    size
        Number of tasks.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._texts: dict[int, str] = {}
        self._seen: set[int] = set()
        self._decided = asyncio.Event()
        self._body: bytes | None = None

    async def serve(self, connection: Connection, frame: Frame) -> bool:
        """Take one task's text, wait for the others', and answer.

        Parameters
        ----------
        connection
            To the task.
        frame
            Its ``gather`` frame.

        Returns
        -------
        bool
            False if the task has gathered before: Spark is trying the stage a second time.
        """
        partition = int(frame.header["partition"])
        if partition in self._seen:
            return False
        if not self._seen:
            asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._decided.set)
        self._seen.add(partition)
        if self._decided.is_set():  # too late
            connection.send("gather-with-spark")
            return True
        self._texts[partition] = bytes(frame.body).decode()
        if len(self._texts) == self._size:
            ordered = [self._texts[number] for number in sorted(self._texts)]
            self._body = zlib.compress(json.dumps(ordered).encode(), 1)
            self._decided.set()
        decided = asyncio.ensure_future(self._decided.wait())
        gone = asyncio.ensure_future(connection.receive())
        try:
            await asyncio.wait([decided, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            decided.cancel()
            gone.cancel()
            await asyncio.gather(decided, gone, return_exceptions=True)
        if not self._decided.is_set():
            del self._texts[partition]
        elif self._body is None:
            connection.send("gather-with-spark")
        else:
            connection.send("gathered", self._body)
        return True
