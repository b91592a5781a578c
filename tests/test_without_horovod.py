"""The tests for an environment without Horovod, run in one, beside the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.spark
@pytest.mark.timeout(600)
def test_what_needs_no_horovod_runs_where_there_is_none(pytestconfig: pytest.Config) -> None:
    command: list[str | Path] = [
        sys.executable,
        ROOT / "scripts" / "without_horovod.py",
        "tests/without_horovod",
    ]
    command += ["-p", "no:cacheprovider", "-m", pytestconfig.getoption("markexpr")]
    done = processes.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
