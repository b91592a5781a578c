"""A notebook that papermill executes: it fails with its ranks, and goes on the next time."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests import processes
from tests.waiting import wait_until

pytestmark = pytest.mark.heavy

SOURCE = """
import os
from pathlib import Path
from horovodrunner import HorovodRunner, checkpoint

directory = Path(directory)
(directory / "kernel.pid").write_text(str(os.getpid()))


def train(directory, epochs):
    import time

    latest = checkpoint.latest()
    start = 0 if latest is None else latest.step + 1
    for epoch in range(start, epochs):
        while epoch == 2 and not (directory / "go").exists():
            time.sleep(0.02)
        if (directory / "bad").exists():
            raise ValueError("the loss is not a number")
        with checkpoint.save(step=epoch) as saved:
            (saved / "epoch.txt").write_text(str(epoch))
    return {"start": start, "epochs": epochs}
"""
RUN = """
runner = HorovodRunner(
    np=-2, progress=False, run_dir=directory / "runs", checkpoint_dir=directory / "checkpoints"
)
found = runner.run(train, run_key=f"nightly-{date}", directory=directory, epochs=4)
print("value", found["start"], found["epochs"])
"""


def write_notebook(directory: Path) -> None:
    v4 = nbformat.v4
    parameters = v4.new_code_cell(f'date, directory = "never", {str(directory)!r}')
    parameters.metadata["tags"] = ["parameters"]
    cells = [parameters, v4.new_code_cell(SOURCE), v4.new_code_cell(RUN)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, directory / "nightly.ipynb")


def command_of(directory: Path, output: str) -> list[str | Path]:
    papermill = [sys.executable, "-W", "ignore", "-m", "papermill", "--no-progress-bar"]
    files = [directory / "nightly.ipynb", directory / output]
    return [*papermill, *files, "-p", "date", "2026-11-27"]


def options_of(directory: Path) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, sys.path))
    return {"env": {**os.environ, "PYTHONPATH": path, "JUPYTER_RUNTIME_DIR": str(directory)}}


def text_of(notebook: Path) -> str:
    """Return what the last cell shows."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [each for each in cells if each.cell_type == "code"][-1].outputs
    texts = [each.get("text", "") + "\n".join(each.get("traceback", [])) for each in outputs]
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(texts))


def test_a_notebook_whose_kernel_is_killed_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("papermill")
    write_notebook(tmp_path)
    quiet: dict[str, Any] = {"stdout": processes.DEVNULL, "stderr": processes.DEVNULL}
    command = command_of(tmp_path, "first.ipynb")
    with processes.started(command, **quiet, **options_of(tmp_path)) as first:
        wait_until(lambda: [*tmp_path.glob("checkpoints/key-*/*/epoch-000001/step-00000001")])
        os.kill(int((tmp_path / "kernel.pid").read_text()), signal.SIGKILL)
        assert first.wait() != 0
    (tmp_path / "go").touch()
    for output, why in (("second.ipynb", "going on from step 1"), ("third.ipynb", "has ended on")):
        processes.run(command_of(tmp_path, output), check=True, **quiet, **options_of(tmp_path))
        said = text_of(tmp_path / output)
        assert "value 2 4" in said
        assert why in said
    assert [each.name[:11] for each in tmp_path.glob("runs/keys/*")] == ["nightly-202"]
    assert len([*tmp_path.glob("runs/2*")]) == 2


def test_a_notebook_whose_rank_fails_has_failed(tmp_path: Path) -> None:
    pytest.importorskip("papermill")
    write_notebook(tmp_path)
    (tmp_path / "bad").touch()
    command = command_of(tmp_path, "output.ipynb")
    done = processes.run(command, capture_output=True, **options_of(tmp_path))
    assert done.returncode != 0
    cause = r"WorkerFailedError: rank \d on .* failed: ValueError: the loss is not a number"
    assert re.search(cause, text_of(tmp_path / "output.ipynb"))
    assert re.search(cause, done.stderr)
