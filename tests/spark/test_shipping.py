"""Executors whose Python is not the driver's: shipped with the application, or simply another one.

The standalone cluster's environment does not know this one; see docs/shipping.md.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import sys
import sysconfig
import textwrap
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import (
    BarrierStageError,
    ConfigurationError,
    HorovodRunner,
    WorkerFailedError,
)
from horovodrunner.placement.packed import FILE, PackedEnvironment
from tests import processes
from tests.spark.standalone import standalone

pytestmark = pytest.mark.spark

ROOT = Path(__file__).resolve().parents[2]
PREFIX = Path(sys.prefix)

TRAIN = """
    import importlib.util
    import json
    import os
    import sys

    from pyspark.sql import SparkSession

    from horovodrunner import HorovodRunner

    def train():
        import horovodrunner

        own = {"executable": sys.executable, "package": horovodrunner.__file__, "path": sys.path}
        with open("/proc/self/maps") as maps:
            own["files"] = [line.split()[-1] for line in maps if "python" in line]
        print("SEEN", json.dumps(own))
        return int(os.environ["WORLD_SIZE"])
"""


def run(*command: str | Path, **options: Any) -> processes.CompletedProcess[str]:
    """Run a command that must succeed."""
    done = processes.run([str(part) for part in command], capture_output=True, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done


def install(environment: Path, *what: str | Path) -> None:
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", environment / "bin/python")
    run(*pip, "install", "--no-compile", *what)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with this package and what it needs on executors, no framework."""
    directory = tmp_path_factory.mktemp("shipping")
    source, environment = directory / "source", directory / "environment"
    source.mkdir()  # setuptools writes into the tree it builds
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "horovodrunner", source / "horovodrunner", ignore=caches)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*wheel, "--wheel-dir", directory, source)

    run(sys.executable, "-m", "venv", "--without-pip", environment)
    needed = ("pyarrow", "pyyaml", "--constraint", ROOT / "constraints.txt")
    install(environment, *directory.glob("*.whl"), *needed)
    site_packages = next(environment.glob("lib/python*/site-packages"))
    for file in importlib.metadata.files("horovod") or ():
        if ".." not in file.parts:
            target = site_packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), target)
    return environment


TYPED = """
    import sparkdl
    from sparkdl import HorovodRunner
    from sparkdl.horovod import log_to_driver


    def main(epochs: int) -> int:
        log_to_driver(sparkdl.__version__)
        return epochs


    HorovodRunner(np=-1).run(main, epochs=1)
    HorovodRunner(np="two")
"""


def test_type_checkers_see_the_annotations_of_what_is_installed(
    environment: Path, tmp_path: Path
) -> None:
    (tmp_path / "typed.py").write_text(textwrap.dedent(TYPED))
    cache = str(ROOT / ".mypy_cache" / "of_what_is_installed")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", cache]
    command += ["--python-executable", str(environment / "bin/python"), "typed.py"]
    done = processes.run(command, cwd=tmp_path, capture_output=True)
    [error] = [line for line in done.stdout.splitlines() if "error:" in line]
    assert error.startswith('typed.py:13: error: Argument "np" to "HorovodRunner" has incompatible')


@pytest.fixture(scope="module")
def archive(environment: Path) -> Path:
    """What the command makes of it; venv-pack is lent from this environment."""
    path = environment.with_suffix(".tar.gz")
    lent = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    command = (environment / "bin/python", "-m", "horovodrunner", "pack", "-o", path)
    assert f"spark.archives={path}#environment" in run(*command, env=lent).stdout
    return path


@dataclass(frozen=True)
class Cluster:
    """A standalone cluster: the master's URL, and where its executors work."""

    url: str
    work: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Its environment has nothing of the driver's."""
    directory = tmp_path_factory.mktemp("cluster")
    inherited = ("HOME", "USER", "JDK_JAVA_OPTIONS", "SPARK_LOCAL_DIRS", "TMPDIR")
    java = Path(shutil.which("java") or "/usr/bin/java").resolve()
    environ = {
        **{name: os.environ[name] for name in inherited if name in os.environ},
        "PATH": "/usr/bin:/bin",
        "JAVA_HOME": str(java.parents[1]),
    }
    with standalone(directory, environ) as url:
        yield Cluster(url, directory / "work")


def seen_by_ranks(shown: str) -> dict[int, dict[str, Any]]:
    found = re.findall(r"^\[(\d+)\]<stdout>:SEEN (.*)$", shown, re.MULTILINE)
    return {int(rank): json.loads(text) for rank, text in found}


def assert_ranks_ran_in_the_archives_python(shown: str, cluster: Cluster) -> None:
    ranks = seen_by_ranks(shown)
    assert sorted(ranks) == [0, 1]
    for seen in ranks.values():
        executable = str(Path(seen["executable"]).relative_to(cluster.work))
        assert re.fullmatch(r"app-\S+/\d+/environment/bin/python", executable)
        assert Path(seen["package"]).is_relative_to(cluster.work)
        assert sysconfig.get_path("purelib") not in seen["path"]
        # not even the interpreter is the driver's machine's
        assert not [file for file in seen["files"] if file.startswith(sys.base_prefix)]
        assert not [place for place in seen["path"] if place.startswith(sys.base_prefix)]


def driver_environment(**changes: str) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYSPARK_PYTHON"}
    return {**environ, **changes}


@pytest.mark.slow
def test_an_archive_brings_the_executors_their_python(
    cluster: Cluster, environment: Path, archive: Path, tmp_path: Path
) -> None:
    script = f"""
        builder = SparkSession.builder.master("{cluster.url}")
        builder.config("spark.archives", "{archive}#environment")
        builder.config("spark.executor.memory", "512m").config("spark.ui.enabled", "false")
        builder.config("spark.log.level", "ERROR").getOrCreate()
        print("np was", HorovodRunner(np=2, driver_log_verbosity="all").run(train))
    """
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(TRAIN) + textwrap.dedent(script))
    environ = driver_environment(PYSPARK_PYTHON="./environment/bin/python")
    hidden = environment.rename(environment.with_name("hidden"))
    try:
        shown = run(sys.executable, path, env=environ, cwd=tmp_path).stdout
    finally:
        hidden.rename(environment)
    assert "np was 2\n" in shown
    assert_ranks_ran_in_the_archives_python(shown, cluster)


def submit(
    master: str, script: str, tmp_path: Path, *options: str
) -> processes.CompletedProcess[str]:
    import pyspark

    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(TRAIN) + textwrap.dedent(script))
    confs = {
        "spark.pyspark.driver.python": sys.executable,
        "spark.executor.memory": "512m",
        "spark.ui.enabled": "false",
        "spark.log.level": "ERROR",
    }
    settings = [part for name, value in confs.items() for part in ("--conf", f"{name}={value}")]
    spark_submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    return processes.run(
        [str(spark_submit), "--master", master, *settings, *options, str(path)],
        capture_output=True,
        env=driver_environment(),
        cwd=tmp_path,
    )


@pytest.mark.slow
def test_spark_submit_ships_an_archive_and_modules_of_the_users(
    cluster: Cluster, archive: Path, tmp_path: Path
) -> None:
    helpers = tmp_path / "helpers"
    helpers.mkdir()
    (helpers / "a_module.py").write_text("def name():\n    return 'a module'\n")
    with zipfile.ZipFile(helpers / "packages.zip", "w") as packages:
        packages.writestr("a_package/__init__.py", "")
        packages.writestr("a_package/inner.py", "def name():\n    return 'a package in a zip'\n")
    script = """
        from a_package.inner import name as name_by_reference

        def train_with_helpers():
            import a_module
            import a_package

            names = f"{a_module.name()}, {name_by_reference()}, np {train()}"
            return {"names": names, "files": [a_module.__file__, a_package.__file__]}

        SparkSession.builder.getOrCreate()
        result = HorovodRunner(np=2, driver_log_verbosity="all").run(train_with_helpers)
        print("shipped:", json.dumps(result))
    """
    done = submit(
        cluster.url,
        script,
        tmp_path,
        *("--archives", f"{archive}#environment"),
        *("--conf", "spark.pyspark.python=./environment/bin/python"),
        *("--py-files", f"{helpers / 'a_module.py'},{helpers / 'packages.zip'}"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shipped = json.loads(re.findall(r"^shipped: (.*)$", done.stdout, re.MULTILINE)[0])
    assert shipped["names"] == "a module, a package in a zip, np 2"
    for file in shipped["files"]:
        assert Path(file).is_relative_to(cluster.work)  # not the driver's copy
    assert_ranks_ran_in_the_archives_python(done.stdout, cluster)


def test_spark_submit_ends_with_the_cause_of_a_failed_run(
    environment: Path, tmp_path: Path
) -> None:
    script = """
        def fail():
            if os.environ["RANK"] == "1":
                raise ValueError("learning rate -1 is not positive")

        SparkSession.builder.getOrCreate()
        HorovodRunner(np=2).run(fail)
        print("not reached")
    """
    python = f"spark.pyspark.python={environment / 'bin/python'}"
    done = submit("local[2]", script, tmp_path, "--conf", python)
    assert done.returncode == 1
    assert "not reached" not in done.stdout
    # spark-submit shows both streams of the driver's Python on its own standard output.
    error = done.stdout[done.stdout.rindex("WorkerFailedError: ") :]
    assert re.match(r".*rank 1 on \S+ failed: ValueError: learning rate -1 is not positive", error)


@pytest.fixture
def changed(environment: Path, tmp_path: Path) -> Path:
    """A copy of the environment, to be changed by a test."""
    copy = tmp_path / "changed"
    shutil.copytree(environment, copy, symlinks=True, copy_function=os.link)
    return copy


def use_python(spark: Any, python: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the executors of a running session use another Python."""
    monkeypatch.setattr(spark.sparkContext, "pythonExec", str(python))


def test_another_cloudpickle_on_the_executors_is_shown_and_the_run_goes_on(
    spark: Any, changed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = importlib.metadata.version("cloudpickle")
    other = "3.0.0" if own != "3.0.0" else "3.1.0"
    install(changed, f"cloudpickle=={other}")
    use_python(spark, changed / "bin/python", monkeypatch)
    assert HorovodRunner(np=2).run(lambda: sys.prefix) == str(changed)
    shown = capsys.readouterr().out
    table = shown[shown.index("what is installed differs:\n") :].splitlines()
    assert table[1].split() == ["driver", "executors"]
    assert table[2].split()[:3] == ["cloudpickle", own, other]
    assert not table[3].startswith("horovod")


def test_another_release_of_ours_on_the_executors_is_refused_with_the_table(
    spark: Any, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = importlib.metadata.version("horovodrunner")
    [metadata] = changed.glob("lib/python*/site-packages/horovodrunner-*.dist-info/METADATA")
    text = metadata.read_text()
    metadata.unlink()  # the original is the same file
    metadata.write_text(text.replace(f"\nVersion: {own}\n", "\nVersion: 99.0\n"))
    use_python(spark, changed / "bin/python", monkeypatch)
    with pytest.raises(ConfigurationError) as caught:
        HorovodRunner(np=2).run(lambda: sys.prefix)
    lines = str(caught.value).splitlines()
    assert "the same release of horovodrunner" in lines[0]
    assert lines[1].split() == ["driver", "executors"]
    assert lines[2].split()[:3] == ["horovodrunner", own, "99.0"]


def test_on_executors_without_horovod_a_main_that_imports_it_says_how_to_build_it(
    spark: Any, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in changed.glob("lib/python*/site-packages/horovod"):
        shutil.rmtree(package)
    use_python(spark, changed / "bin/python", monkeypatch)

    def main() -> None:
        import horovod.torch as hvd

        hvd.init()

    assert HorovodRunner(np=2).run(lambda: sys.prefix) == str(changed)
    with pytest.raises(WorkerFailedError, match=f"{changed}.*-m horovodrunner build-horovod"):
        HorovodRunner(np=2).run(main)


def test_an_executor_whose_c_library_is_older_than_the_archives_is_named(
    spark: Any, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = PackedEnvironment("3.11.7", "x86_64", "2.999", "0" * 64, {})
    (changed / FILE).write_bytes(packed.to_bytes())
    use_python(spark, changed / "bin/python", monkeypatch)
    with pytest.raises(ConfigurationError, match=r"needs glibc 2\.999, and .* has 2\.\d+: build"):
        HorovodRunner(np=2).run(lambda: sys.prefix)


def test_another_python_on_the_executors_is_said_in_one_sentence(
    spark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spark.sparkContext, "pythonVer", "3.9")
    there = f"{sys.version_info[0]}.{sys.version_info[1]}"
    with pytest.raises(BarrierStageError) as caught:
        HorovodRunner(np=2).run(lambda: sys.prefix)
    text = str(caught.value)
    assert text.startswith(f"the executors run Python {there} and the driver runs Python 3.9, and")
    assert "PYSPARK_PYTHON (for spark-submit also spark.pyspark.python)" in text
    assert "\n" not in text


def test_an_archive_that_was_forgotten_is_named(
    spark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_python(spark, "./environment/bin/python", monkeypatch)
    with pytest.raises(BarrierStageError) as caught:
        HorovodRunner(np=2).run(lambda: sys.prefix)
    text = str(caught.value)
    assert text.startswith("an executor cannot start its Python: ")
    assert '"./environment/bin/python": error=2, No such file or directory' in text
    assert "spark.archives=environment.tar.gz#environment" in text
