"""The real Horovod of this environment, and the real wheel it came from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from horovodrunner import doctor
from horovodrunner.errors import HorovodBuildError
from horovodrunner.horovod_build import build_horovod, check_horovod, verify, verify_allreduce
from horovodrunner.horovod_build.install import cached_wheel
from horovodrunner.horovod_build.recipe import (
    cache_key,
    current_recipe,
    framework_versions,
    horovod_folder,
    installed_status,
    toolchain_facts,
)
from horovodrunner.horovod_build.sources import RECORD_NAME
from tests import processes

pytestmark = pytest.mark.horovod


def test_the_installed_one_fits() -> None:
    status = check_horovod()
    assert status.state == "ready", status.text


@pytest.mark.parametrize("framework", ["torch", pytest.param("tensorflow", marks=pytest.mark.slow)])
def test_the_version_is_the_one_that_the_framework_reports(framework: str) -> None:
    """Horovod's build asks the imported framework; here nothing is imported."""
    if framework not in framework_versions():
        pytest.skip(f"{framework} is not installed")
    code = f"import {framework}; print('version:' + {framework}.__version__)"
    done = processes.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert f"version:{framework_versions()[framework]}" in done.stdout.splitlines()


def test_a_second_build_has_nothing_to_do() -> None:
    said: list[str] = []
    build_horovod(say=said.append)
    assert len(said) == 1
    assert said[0].endswith("nothing to do")


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_two_processes_reduce_over_gloo(framework: str) -> None:
    if framework not in framework_versions():
        pytest.skip(f"{framework} is not installed")
    verify_allreduce([framework])


def test_a_wrong_sum_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = verify.SCRIPT.read_text().replace("op=hvd.Sum", "op=hvd.Average")
    changed = tmp_path / "allreduce.py"
    changed.write_text(text)
    monkeypatch.setattr(verify, "SCRIPT", changed)
    framework = next(iter(framework_versions()))
    with pytest.raises(HorovodBuildError, match=r"gave 1\.5, not 3\.0"):
        verify_allreduce([framework])


@pytest.mark.slow
def test_a_second_environment_compiles_nothing(tmp_path: Path) -> None:
    recipe = current_recipe()
    if cached_wheel(cache_key(recipe, toolchain_facts(recipe))) is None:
        pytest.skip("the wheel of the installed Horovod is no longer in the cache")
    said: list[str] = []
    build_horovod(target=tmp_path, say=said.append)
    assert any("using the wheel built earlier" in line for line in said), said
    assert not any("compiling" in line for line in said)
    assert (tmp_path / "horovod" / RECORD_NAME).exists()
    assert installed_status(current_recipe(), tmp_path / "horovod").state == "ready"


def test_pip_knows_the_record_as_part_of_the_package() -> None:
    folder = horovod_folder()
    assert folder is not None
    [record] = folder.parent.glob("horovod-*.dist-info/RECORD")
    assert f"horovod/{RECORD_NAME}," in record.read_text()


def test_the_doctor_finds_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run_doctor() == 0, capsys.readouterr().out
    assert "is built for torch" in capsys.readouterr().out
