"""Real Horovod runs as it does in notebooks: ranks are forks of a process that has torch already.

Where the parents of a rank's process matter, a test says ``keep_warm=False``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from horovodrunner.processes.driver import run


@pytest.fixture(scope="module", autouse=True)
def as_in_a_notebook() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "is_interactive", lambda: True)
        # Horovod asks all ranks for news each millisecond: half a core for a rank that waits.
        patch.setenv("HOROVOD_CYCLE_TIME", "5")
        yield
