"""``python -m horovodrunner`` as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "horovodrunner", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
        timeout=60,
        check=False,
    )


def test_alone_it_prints_help() -> None:
    done = run()
    assert done.returncode == 0
    assert "build-horovod" in done.stdout
    assert "doctor" in done.stdout


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"horovodrunner {version('horovodrunner')}\n")


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["build-horovod", "--check", "--force"]], ids=" ".join
)
def test_wrong_arguments_are_exit_code_2(arguments: list[str]) -> None:
    assert run(*arguments).returncode == 2


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from horovodrunner.__main__ import main; main([]);"
        "print(sorted({'torch', 'tensorflow', 'pyspark', 'horovod'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_error_is_one_line_without_a_traceback() -> None:
    done = run("build-horovod", HOROVOD_WITHOUT_PYTORCH="1", HOROVOD_WITHOUT_TENSORFLOW="1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: neither torch nor tensorflow")
    assert len(done.stderr.splitlines()) == 1


def test_check_reports_a_horovod_built_for_other_versions(tmp_path: Path) -> None:
    package = tmp_path / "horovod"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "metadata.json").write_text(json.dumps({"pytorch": "1.0", "tensorflow": "1.0"}))
    done = run("build-horovod", "--check", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "built for" in done.stdout
    assert "1.0" in done.stdout
    assert "python -m horovodrunner build-horovod" in done.stdout
