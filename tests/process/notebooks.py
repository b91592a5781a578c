"""A real kernel for the tests that need one."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests import processes


def run_notebook(directory: Path, *cells: str, timeout: int = 150) -> list[Any]:
    """Run cells in a kernel and return the last cell's outputs; a cell that raises fails the test.

    Parameters
    ----------
    directory
        Where it runs, and where IPython and Jupyter write.
    *cells
        Their source.
    timeout
        Seconds for a cell.

    Returns
    -------
    list
        As in the notebook's file.
    """
    pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    sources = [nbformat.v4.new_code_cell(textwrap.dedent(cell)) for cell in cells]
    notebook = nbformat.v4.new_notebook(cells=sources)
    names = ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")
    environment = {**os.environ, **{name: str(directory / name.lower()) for name in names}}
    resources = {"metadata": {"path": str(directory)}}
    processes.execute(notebook, env=environment, timeout=timeout, resources=resources)
    return list(notebook.cells[-1].outputs)
