"""Suites of users, run in processes of their own."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import processes

Suite = Callable[..., processes.CompletedProcess[str]]

OUTCOME = re.compile(r"(\d+) (passed|failed|skipped|errors?)")


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """A function that runs a test module with options, as a user's suite."""
    directory = tmp_path / "suite"
    directory.mkdir()

    def run(text: str, *options: str, ini: str = "") -> processes.CompletedProcess[str]:
        (directory / "test_theirs.py").write_text(text)
        (directory / "pytest.ini").write_text(f"[pytest]\nfilterwarnings = error\n{ini}")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        command += ["-p", "horovodrunner.testing.plugin", *options]
        return processes.run(command, cwd=directory, capture_output=True)

    return run


def outcomes(done: processes.CompletedProcess[str]) -> dict[str, int]:
    """Return how many tests passed, failed and so on."""
    lines = done.stdout.strip().splitlines()
    return {what: int(count) for count, what in OUTCOME.findall(lines[-1] if lines else "")}
