"""The reports of runs in a real browser: what is seen, and that nothing is wrong or fetched."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from horovodrunner.flows.metrics.records import Point
from horovodrunner.flows.rundir.masking import Mask
from horovodrunner.flows.rundir.report import write_report
from horovodrunner.flows.rundir.writer import RecordWriter
from horovodrunner.wire.events import Lines, Placed, Profile, Usage
from tests import processes

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: none of {', '.join(BROWSERS)}"),
]

NETWORK = '<img src="http://127.0.0.1:9/x.png"><script>console.error("seen")</script>'


def record(directory: Path, outcome: dict[str, object] | None) -> Path:
    """Write the record of a run whose rank 1 is slow, and its report."""
    facts = {"run_id": "ab12", "main": "train", "np": 2, "began": 1000.0}
    run = RecordWriter(directory, facts, 2, Mask())
    run.begin(1)
    run.placed(Placed(((0, 0, "node-1"), (1, 1, "node-2"))))
    for step in range(50):
        for rank in (0, 1):
            values = {"loss": 1 / (step + 1) + rank}
            run.records(rank, [Point(step, values, rank, 1, 1002.0 + step, rank == 0)])
    for rank in (0, 1):
        run.lines(Lines(rank, "stdout", b"the last words of %d\n" % rank))
        run.profile(Profile(rank, 50.0, {"allreduce": 40.0 * (1 - rank)}, {}, b""))
        for at in (1003.0, 1013.0):
            gpus = ((0, 60.0, 2**30, 2**32),)
            run.usage(Usage(rank, f"node-{rank + 1}", at, 90.0, 2**30, 40.0, 2**33, 2**34, gpus))
    run.flush()
    if outcome is not None:
        phases = [["pickle", 1000.0, 1000.5, None], ["main", 1002.0, 1052.0, 1]]
        run.end({**outcome, "ended": 1053.0}, phases)
    return write_report(directory)


def browse(page: Path, *, width: int = 1200) -> str:
    """Return the page's text, as the browser has it; it must have complained of nothing."""
    assert BROWSER is not None
    # not in our directory: the browser has sockets there, whose paths have 107 bytes at most
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        done = processes.run(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--enable-logging=stderr",
                f"--user-data-dir={directory}/profile",
                f"--window-size={width},1000",
                "--dump-dom",
                page.as_uri(),
            ],
            capture_output=True,
            check=True,
            env={**os.environ, "TMPDIR": directory},
        )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints
    return re.sub(r"<[^>]+>", " ", done.stdout.partition("</style>")[2])


def test_a_good_run(tmp_path: Path) -> None:
    text = browse(record(tmp_path / "run", {"status": "succeeded"}))
    for wanted in ("Succeeded", "2 ranks on 2 hosts", "Rank 1 is slowest", "node-2 GPU 0"):
        assert wanted in text
    assert text.index("Launch") < text.index("Metrics") < text.index("the last words of 0")


def test_a_failed_run(tmp_path: Path) -> None:
    error = {"type": "WorkerFailedError", "text": "rank 1 failed: diverged", "rank": 1}
    page = record(tmp_path / "run", {"status": "failed", "error": error})
    text = browse(page)
    assert text.index("rank 1 failed: diverged") < text.index("Launch")
    assert text.index("the last words of 1") < text.index("the last words of 0")


def test_a_run_whose_driver_was_lost(tmp_path: Path) -> None:
    text = browse(record(tmp_path / "run", None))
    assert "Driver lost" in text
    assert "the last words of 1" in text


def test_the_browser_would_complain(tmp_path: Path) -> None:
    page = record(tmp_path / "run", None)
    page.write_text(page.read_text().replace("</main>", f"{NETWORK}</main>"))
    with pytest.raises(AssertionError):
        browse(page)
