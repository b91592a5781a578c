"""Make the pictures of docs/watching.md from a real run: python scripts/pictures.py.

Needs chromium (Debian/Ubuntu: apt install chromium). The area is what a notebook shows after the
run's end, the page is the report of its record.
"""

from __future__ import annotations

import contextlib
import linecache
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from horovodrunner import HorovodRunner, WorkerFailedError
from horovodrunner.flows.progress.html import in_html
from horovodrunner.flows.progress.view import RunState
from horovodrunner.processes.driver import run as run_module

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = '<body style="margin:14px;background:#fff">'


class Recorder:
    """A screen that keeps what a notebook would show."""

    pause_seconds = 0.5

    def __init__(self) -> None:
        self.areas: list[str] = []

    def draw(self, run: RunState, *, is_final: bool) -> None:
        """Keep the area."""
        self.areas.append(in_html(run))

    def beside(self) -> contextlib.AbstractContextManager[object]:
        """Make room for lines of text."""
        return contextlib.nullcontext()


TRAIN = """
def train(epochs, fails):
    import os
    import random
    import time

    from horovodrunner import metrics

    rank = int(os.environ["RANK"])
    noise = random.Random(rank)
    for epoch in metrics.progress(range(epochs), desc="epoch"):
        for batch in metrics.progress(range(8), desc="batch"):
            time.sleep(0.05 + 0.01 * (rank == 2))
            if fails and rank == 2 and epoch == 7:
                raise ValueError(f"loss is NaN in batch {batch}: check the learning rate")
        loss = 2.3 * 0.8**epoch + noise.uniform(0, 0.15)
        print(f"epoch {epoch}: loss {loss:.4f}")
        metrics.report(step=epoch, loss=loss, val_acc=0.95 - 0.8 * 0.75**epoch)
"""
"""Its losses fall as losses do, and one rank is slower than the others."""


def photograph(source: str, target: Path, width: int, height: int) -> None:
    """Have chromium draw a page."""
    subprocess.run(
        [
            shutil.which("chromium") or "chromium-browser",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--screenshot={target}",
            f"--window-size={width},{height}",
            source,
        ],
        check=True,
        capture_output=True,
    )
    sys.stdout.write(f"{target}\n")


def main() -> int:
    """Run twice, and photograph."""
    recorder = Recorder()
    run_module.find_screen = lambda: recorder  # type: ignore[attr-defined]
    names: dict[str, Any] = {}
    linecache.cache["train.py"] = (len(TRAIN), None, TRAIN.splitlines(keepends=True), "train.py")
    exec(compile(TRAIN, "train.py", "exec"), names)  # noqa: S102 - a file of no machine's
    with tempfile.TemporaryDirectory() as scratch:
        runner = HorovodRunner(np=-4, run_dir=Path(scratch) / "runs")
        runner.run(names["train"], epochs=12, fails=False)
        on_its_way = recorder.areas[len(recorder.areas) * 6 // 10]
        with contextlib.suppress(WorkerFailedError):
            runner.run(names["train"], epochs=12, fails=True)
        for name, area in (("area", on_its_way), ("area-failed", recorder.areas[-1])):
            page = Path(scratch) / f"{name}.html"
            page.write_text(f"{PAGE}{area}")
            photograph(page.as_uri(), DOCS / f"watching-{name}.png", 640, 190)
        report = Path(str(runner.record)) / "report.html"
        photograph(report.as_uri(), DOCS / "watching-report.png", 1000, 1500)
    return 0


if __name__ == "__main__":
    sys.exit(main())
