"""The linters have nothing to say. They run beside the tests, mypy first: it takes longest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("mypy", "ruff check", "ruff format --check", "lint-imports")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_found_by(command: str) -> None:
    program, *options = command.split()
    path = Path(sys.executable).with_name(program)
    if not path.exists():
        pytest.skip(f"{program} is not installed here")
    done = processes.run([path, *options], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
