"""examples/project, copied as a newcomer copies it, with nothing installed for it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "examples" / "project"


def run_its_tests(directory: Path, *options: str) -> str:
    """Run them in a copy; the plugin is named, because the environment may not know it yet."""
    copy = directory / "project"
    shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns(".venv", "__pycache__"))
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    plugins = ["-p", "horovodrunner.testing.plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *options]
    done = processes.run(command, cwd=copy, env=environment, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_what_needs_no_framework_passes(tmp_path: Path) -> None:
    assert "6 passed" in run_its_tests(tmp_path, "tests/test_plain.py")


@pytest.mark.horovod
@pytest.mark.heavy
def test_what_needs_pytorch_passes(tmp_path: Path) -> None:
    assert "3 passed" in run_its_tests(tmp_path, "tests/test_pytorch.py")


@pytest.mark.spark
@pytest.mark.slow
def test_what_needs_spark_passes(tmp_path: Path) -> None:
    assert "1 passed" in run_its_tests(tmp_path, "-m", "spark")


def test_its_ci_calls_targets_of_its_makefile() -> None:
    workflow = (PROJECT / ".github" / "workflows" / "tests.yml").read_text()
    makefile = (PROJECT / "Makefile").read_text()
    called = [line.split()[3] for line in workflow.splitlines() if "- run: make " in line]
    assert called
    for target in called:
        assert f"\n{target}: " in makefile
