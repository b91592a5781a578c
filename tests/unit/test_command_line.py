"""``python -m horovodrunner`` as a person runs it."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests import processes
from tests.processes import PIPE, STDOUT


def run(*arguments: str, **environ: str) -> processes.CompletedProcess[str]:
    return processes.run(
        [sys.executable, "-m", "horovodrunner", *arguments],
        capture_output=True,
        env={**os.environ, **environ},
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
    done = processes.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


ROOT = Path(__file__).resolve().parents[2]
WITHOUT_FRAMEWORKS = {"HOROVOD_WITHOUT_PYTORCH": "1", "HOROVOD_WITHOUT_TENSORFLOW": "1"}


def test_the_version_is_known_without_an_installation(tmp_path: Path) -> None:
    (tmp_path / "horovodrunner").symlink_to(ROOT / "horovodrunner")
    script = "import horovodrunner; print(horovodrunner.__version__)"
    done = processes.run(
        [sys.executable, "-S", "-c", script],  # without site-packages
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        check=True,
    )
    assert done.stdout == f"{version('horovodrunner')}\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("doctor --help", 0),
        ("doctor", 1),
        ("build-horovod --check", 1),
        ("build-horovod", 1),
        ("no-such-command", 2),
    ],
)
def test_a_reader_that_goes_away_changes_nothing_but_what_is_shown(
    arguments: str, code: int
) -> None:
    """As with ``doctor | head``: no traceback, and the exit code of what was found."""
    command = [sys.executable, "-m", "horovodrunner", *arguments.split()]
    environ = {**os.environ, **WITHOUT_FRAMEWORKS}
    with processes.started(command, stdout=PIPE, stderr=PIPE, env=environ) as reader:
        assert reader.stdout
        reader.stdout.close()
        assert reader.stderr
        shown = reader.stderr.read()
        reader.wait()
    with processes.started(command, stdout=PIPE, stderr=STDOUT, env=environ) as nobody:
        assert nobody.stdout
        nobody.stdout.close()
        nobody.wait()
    assert [reader.returncode, nobody.returncode] == [code, code]
    assert "Broken" not in shown
    assert "Traceback" not in shown


def test_what_a_terminal_cannot_show_is_escaped() -> None:
    settings = {"PYSPARK_PYTHON": "/pâth/python", "PYTHONIOENCODING": "ascii"}
    done = run("doctor", **settings, **WITHOUT_FRAMEWORKS)
    assert done.returncode == 1
    assert r"PYSPARK_PYTHON=/p\xe2th/python" in done.stdout
    assert "no problem" not in done.stdout
    assert not done.stderr


def test_an_error_is_one_line_without_a_traceback() -> None:
    done = run("build-horovod", **WITHOUT_FRAMEWORKS)
    assert done.returncode == 1
    assert done.stderr.startswith("error: neither torch nor tensorflow")
    assert len(done.stderr.splitlines()) == 1
    assert "pip install torch" in done.stderr


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
