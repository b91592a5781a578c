"""The notebooks run from top to bottom in a real kernel, and show what they promise."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import processes

pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
WATCHING = "08_watching.ipynb"
SEARCH = "09_search.ipynb"
CELL_SECONDS = 200
ENOUGH = 0.95
IMAGE_BYTES = 2000
"""Empty axes have fewer."""


class Cell(NamedTuple):
    """What a code cell is, printed and drew (PNG)."""

    source: str
    text: str
    images: list[bytes]


class Tutorial(NamedTuple):
    """What a notebook shows that goes from one process to two on Spark."""

    enough: float
    epochs: int
    images: int
    shown: tuple[str, ...]


EQUAL_WEIGHTS = "largest difference between the workers' weights: 0"
TUTORIALS = {
    "02_pytorch.ipynb": Tutorial(
        0.95,
        8,
        3,
        (
            "[0]<stdout>:rank 0 of 1: 1347 scans, from epoch 1",
            "epoch 8: 25 KiB",
            "[0]<stdout>:rank 0 of 2: 674 scans, from epoch 9",
            "[1]<stdout>:rank 1 of 2: 674 scans, from epoch 9",
        ),
    ),
    "03_keras.ipynb": Tutorial(
        0.9,
        6,
        2,
        (
            "[0]<stdout>:rank 0 of 2 takes 21 steps in an epoch",
            "[1]<stdout>:rank 1 of 2 takes 21 steps in an epoch",
            EQUAL_WEIGHTS,
        ),
    ),
    "04_legacy_keras.ipynb": Tutorial(
        0.9,
        10,
        1,
        (
            "[0]<stdout>:rank 0 of 2 trains on 673 scans",
            "[1]<stdout>:rank 1 of 2 trains on 673 scans",
            EQUAL_WEIGHTS,
            f"learning rate in each epoch: {[0.003] + 9 * [0.004]}",
            "loaded from the file: 100% of the predictions are the same",
        ),
    ),
    "05_torch_ddp.ipynb": Tutorial(
        0.95,
        8,
        2,
        (
            "[0]<stdout>:rank 0 of 1: 1347 scans",
            "[0]<stdout>:rank 0 of 2: 674 scans",
            "[1]<stdout>:rank 1 of 2: 674 scans",
        ),
    ),
}


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def execute(path: Path, scratch: Path) -> list[Cell]:
    """Run a notebook; return its code cells."""
    notebook = read(path)
    processes.execute(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(scratch)}},
    )
    return [
        Cell(
            cell.source,
            "".join(out.text for out in cell.outputs if out.get("name") == "stdout"),
            [
                base64.b64decode(out.data["image/png"])
                for out in cell.outputs
                if "image/png" in out.get("data", {})
            ],
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def text_of(cells: list[Cell], sign: str) -> str:
    [text] = [cell.text for cell in cells if sign in cell.source]
    return text


def accuracy_in(text: str) -> float:
    found = re.search(r": accuracy (\d\.\d+)", text)
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

    assert accuracy_in(text_of(cells, "right = table.where")) >= ENOUGH

    bad = text_of(cells, "train_badly")
    assert "rank 1: ValueError('no data for rank 1')" in bad.splitlines()


@pytest.mark.spark
@pytest.mark.horovod
@pytest.mark.slow
@pytest.mark.timeout(3 * CELL_SECONDS)
def test_spark_dataframes(scratch: Path) -> None:
    pytest.importorskip("keras")
    [path] = [path for path in NOTEBOOKS if path.name == "06_spark_dataframes.ipynb"]
    text = "".join(cell.text for cell in execute(path, scratch))
    assert "414 rows to train on, 143 to test with" in text
    assert "'features': ('float32', (4, 31))" in text
    assert "414 rows for 2 ranks in batches of 16: 12 batches a rank and epoch; 30 rows are" in text
    assert "192 patients on rank 0, 192 on rank 1, 0 on both" in text
    for framework in ("PyTorch", "Keras"):
        assert accuracy_in(text[text.index(f"{framework}: accuracy") :]) >= ENOUGH


@pytest.mark.spark
@pytest.mark.horovod
@pytest.mark.slow
@pytest.mark.timeout(3 * CELL_SECONDS)
def test_images(scratch: Path) -> None:
    pytest.importorskip("PIL")
    [path] = [path for path in NOTEBOOKS if path.name == "07_images.ipynb"]
    text = "".join(cell.text for cell in execute(path, scratch))
    assert "1798 files" in text
    assert accuracy_in(text) >= ENOUGH
    [reason] = re.findall("^1797 None (.*)$", text, re.MULTILINE)
    assert "no image in 'image' that Pillow can decode" in reason
    found = re.findall(r"^\| +\d\| +(\d+)\| +(\d+)\|$", text, re.MULTILINE)
    assert len(found) == 10
    images, right = (sum(map(int, column)) for column in zip(*found, strict=True))
    assert images == 1797
    assert right / images >= ENOUGH


def test_watching(scratch: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("pandas")
    notebook = read(Path(__file__).resolve().parents[2] / "notebooks" / WATCHING)
    processes.execute(
        notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": str(scratch)}}
    )
    outputs = [each.get("outputs", []) for each in notebook.cells]
    areas = [out.data for cell in outputs for out in cell if out.output_type == "display_data"]
    good, failed = areas
    assert good["text/plain"].startswith("succeeded")
    assert "20/20 (100%)" in good["text/html"]
    assert failed["text/plain"].startswith("failed")
    assert "the loss is not finite" in failed["text/html"]
    text = "".join(out.text for cell in outputs for out in cell if out.get("name") == "stdout")
    assert re.search(r"^best loss 0\.\d+ at step 19$", text, re.MULTILINE)
    assert len(re.findall(r"^rank-\d \[", text, re.MULTILINE)) == 2
    assert "<History: 6 points up to step 5: loss 32.0000>" in text


@pytest.mark.spark
@pytest.mark.heavy
@pytest.mark.timeout(3 * CELL_SECONDS)
def test_search(scratch: Path) -> None:
    pytest.importorskip("optuna")
    pytest.importorskip("pandas")
    notebook = read(Path(__file__).resolve().parents[2] / "notebooks" / SEARCH)
    processes.execute(
        notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": str(scratch)}}
    )
    outputs = [out for each in notebook.cells for out in each.get("outputs", [])]
    text = "".join(out.text for out in outputs if out.get("name") == "stdout")
    assert re.search(r"^best of 6: {'learning_rate': ", text, re.MULTILINE)
    assert re.search(r"^the loss is below 0\.1\nloss 0\.0\d+$", text, re.MULTILINE)

    areas = [out.data["text/plain"] for out in outputs if out.output_type == "display_data"]
    ends = dict(area.splitlines()[0].split(":")[0:2] for area in areas)
    assert set(ends) == {*(f"trial {number}" for number in range(6)), "until 0.1"}
    assert ends["trial 0"].startswith(" succeeded")
    assert ends["trial 3"].startswith(" stopped")
    assert ends["until 0.1"].startswith(" stopped")

    results, points = (out.data["text/plain"] for out in outputs if "execution_count" in out)
    rows = {int(row[1]): row for line in results.splitlines()[1:] if (row := line.split())}
    assert len(rows) == 6
    assert rows[0][2] == "COMPLETE"
    assert rows[0][-1] == "20"
    assert rows[3][2] == "PRUNED"
    assert int(rows[3][-1]) >= 4
    assert points.splitlines()[0].split() == ["trial", *map(str, range(6))]


def test_every_notebook_is_executed() -> None:
    others = {
        "01_quickstart.ipynb",
        "06_spark_dataframes.ipynb",
        "07_images.ipynb",
        WATCHING,
        SEARCH,
    }
    assert {path.name for path in NOTEBOOKS} == {*others, *TUTORIALS}


@pytest.mark.spark
@pytest.mark.horovod
@pytest.mark.timeout(3 * CELL_SECONDS)
@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial(name: str, scratch: Path) -> None:
    pytest.importorskip("matplotlib")
    if "keras" in name:
        pytest.importorskip("tf_keras" if "legacy" in name else "keras")
    [path] = [path for path in NOTEBOOKS if path.name == name]
    tutorial = TUTORIALS[name]
    cells = execute(path, scratch)

    # The cells are found by what they print.
    texts = {
        sign: next(cell.text for cell in cells if sign in cell.text)
        for sign in ("one process: accuracy", "1 rank on this machine", "2 ranks on Spark")
    }
    assert accuracy_in(texts["one process: accuracy"]) >= tutorial.enough
    assert "[0]<stdout>:rank 0 of 1" in texts["1 rank on this machine"]
    on_spark = texts["2 ranks on Spark"]
    assert accuracy_in(on_spark) >= tutorial.enough
    epochs = re.findall(r"^(?:\[0\]<stdout>:)?epoch (\d+): loss \d\.\d{4}", on_spark, re.MULTILINE)
    assert epochs == [str(epoch + 1) for epoch in range(tutorial.epochs)], on_spark

    lines = "".join(cell.text for cell in cells).splitlines()
    for line in tutorial.shown:
        assert lines.count(line) == 1, line
    # Said once in each of two runs. Keras 2 keeps Horovod's own optimizer.
    replaced = sum("are those of horovodrunner.keras" in line for line in lines)
    assert replaced == (2 if name == "03_keras.ipynb" else 0)

    images = [image for cell in cells for image in cell.images]
    assert len(images) == tutorial.images
    assert min(map(len, images)) > IMAGE_BYTES
