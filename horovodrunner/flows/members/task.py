"""How the tasks of a run exchange one text each. Runs in: the task."""

from __future__ import annotations

import asyncio
import json
import logging
import zlib
from collections.abc import Callable

from horovodrunner.flows.call.job import JobSpec
from horovodrunner.wire.events import Gather, Gathered, Refused
from horovodrunner.wire.stream import connect

__all__ = ["gather"]

CONNECT_SECONDS = 10.0
"""How long a task tries to reach the driver before it takes Spark's way."""

_logger = logging.getLogger(__name__)


async def gather(
    job: JobSpec,
    partition: int,
    text: str,
    all_gather: Callable[[str], list[str]],
    *,
    reaches_driver: bool,
) -> list[str]:
    """Return the texts of all tasks, by partition: through the driver if all of them reach it.

    `all_gather` is Spark's way; ConnectionError if the connection to the driver breaks meanwhile,
    or if Spark tries the stage again.
    """
    if reaches_driver and (texts := await _gather_at_driver(job, partition, text)) is not None:
        _logger.debug("gathered %d tasks at the driver", len(texts))
        return texts
    texts = await asyncio.to_thread(all_gather, text)
    _logger.debug("gathered %d tasks through Spark", len(texts))
    return texts


async def _gather_at_driver(job: JobSpec, partition: int, text: str) -> list[str] | None:
    if job.driver_address is None:
        return None
    try:
        connection = await connect(*job.driver_address, job.token, CONNECT_SECONDS)
    except OSError:
        return None
    try:
        connection.send(Gather(job.run_id, partition, text.encode()))
        answer = await connection.receive()
    finally:
        await connection.close()
    if answer is None:
        # The driver may have told the others already, so Spark's way could wait for ever.
        raise ConnectionError("the connection to the driver broke while the tasks met")
    if isinstance(answer, Refused):
        raise ConnectionError(answer.why)
    if isinstance(answer, Gathered):
        texts: list[str] = json.loads(zlib.decompress(answer.texts))
        return texts
    return None
