"""The test suite that docs/testing.md shows, run as a user runs it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "which", ["not spark", pytest.param("spark", marks=[pytest.mark.spark, pytest.mark.slow])]
)
def test_the_suite_that_is_shown_passes(tmp_path: Path, which: str) -> None:
    text = (ROOT / "docs" / "testing.md").read_text()
    files = dict(re.findall(r"^```\w+\n# (\w+\.\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert {"conftest.py", "pytest.ini", "test_training.py"} < files.keys()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    plugins = ["-p", "horovodrunner.testing.plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugins, "-m", which]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = processes.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = "".join(files.values())
    on_both = len(re.findall(r"^def test_.*\(np\b", shown, re.MULTILINE))
    on_spark = on_both + shown.count("@pytest.mark.spark\n")
    here = len(re.findall(r"^def test_", shown, re.MULTILINE)) - (on_spark - on_both)
    assert f"{on_spark if which == 'spark' else here} passed" in done.stdout
