"""A directory that is deleted even when its task is killed. Runs in: the task (np < 0: the driver).

Spark kills the Python process of a cancelled task two seconds after it told it
(``spark.python.task.killTimeout``), whatever it is doing. So a process beside it waits for its end.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["Scratch"]

_DELETE_WHEN_STDIN_ENDS = """
read -r nothing
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    rm -rf -- "$1" && exit
    sleep 0.2  # workers that have yet to notice wrote into it
done
"""


class Scratch:
    """A new directory of one task's own."""

    def __init__(self, run_id: str, base: str | None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"horovodrunner-{run_id}-", dir=base))
        try:
            self._janitor = subprocess.Popen(
                ["/bin/sh", "-c", _DELETE_WHEN_STDIN_ENDS, "horovodrunner-scratch", str(self.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # signals to the task's process group are not for it
            )
        except BaseException:
            self.path.rmdir()
            raise

    def delete(self) -> None:
        """Delete it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._janitor.communicate()
