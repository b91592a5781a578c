"""What a notebook's cell shows when something ends a run: in a real kernel."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest

from tests import processes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's packages


def errors_of(cells: list[str]) -> list[list[str]]:
    """Run cells, and return the lines that each shows of an exception."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(textwrap.dedent(cell).strip()) for cell in cells]
    )
    processes.execute(notebook, interrupt_at="NOW", timeout=150, allow_errors=True)
    shown = []
    for cell in notebook.cells:
        texts = ["\n".join(o.traceback) for o in cell.outputs if o.output_type == "error"]
        shown.append(re.sub(r"\x1b\[[\d;]*m", "", "\n".join(texts)).splitlines())
    return shown


def test_cells_show_the_users_code_and_the_cause(tmp_path: Path) -> None:
    shown = errors_of(
        [
            """
            from horovodrunner import HorovodRunner
            runner = HorovodRunner(np=-1, checkpoint_dir=CHECKPOINTS)
            """.replace("CHECKPOINTS", repr(str(tmp_path))),
            "HorovodRunner(np='2')",
            "runner.run(3)",
            """
            class Odd:
                def __getstate__(self):
                    raise RuntimeError("no state")
            odd = Odd()
            """,
            "runner.run(lambda: odd)",
            """
            def main():
                try:
                    {}["key"]
                except KeyError as error:
                    raise ValueError("too large") from error
            def train():
                runner.run(main)
            train()
            """,
            """
            def main():
                import time
                from horovodrunner import checkpoint
                with checkpoint.save(step=7) as directory:
                    (directory / "file").touch()
                print("NO" + "W")
                time.sleep(600)
            runner.run(main)
            """,
            "%xmode Verbose",
            "%tb",
            "%xmode Context",
            """
            try:
                runner.run(lambda: 1 / 0)
            except Exception as error:
                raise OSError("mine") from error
            """,
        ]
    )
    *_, chained = shown
    np, main, _, odd, failed, interrupted, _, full = shown[1:-2]
    for lines in (np, main, odd, failed, interrupted):
        assert not [line for line in lines if "horovodrunner/" in line]
    assert len([line for line in chained if "horovodrunner/" in line]) == 1
    assert chained[-1] == "OSError: mine"
    assert [np[2], np[-1]] == [
        "Cell In[2], line 1",
        "ArgumentTypeError: " + np[-1].split(": ", 1)[1],
    ]
    assert len(np) == len(main) == 6
    assert any('raise RuntimeError("no state")' in line for line in odd)
    assert odd[-1].startswith("PayloadError: the global 'odd' used by")
    assert failed[0] == "On rank 0:"
    assert failed.index("ValueError: too large") < failed.index("----> 8 train()")
    assert failed[-1].endswith("failed: ValueError: too large")
    assert re.fullmatch(
        r"KeyboardInterrupt: the run of 1 rank was stopped; the latest checkpoint is that of step "
        rf"7: {tmp_path}\S+",
        interrupted[-1],
    )
    assert len(interrupted) < 15
    assert [line for line in full if "horovodrunner/flows/logs/driver.py" in line]


SCRIPT = """
from horovodrunner import HorovodRunner

def main():
    raise ValueError("too large")

try:
    {}["the caller's own"]
except KeyError:
    HorovodRunner(np=-1).run(main)
"""


@pytest.mark.parametrize("full", ["", "1"])
def test_scripts_show_one_frame_of_this_package_unless_all_are_asked_for(
    full: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = processes.run(
        [sys.executable, str(script)],
        capture_output=True,
        env={**os.environ, "HOROVODRUNNER_FULL_TRACEBACK": full},
    )
    own = re.findall(r'File "\S+/horovodrunner/(\S+)"', done.stderr)
    assert own[-1:] == ["flows/outcome/driver.py"] if full else own == ["usage.py"]
    assert 'raise ValueError("too large")' in done.stderr


IMPATIENT = """
import os, signal, time
from horovodrunner import HorovodRunner

def main(driver):
    for _ in range(100):
        os.kill(driver, signal.SIGINT)
    time.sleep(600)

HorovodRunner(np=-1).run(main, driver=os.getpid())
"""


def test_many_interrupts_show_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(IMPATIENT)
    done = processes.run([sys.executable, str(script)], capture_output=True)
    assert done.stderr.count("KeyboardInterrupt") == 1
    assert done.stderr.splitlines()[-1].startswith(
        "KeyboardInterrupt: the run of 1 rank was stopped"
    )
