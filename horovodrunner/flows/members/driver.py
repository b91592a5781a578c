"""Where the tasks of a run exchange one text each. Runs in: the driver.

Spark's own ``allGather`` looks once a second whether it is complete, so it takes a second whatever
it exchanges (``BarrierTaskContext.runBarrier``). It remains the way of tasks that cannot reach the
driver; and since all tasks must go the same way, it is the driver that decides.
"""

from __future__ import annotations

import asyncio
import json
import zlib

from horovodrunner.wire.events import Gather, Gathered, GatherWithSpark
from horovodrunner.wire.stream import Connection

__all__ = ["GatherPoint"]

PATIENCE_SECONDS = 15.0
"""How long the first task waits for the last one, which may be unable to reach the driver."""


class GatherPoint:
    """Takes a text from every task and gives each of them all texts."""

    def __init__(self, tasks: int) -> None:
        self._tasks = tasks
        self._texts: dict[int, str] = {}
        self._seen: set[int] = set()
        self._decided = asyncio.Event()
        self._answer: Gathered | GatherWithSpark = GatherWithSpark()

    async def serve(self, connection: Connection, event: Gather) -> bool:
        """Answer a task once all have come; False if it came before: Spark tries a second time."""
        if event.partition in self._seen:
            return False
        if not self._seen:
            asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._decided.set)
        self._seen.add(event.partition)
        if self._decided.is_set():  # too late
            connection.send(GatherWithSpark())
            return True
        self._texts[event.partition] = bytes(event.text).decode()
        if len(self._texts) == self._tasks:
            ordered = [self._texts[number] for number in sorted(self._texts)]
            self._answer = Gathered(zlib.compress(json.dumps(ordered).encode(), 1))
            self._decided.set()
        decided = asyncio.ensure_future(self._decided.wait())
        gone = asyncio.ensure_future(connection.receive())
        try:
            await asyncio.wait([decided, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            decided.cancel()
            gone.cancel()
            await asyncio.gather(decided, gone, return_exceptions=True)
        if self._decided.is_set():
            connection.send(self._answer)
        else:
            del self._texts[event.partition]
        return True
