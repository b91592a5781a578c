"""A driver that stands still while its ranks print."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import processes

pytestmark = pytest.mark.spark

LINES = 60_000
"""Of a kilobyte each, from each rank: many times what may wait for the driver."""

DRIVER = """
    import sys
    from pyspark.sql import SparkSession
    from horovodrunner import HorovodRunner

    def main(directory, lines):
        import json, os, psutil, time
        from pathlib import Path

        rank = os.environ["RANK"]
        task = psutil.Process(os.getppid())
        before = task.memory_info().rss
        Path(directory, "begun" + rank).touch()
        while not Path(directory, "go").exists():
            time.sleep(0.02)
        for index in range(lines):
            print(index, "x" * 1000)
        grown = task.memory_info().rss - before
        Path(directory, "new").mkdir(exist_ok=True)
        path = Path(directory, "new", "done" + rank)
        path.write_text(json.dumps(grown))
        path.rename(Path(directory, "done" + rank))
        return "value"

    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.log.level", "ERROR").getOrCreate()
    runner = HorovodRunner(np=2, driver_log_verbosity="all")
    print(runner.run(main, directory=sys.argv[1], lines=int(sys.argv[2])))
    spark.stop()
"""


def wait_for(directory: Path, name: str) -> list[Any]:
    """Wait until both ranks have made their files."""
    while len(found := sorted(directory.glob(f"{name}?"))) < 2:
        time.sleep(0.02)
    return [json.loads(path.read_text() or "null") for path in found]


def test_ranks_go_on_and_afterwards_every_line_is_shown_or_counted(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(re.sub(r"^ {4}", "", DRIVER, flags=re.MULTILINE))
    command = [sys.executable, str(script), str(tmp_path), str(LINES)]
    with (
        Path(tmp_path, "stderr").open("wb") as errors,
        processes.started(command, stdout=processes.PIPE, stderr=errors) as driver,
    ):
        try:
            wait_for(tmp_path, "begun")
            os.kill(driver.pid, signal.SIGSTOP)
            Path(tmp_path, "go").touch()
            grown = wait_for(tmp_path, "done")
            assert psutil.Process(driver.pid).status() == psutil.STATUS_STOPPED
        finally:
            os.kill(driver.pid, signal.SIGCONT)
        text, _ = driver.communicate()
    assert driver.returncode == 0, Path(tmp_path, "stderr").read_text()
    assert max(grown) < 60e6, f"the tasks grew by {grown} bytes"
    shown = text.splitlines()
    assert shown[-1] == "value"
    printed = [re.fullmatch(r"\[(\d)\]<stdout>:(\d+) x{1000}", line) for line in shown]
    missing = [re.search(r"HorovodRunner: (\d+) lines are missing here", line) for line in shown]
    counted = sum(int(mark[1]) for mark in missing if mark)
    own = [line[:200] for line in shown if line.startswith("HorovodRunner: ")]
    assert counted > 0, f"{sum(1 for line in printed if line)} lines arrived, and {own}"
    assert sum(1 for line in printed if line) + counted == 2 * LINES
    for rank in "01":
        numbers = [int(line[2]) for line in printed if line and line[1] == rank]
        assert numbers == sorted(numbers)
    # Nothing else: no line is torn, and none is shown twice.
    others = [
        s for s, line, mark in zip(shown, printed, missing, strict=True) if not (line or mark)
    ]
    assert [line for line in others if not line.startswith("HorovodRunner: ")] == ["value"]
