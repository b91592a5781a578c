"""Notebooks in the style of public ones run from top to bottom and print what they promise."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.corpus.run_notebook import code_cells

pytestmark = [pytest.mark.spark, pytest.mark.horovod, pytest.mark.timeout(500)]

FOLDER = Path(__file__).parent


def shown_by(notebooks: list[str], scratch: Path, **environment: str) -> dict[str, str]:
    """Run notebooks in one process; return what the cells of each show, stderr included."""
    script = [sys.executable, str(FOLDER / "run_notebook.py")]
    inherited = {**os.environ, "PYSPARK_PYTHON": sys.executable, "TMPDIR": str(scratch)}
    done = processes.run(
        [*script, *(str(FOLDER / "notebooks" / name) for name in notebooks)],
        cwd=scratch,
        env={**inherited, **environment},
        stdout=processes.PIPE,
        stderr=processes.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    parts = re.split(r"^NOTEBOOK (.*)\n", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    notebooks = ["torch_digits.py", "mlflow_search.py", "petastorm_torch.py"]
    # chooses Keras 2, by a variable that those after it would inherit
    return shown_by([*notebooks, "keras_history.py"], tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def shown_by_more(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    notebooks = ["lightning_trainer.py", "petastorm_keras.py"]
    return shown_by(notebooks, tmp_path_factory.mktemp("corpus"), TF_USE_LEGACY_KERAS="1")


def test_torch_pieces_in_many_cells_on_the_driver_and_then_on_the_cluster(
    shown: dict[str, str],
) -> None:
    lines = shown["torch_digits.py"].splitlines()
    assert "single node: 2 epochs" in lines
    assert "driver: 1 rank, 6 batches" in lines
    assert "cluster: 2 ranks, 3 batches" in lines
    assert "same weights: True losses: (2,) Namespace" in lines
    assert "prediction: (3, 2)" in lines
    assert "folders: ['1/rank_0', '2/rank_0', '2/rank_1', 'single']" in lines
    # np=-1 shows everything, np=2 what log_to_driver is given
    assert sum(line.startswith("[0]<stdout>:Train Epoch: ") for line in lines) == 4
    assert not [line for line in lines if line.startswith("[1]<stdout>:")]
    assert lines.count("rank 0: epoch 2 done") == 2
    assert lines.count("rank 1: epoch 2 done") == 1


def test_keras_history_comes_back_and_a_large_closure_is_named(shown: dict[str, str]) -> None:
    output = shown["keras_history.py"]
    lines = output.splitlines()
    assert "ranks: 2" in lines
    assert "history: {'accuracy': 2, 'loss': 2}" in lines
    assert "equal weights: True centred: True" in lines
    assert "loaded: (256, 4)" in lines
    epochs = re.findall(
        r"^rank (\d): epoch (\d) of 2: loss (\d\.\d{4}), accuracy \d\.\d{4} \(\d+\.\d s\)$",
        output,
        re.MULTILINE,
    )
    assert sorted((rank, epoch) for rank, epoch, _ in epochs) == [
        (rank, epoch) for rank in "01" for epoch in "12"
    ]
    # MetricAverageCallback comes before LogCallback: both ranks say the mean
    assert len({(epoch, loss) for _, epoch, loss in epochs}) == 2
    assert "UserWarning: the pickled main and its arguments have 10.3 MiB" in output
    assert "Largest: the global 'images' used by train_hvd (10.3 MiB)" in output
    assert "<cell 7 of keras_history.py>:3: UserWarning" in output


def test_mlflow_on_rank_0_logs_into_the_run_of_the_driver(shown: dict[str, str]) -> None:
    lines = shown["mlflow_search.py"].splitlines()
    assert "losses: tuple ['float64', 'float64']" in lines
    assert "back: (28, 28, 1) float32 [0.0, 0.5]" in lines
    assert "tracked: ['loss_0.0', 'loss_0.5'] 2 [0, 1, 2]" in lines
    assert "the last is the same: True" in lines


def test_autologging_computes_no_digest_of_a_dataset_without_end(shown: dict[str, str]) -> None:
    output = shown["mlflow_search.py"]
    assert "autologged: 2 ['loss']" in output.splitlines()
    assert "this dataset has no end" in output


@pytest.mark.slow
def test_lightning_trains_alone_and_together(shown_by_more: dict[str, str]) -> None:
    lines = shown_by_more["lightning_trainer.py"].splitlines()
    assert "alone: {'hidden': 4, 'lr': 0.01} 16 steps" in lines
    assert "together: {'hidden': 4, 'lr': 0.01} 8 steps" in lines
    assert "loss: True prediction: (2, 1)" in lines
    for rank in (0, 1):
        [line] = [line for line in lines if line.startswith(f"rank {rank}: epoch 2 of 2: ")]
        assert re.search(r"2: train_loss \d\.\d{4} \(\d+\.\d s\)$", line), line


def test_petastorm_feeds_images_to_torch(shown: dict[str, str]) -> None:
    lines = shown["petastorm_torch.py"].splitlines()
    [sizes] = [line for line in lines if line.startswith("train: ")]
    train, val = map(int, re.findall(r"\d+", sizes)[:2])
    assert train + val == 90
    assert sizes.endswith("cached: 2")
    assert "one node: accurate: True" in lines
    assert "distributed: accurate: True batches: True" in lines
    assert "rows: True" in lines
    assert "left: []" in lines


@pytest.mark.slow
def test_petastorm_feeds_vectors_to_keras_and_reads_parquet(shown_by_more: dict[str, str]) -> None:
    lines = shown_by_more["petastorm_keras.py"].splitlines()
    assert "dtype: float32 epochs: 4 falls: True" in lines
    assert "rows: True accurate: True" in lines
    assert "parquet: 203 float64" in lines
    assert "converted: 203" in lines
    assert "left: []" in lines


class TestCells:
    def test_text_is_left_out_and_magic_python_is_code(self) -> None:
        text = "\n".join(
            [
                "# Databricks notebook source",
                "# MAGIC %md",
                "# MAGIC # A title",
                "",
                "# COMMAND ----------",
                "",
                "x = 1  # a comment",
                "",
                "# COMMAND ----------",
                "",
                "# MAGIC %python",
                "# MAGIC if x:",
                "# MAGIC",
                "# MAGIC     x = 2",
            ]
        )
        assert code_cells(text) == ["x = 1  # a comment\n", "if x:\n\n    x = 2\n"]

    def test_other_magics_are_refused(self) -> None:
        with pytest.raises(ValueError, match="%sh"):
            code_cells("# Databricks notebook source\n# MAGIC %sh ls")
