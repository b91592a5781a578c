"""Another try for what the network, which may come back, has broken off. Runs in: the task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from horovodrunner.wire.upload import in_thread

__all__ = ["ATTEMPTS", "in_thread_again"]

ATTEMPTS = 3
RETRY_SECONDS = 2.0

_Result = TypeVar("_Result")


async def in_thread_again(
    work: Callable[..., _Result], *arguments: Any, is_wanted: Callable[[], bool] = lambda: True
) -> _Result:
    """Call a blocking function in a thread, again if contact is lost and it is still wanted."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await in_thread(work, *arguments)
        except (ConnectionError, TimeoutError):
            if not is_wanted():
                raise
            await asyncio.sleep(RETRY_SECONDS)
    return await in_thread(work, *arguments)
