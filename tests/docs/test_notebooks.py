"""The notebooks run from top to bottom in a real kernel, and show what they promise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 200
ENOUGH = 0.95


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def execute(path: Path, scratch: Path) -> list[tuple[str, str]]:
    """Run a notebook; give the source and the printed text of each code cell."""
    notebook = read(path)
    client = nbclient.NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(scratch)}},
    )
    client.execute()
    return [
        (cell.source, "".join(out.text for out in cell.outputs if out.get("name") == "stdout"))
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def text_of(cells: list[tuple[str, str]], sign: str) -> str:
    [text] = [text for source, text in cells if sign in source]
    return text


def accuracy_in(text: str) -> float:
    found = re.search(r"accuracy (\d\.\d+)", text)
    assert found is not None, text
    return float(found[1])


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what the kernel and Spark write below the test's own directory."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        directory = tmp_path / name.lower()
        directory.mkdir()
        monkeypatch.setenv(name, str(directory))
    work = tmp_path / "work"
    work.mkdir()
    return work


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_is_committed_without_outputs(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert dict(notebook.metadata.language_info) == {"name": "python"}
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.spark
@pytest.mark.horovod
@pytest.mark.timeout(3 * CELL_SECONDS)
def test_quickstart(scratch: Path) -> None:
    [path] = [path for path in NOTEBOOKS if path.name == "01_quickstart.ipynb"]
    cells = execute(path, scratch)

    alone = text_of(cells, "= train(epochs=8")
    assert accuracy_in(alone) >= ENOUGH

    local = text_of(cells, "np=-2")
    on_spark = text_of(cells, "np=2, driver_log_verbosity")
    for text in (local, on_spark):
        lines = text.splitlines()
        for rank in (0, 1):
            # 1347 scans on two ranks, the odd one twice.
            line = f"[{rank}]<stdout>:rank {rank} of 2 trains on 674 scans"
            assert lines.count(line) == 1, text
        losses = re.findall(r"^epoch (\d): loss \d\.\d{4}$", text, re.MULTILINE)
        assert losses == list("12345678"), text
        assert accuracy_in(text) >= ENOUGH
    assert "2 ranks on this machine" in local
    assert "2 ranks on Spark" in on_spark

    bad = text_of(cells, "train_badly")
    assert "rank 1: ValueError('no data for rank 1')" in bad.splitlines()
