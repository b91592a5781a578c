"""The test suite that docs/testing.md shows, run as a user runs it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.horovod
@pytest.mark.parametrize(
    "which", ["not spark", pytest.param("spark", marks=[pytest.mark.spark, pytest.mark.slow])]
)
def test_the_suite_that_is_shown_passes(tmp_path: Path, which: str) -> None:
    text = (ROOT / "docs" / "testing.md").read_text()
    files = dict(re.findall(r"^```\w+\n# (\w+\.\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert {"conftest.py", "pytest.ini", "test_training.py"} < files.keys()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    tests = len(re.findall(r"^def test_.*\(np", "".join(files.values()), re.MULTILINE))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", which]
    done = processes.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    of_gpus = which == "spark"
    assert f"{tests + of_gpus} passed" in done.stdout
