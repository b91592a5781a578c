"""The package sparkdl: its signatures, its warnings, and what happens beside another one."""

from __future__ import annotations

import inspect
import json
import os
import sys
import textwrap
from pathlib import Path

import pytest

import horovodrunner
from horovodrunner import doctor
from tests import processes

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "horovodrunner" / "compat"


def python(script: str, *before: Path, behind: tuple[Path, ...] = ()) -> str:
    """Run a script with our sparkdl on the path, others before or behind it; give all output."""
    path = os.pathsep.join(str(entry) for entry in (*before, OURS, *behind, ROOT))
    done = processes.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=processes.PIPE,
        stderr=processes.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def another(tmp_path: Path) -> Path:
    """A directory with a package of the same name."""
    package = tmp_path / "site" / "sparkdl"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('WHOSE = "another"\n')
    return package.parent


class TestHorovodRunner:
    def test_the_signatures_are_the_documented_ones(self) -> None:
        from sparkdl import HorovodRunner

        init = inspect.getfullargspec(HorovodRunner.__init__)
        assert init == inspect.FullArgSpec(
            args=["self"],
            varargs=None,
            varkw=None,
            defaults=None,
            kwonlyargs=["np", "driver_log_verbosity"],
            kwonlydefaults={"driver_log_verbosity": "log_callback_only"},
            annotations={},
        )
        run = inspect.getfullargspec(HorovodRunner.run)
        assert run == inspect.FullArgSpec(
            args=["self", "main"],
            varargs=None,
            varkw="kwargs",
            defaults=None,
            kwonlyargs=[],
            kwonlydefaults=None,
            annotations={},
        )

    def test_np_is_given_by_name(self) -> None:
        from sparkdl import HorovodRunner

        with pytest.raises(TypeError):
            HorovodRunner(2)
        with pytest.raises(TypeError, match="stall_timeout"):
            HorovodRunner(np=-1, stall_timeout=3)
        with pytest.raises(ValueError, match="log_callback_only"):
            HorovodRunner(np=-1, driver_log_verbosity="loud")

    @pytest.mark.parametrize("package", ["sparkdl", "horovodrunner"])
    def test_warnings_name_the_users_line(
        self, package: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runner_class = __import__(package).HorovodRunner
        unused = bytearray(os.urandom(11 * 2**20))

        def main() -> int:
            return len(unused)

        monkeypatch.setattr("horovodrunner.processes.driver.run.run_attempts", lambda *_, **__: 0)
        runner = runner_class(np=0, driver_log_verbosity="all")
        with pytest.warns() as caught:
            runner.run(main)
        assert [warning.category for warning in caught] == [DeprecationWarning, UserWarning]
        assert "the variable 'unused'" in str(caught[1].message)
        assert {warning.filename for warning in caught} == {__file__}

    def test_it_runs_and_its_names_are_those_of_horovodrunner(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        import sparkdl
        from sparkdl import HorovodRunner
        from sparkdl.horovod import log_to_driver

        def main(start: int) -> int:
            log_to_driver("from the worker")
            return start + 1

        assert HorovodRunner(np=-1).run(main=main, start=1) == 2
        assert "from the worker" in capfd.readouterr().out.splitlines()
        assert issubclass(HorovodRunner, horovodrunner.HorovodRunner)
        assert sparkdl.__version__ == horovodrunner.__version__
        assert log_to_driver is horovodrunner.log_to_driver


def test_it_is_installed_as_a_top_level_package() -> None:
    script = f"""
        import json, os, runpy, setuptools
        os.chdir({str(ROOT)!r})
        setuptools.setup = lambda **arguments: print(json.dumps(arguments))
        runpy.run_path("setup.py")
    """
    given = json.loads(python(script))
    packages = set(given["packages"])
    assert packages >= {
        "horovodrunner",
        "horovodrunner.processes.worker",
        "horovodrunner.callbacks",
    }
    assert packages >= {"sparkdl", "sparkdl.horovod", "sparkdl.horovod.tensorflow"}
    assert not [name for name in packages if name.startswith("horovodrunner.compat.sparkdl")]
    assert given["package_dir"] == {"sparkdl": "horovodrunner/compat/sparkdl"}
    # the other one is a module: its files cannot be those of the package that it stands in for
    assert packages >= {"horovodrunner.compat.petastorm", "horovodrunner.compat.petastorm.spark"}
    assert given["py_modules"] == ["petastorm"]


class TestImport:
    def test_no_framework_and_no_spark_is_imported(self) -> None:
        script = """
            import sys
            from sparkdl import HorovodRunner
            from sparkdl.horovod import log_to_driver
            from sparkdl.horovod.tensorflow.keras import LogCallback
            heavy = "pyspark", "numpy", "torch", "tensorflow", "keras", "tf_keras", "lightning"
            print([name for name in heavy if name in sys.modules])
        """
        assert python(script) == "[]\n"

    def test_one_that_is_hidden_is_named_once_at_the_line_that_imports(self, another: Path) -> None:
        script = """
            import warnings

            def shown(message, category, filename, line, *rest):
                print(category.__name__, line, message)

            warnings.showwarning = shown
            warnings.simplefilter("always")
            from sparkdl.horovod import log_to_driver
            import sparkdl
        """
        [line] = python(script, behind=(another,)).splitlines()
        assert line.startswith("UserWarning 9 this is the sparkdl of horovodrunner"), line
        assert str(another / "sparkdl" / "__init__.py") in line
        assert "pip uninstall sparkdl" in line

    def test_a_distribution_of_that_name_is_named(self, tmp_path: Path) -> None:
        """As pip leaves it when ours was installed over it, or it over ours."""
        information = tmp_path / "sparkdl-9.1.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: sparkdl\nVersion: 9.1")
        output = python("import sparkdl", behind=(tmp_path,))
        assert "the distribution sparkdl 9.1" in output

    @pytest.mark.parametrize(
        ("source", "advised"),
        [
            ({"url": "file:///my%20code", "dir_info": {"editable": True}}, "--editable '/my code'"),
            ({"url": "file:///code", "dir_info": {}}, "/code"),
            ({"url": "file:///a.whl", "archive_info": {}}, "/a.whl"),
            ({"url": "https://host/a.whl", "archive_info": {}}, "https://host/a.whl"),
            (None, "the checkout or the wheel of horovodrunner"),
        ],
    )
    def test_ours_is_installed_again_from_where_it_came(
        self, source: object, advised: str, another: Path, tmp_path: Path
    ) -> None:
        information = tmp_path / "horovodrunner-0.1.0.dist-info"
        information.mkdir()
        text = "Metadata-Version: 2.1\nName: horovodrunner\nVersion: 0.1.0\n"
        (information / "METADATA").write_text(text)
        if source:
            (information / "direct_url.json").write_text(json.dumps(source))
        output = python("import sparkdl", tmp_path, behind=(another,))
        assert f"pip install --force-reinstall --no-deps {advised}; or import" in output

    def test_alone_it_says_nothing(self) -> None:
        assert python("import sparkdl") == ""


class TestDoctor:
    PROGRAM = """
        from horovodrunner import doctor
        for finding in doctor._sparkdl():
            print(finding.verdict, "sparkdl", finding.text, "->", finding.remedy)
    """

    def test_ours_is_ok(self) -> None:
        assert python(self.PROGRAM).startswith("ok sparkdl horovodrunner's (")

    def test_another_one_that_comes_first_is_told(self, another: Path) -> None:
        line = python(self.PROGRAM, another)
        assert line.startswith(f"note sparkdl {another}/sparkdl/__init__.py is what gets imported")
        assert "pip uninstall sparkdl" in line

    def test_another_one_that_is_hidden_is_told(self, another: Path) -> None:
        line = python(self.PROGRAM, behind=(another,))
        assert line.startswith("note sparkdl horovodrunner's is imported")
        assert f"it hides {another}/sparkdl/__init__.py" in line

    def test_no_sparkdl_at_all_is_no_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("horovodrunner.drop_in.find_sparkdl", lambda: None)
        assert list(doctor._sparkdl()) == []
