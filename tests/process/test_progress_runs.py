"""The progress of real runs in a real kernel and on a real terminal."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import sys
import termios
from pathlib import Path

import nbformat
import pytest

from tests import processes

MAIN = """
from horovodrunner import HorovodRunner, log_to_driver, metrics

def train(epochs, fail=False):
    for epoch in metrics.progress(range(epochs), desc="epoch"):
        metrics.report(step=epoch, loss=1 / (epoch + 1))
        log_to_driver(f"epoch {epoch}")
    if fail:
        raise ValueError("diverged")
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's packages
def test_a_notebook_keeps_the_final_state() -> None:
    cells = [
        MAIN,
        "runner = HorovodRunner(np=-2)\nrunner.run(train, epochs=3)",
        "runner.history",
        "runner.run(train, epochs=2, fail=True)",
        "HorovodRunner(np=-1, progress=False).run(train, epochs=1)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    processes.execute(notebook, timeout=150, allow_errors=True)
    areas = [
        [output.data for output in cell.outputs if output.output_type == "display_data"]
        for cell in notebook.cells
    ]
    assert [len(found) for found in areas] == [0, 1, 0, 1, 0]
    good, failed = areas[1][0], areas[3][0]
    assert re.match(r"succeeded, 00:\d\d; 2 ranks\n", good["text/plain"])
    assert "3/3 (100%)" in good["text/html"]
    assert good["text/plain"].endswith("step 2: loss 0.3333")
    assert re.match(r"failed, 00:\d\d; 2 ranks\nrank \d on ", failed["text/plain"])
    assert "ValueError: diverged" in failed["text/html"]
    history = notebook.cells[2].outputs[0].data
    assert history["text/plain"] == "<History: 3 points up to step 2: loss 0.3333>"
    assert "<svg" in history["text/html"]


def on_terminal(script: Path) -> str:
    """Run a script on a terminal, and return what it wrote."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
    shown = b""
    with processes.started([sys.executable, script], stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # a terminal ends so
            pass
        process.wait()
    os.close(ours)
    return shown.decode()


def test_a_terminal_has_bars_without_a_total(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        MAIN
        + """
def main():
    for number, one in enumerate(metrics.progress((n for n in range(9)), desc="first\\nline")):
        log_to_driver(f"line {number}")

HorovodRunner(np=-1).run(main)
HorovodRunner(np=-1).run(lambda: list(metrics.progress(range(0), desc="nothing")))
"""
    )
    text = on_terminal(script)
    assert "no longer shown" not in text
    assert re.search(r"first line: 9it \[", text)
    assert re.search(r"nothing: 0it \[", text)
    assert text.count("nothing: 0it") <= 2  # one bar


def test_a_terminal_has_bars_that_lines_do_not_tear(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(MAIN + "\nHorovodRunner(np=-1).run(train, epochs=3)\n")
    text = on_terminal(script)
    assert re.search(r"epoch: 100%\|█+\| 3/3 \[.*loss 0.3333\]", text)
    lines = re.split(r"[\r\n]|\x1b\[[KA]", text)
    assert [line for line in lines if line.startswith("epoch ")] == [f"epoch {n}" for n in range(3)]
