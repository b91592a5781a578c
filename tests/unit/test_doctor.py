"""What the doctor says about machines that lack something."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import socket
import sys
from pathlib import Path

import pytest

from horovodrunner import doctor, prerequisites


def write_program(path: Path, lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


class TestExitCode:
    @pytest.fixture(autouse=True)
    def _no_frameworks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leave the frameworks out: their imports take seconds and are tested elsewhere."""
        monkeypatch.setenv("HOROVOD_WITHOUT_PYTORCH", "1")
        monkeypatch.setenv("HOROVOD_WITHOUT_TENSORFLOW", "1")

    def test_a_problem_is_exit_code_1_with_its_remedy(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert doctor.run_doctor() == 1
        lines = capsys.readouterr().out.splitlines()
        at = next(n for n, line in enumerate(lines) if line.startswith("problem  Horovod"))
        assert "neither torch nor tensorflow" in lines[at]
        assert "-> pip install" in lines[at + 1]

    def test_what_it_advises_can_be_installed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """There is no horovodrunner on the index."""
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        doctor.run_doctor()
        advised = re.findall(r"-> (pip install .*)", capsys.readouterr().out)
        assert len(advised) >= 2
        assert "pip install 'pyspark>=3.5' pyarrow pandas" in advised
        assert not [line for line in advised if "horovodrunner[" in line]

    def test_notes_are_no_problem(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fine = doctor.Finding("ok", "fits")
        monkeypatch.setattr(doctor, "_horovod", lambda: fine)
        monkeypatch.setenv("PYSPARK_PYTHON", "/no/such/python")
        assert doctor.run_doctor() == 0
        assert "note     executors" in capsys.readouterr().out


class TestJava:
    def finding(self, home: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> doctor.Finding:
        write_program(home / "bin" / "java", answer)
        monkeypatch.setenv("JAVA_HOME", str(home))
        return doctor._java()

    def test_the_version_and_the_place_are_shown(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finding = self.finding(tmp_path, "echo 'openjdk version \"21.0.2\"' >&2", monkeypatch)
        assert finding.verdict == "ok"
        assert "21" in finding.text
        assert str(tmp_path) in finding.text

    @pytest.mark.parametrize(("version", "major"), [("1.8.0_392", "8"), ("11.0.22", "11")])
    def test_an_old_one_is_a_problem(
        self, version: str, major: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finding = self.finding(tmp_path, f"echo 'java version \"{version}\"' >&2", monkeypatch)
        assert finding.verdict == "problem"
        assert f"is Java {major};" in finding.text
        assert "apt install openjdk-17" in finding.remedy

    def test_one_that_does_not_start_is_a_problem(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finding = self.finding(tmp_path, "echo 'cannot allocate' >&2; exit 1", monkeypatch)
        assert finding.verdict == "problem"
        assert "cannot allocate" in finding.text

    def test_none_at_all_is_a_problem(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("JAVA_HOME", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert "no Java was found" in doctor._java().text


class TestExecutorsPython:
    def finding(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> doctor.Finding:
        monkeypatch.setenv("PYSPARK_PYTHON", str(path))
        [finding] = doctor._worker_python()
        return finding

    def test_this_one_is_ok(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.finding(Path(sys.executable), monkeypatch).verdict == "ok"

    def test_another_version_is_a_problem(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = write_program(tmp_path / "python", "echo 2.7; echo /usr")
        finding = self.finding(other, monkeypatch)
        assert finding.verdict == "problem"
        assert "is Python 2.7" in finding.text
        assert sys.executable in finding.remedy

    def test_another_environment_is_a_note(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        other = write_program(tmp_path / "python", f"echo {version}; echo /elsewhere")
        finding = self.finding(other, monkeypatch)
        assert finding.verdict == "note"
        assert "/elsewhere" in finding.text

    def test_unset_is_no_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PYSPARK_PYTHON", raising=False)
        assert list(doctor._worker_python()) == []


class TestFramework:
    def finding(self, program: str) -> doctor.Finding:
        return doctor._framework("torch", "2.13.0", program)

    def test_one_that_imports_is_ok(self) -> None:
        finding = self.finding("print('noise'); print('answer:CPU build')")
        assert (finding.verdict, finding.text) == ("ok", "2.13.0, CPU build")

    def test_one_that_cannot_be_imported_is_a_problem(self) -> None:
        finding = self.finding("raise ImportError('libcudart.so.12 not found')")
        assert finding.verdict == "problem"
        assert "libcudart.so.12 not found" in finding.text

    def test_a_broken_one_is_installed_again_by_its_name_on_the_index(self) -> None:
        [owner, *_] = importlib.metadata.packages_distributions()["pytest"]
        finding = doctor._framework("pytest", "2.15.0+cu132", "raise ImportError")
        assert finding.remedy == f"pip install --force-reinstall {owner}==2.15.0"

    def test_one_that_crashes_is_a_problem(self) -> None:
        finding = self.finding("import os; os.abort()")
        assert finding.verdict == "problem"
        assert "exit code -6" in finding.text


class TestMachine:
    def test_a_broken_gpu_driver_is_a_problem(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_program(tmp_path / "nvidia-smi", "echo 'Driver/library version mismatch'; exit 18")
        monkeypatch.setenv("PATH", str(tmp_path))
        [finding] = doctor._gpus()
        assert finding.verdict == "problem"
        assert "version mismatch" in finding.text

    def test_every_gpu_is_a_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_program(tmp_path / "nvidia-smi", "echo '0, A100, 40960 MiB, 550'; echo '1, A100'")
        monkeypatch.setenv("PATH", str(tmp_path))
        assert [finding.text[:7] for finding in doctor._gpus()] == ["0, A100", "1, A100"]

    def test_a_host_name_without_address_is_a_problem(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("SPARK_LOCAL_IP", raising=False)
        monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
        finding = doctor._host_name()
        assert finding.verdict == "problem"
        assert "SPARK_LOCAL_IP" in finding.remedy

    def test_the_loopback_is_listed(self) -> None:
        assert any("127.0.0.1" in finding.text for finding in doctor._interfaces())

    def test_a_spark_home_without_spark_is_a_problem(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SPARK_HOME", str(tmp_path))
        assert "problem" in [finding.verdict for finding in doctor._spark()]


class TestPrerequisites:
    @pytest.mark.parametrize("standard", [17, 20])
    def test_a_compiler_that_is_too_old_is_refused(
        self, standard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refuse = f'*"-std=c++{standard} "*) echo "unrecognized option"; exit 1;;'
        old = write_program(tmp_path / "c++", f'case "$*" in {refuse} esac')
        monkeypatch.setenv("CXX", str(old))
        problem = str(prerequisites.compiler_problem(standard))
        assert "unrecognized option" in problem
        assert f"C++{standard}" in problem

    def test_a_library_that_is_too_old_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The compiler takes -std=c++20, and its headers know only C++17."""
        command = 'exec c++ "$(echo "$1" | sed s/20/17/)" -fsyntax-only -x c++ -'
        monkeypatch.setenv("CXX", str(write_program(tmp_path / "c++20", command)))
        assert prerequisites.compiler_problem(17) is None
        assert "does not compile C++20" in str(prerequisites.compiler_problem(20))

    def test_an_old_cmake_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        old = write_program(tmp_path / "cmake", "echo 'cmake version 3.10.2'")
        monkeypatch.setenv("HOROVOD_CMAKE", str(old))
        problem = str(prerequisites.cmake_problem())
        assert "version 3.10" in problem
        assert "\n" not in problem

    def test_this_machine_can_build(self) -> None:
        assert prerequisites.build_problems() == []
