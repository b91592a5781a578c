"""Scripts on executors: their code travels, and the command as the application of spark-submit."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import psutil
import pytest

import horovodrunner
from horovodrunner import ConfigurationError, HorovodRunner, WorkerFailedError
from tests import processes
from tests.spark.standalone import standalone
from tests.waiting import wait_for_line, wait_until

pytestmark = pytest.mark.spark

TRAIN = """
import inspect, json, multiprocessing, os, pickle, sys
from pathlib import Path

import beside
import nested.deep

class Net:
    pass

def double(number):
    return 2 * number

if __name__ == "__main__":
    if "fail" in sys.argv:
        beside.fail()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        doubled = pool.map(double, [1])
    facts = {
        "argv": sys.argv,
        "files": [__file__, beside.__file__, nested.deep.__file__],
        "path": [each for each in sys.path if "project" in each],
        "here": os.getcwd(),
        "source": inspect.getsource(double),
        "pickled": type(pickle.loads(pickle.dumps(Net()))) is Net,
        "doubled": doubled,
        "data": [Path("data.txt").read_text(), Path(__file__, "../../data.txt").resolve().name],
        "left": sorted(each.name for each in Path(__file__).parents[1].iterdir()),
    }
    Path(sys.argv[1] + os.environ["RANK"]).write_text(json.dumps(facts))
    Path("model.pt").touch()
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Code with a script in a directory of its own, and what must not travel."""
    directory = tmp_path / "project"
    for name in ("src/nested", ".git", "runs"):
        (directory / name).mkdir(parents=True)
    (directory / "src" / "train.py").write_text(TRAIN)
    (directory / "src" / "beside.py").write_text("def fail():\n    raise ValueError('too large')\n")
    (directory / "src" / "nested" / "deep.py").write_text(
        "from .other import value\nif __name__ == '__main__':\n    print('module', value)\n"
    )
    (directory / "src" / "nested" / "other.py").write_text("value = 7\n")
    (directory / "data.txt").write_text("data")
    return directory


@pytest.mark.usefixtures("spark")
def test_a_script_runs_in_a_copy_of_its_code(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project / "src"))
    runner = HorovodRunner(np=2, driver_log_verbosity="all", run_dir=project / "runs")
    runner.run_script("src/train.py", tmp_path / "facts", 3, code_dir=".")
    shown = capfd.readouterr().out
    assert shown.count("HorovodRunner: model.pt: written into a copy of the code") == 1
    for rank in "01":
        facts = json.loads(Path(f"{tmp_path}/facts{rank}").read_text())
        copy = facts["here"]
        assert copy.endswith("/code/project")
        assert not copy.startswith(str(project))
        assert not Path(copy).exists()  # it goes with the run
        assert facts["argv"] == ["src/train.py", str(tmp_path / "facts"), "3"]
        assert facts["files"] == [
            f"{copy}/src/{name}" for name in ("train.py", "beside.py", "nested/deep.py")
        ]
        assert set(facts["path"]) == {f"{copy}/src"}
        assert facts["source"].startswith("def double")
        assert facts["pickled"]
        assert facts["doubled"] == [2]
        assert facts["data"] == ["data", "data.txt"]
        assert facts["left"] == ["data.txt", "src"]
    with pytest.raises(WorkerFailedError) as caught:
        runner.run_script("src/train.py", "fail", code_dir=project)
    frames = re.findall(r'File "(.*)", line', caught.value.traceback)
    assert frames == [str(project / "src" / "train.py"), str(project / "src" / "beside.py")]
    assert "beside.fail()" in caught.value.traceback
    monkeypatch.chdir(project / "src")
    runner.run_script("-m", "nested.deep")
    assert "[1]<stdout>:module 7" in capfd.readouterr().out


def test_too_much_code_is_refused_before_spark_is_asked(project: Path) -> None:
    (project / "src" / "data.bin").touch()
    os.truncate(project / "src" / "data.bin", 200_000_000)
    with pytest.raises(ConfigurationError, match=r"Largest: data\.bin \(190\.7 MiB\)"):
        HorovodRunner(np=2).run_script(project / "src" / "train.py")


def test_a_signal_while_spark_starts_leaves_no_jvm(project: Path) -> None:
    """Which would wait for ever: what is left behind fails the test."""
    words = [sys.executable, "-m", "horovodrunner", "run", "-np", "2", "--master", "local[2]"]
    with processes.started(
        [*words, str(project / "src" / "train.py"), "x"], stderr=processes.PIPE
    ) as process:
        driver = psutil.Process(process.pid)
        wait_until(lambda: [c for c in driver.children() if "SparkSubmit" in str(c.cmdline())])
        process.terminate()
        assert process.stderr
        errors = process.stderr.read()
        process.wait()
    assert process.returncode == 143
    told = [line for line in errors.splitlines() if not line.startswith("NOTE:")]  # the JVM's
    assert told[-1] == "error: SIGTERM: the run had not begun"


APPLICATION = """
import os, sys, time
import beside
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], sys.argv[1:])
if "--code" in sys.argv:
    sys.exit(3 if os.environ["RANK"] == "1" else 0)
if "--wait" in sys.argv:
    print("begun")
    time.sleep(600)
"""


@pytest.mark.heavy
def test_as_the_application_of_spark_submit(project: Path, tmp_path: Path) -> None:
    """Client mode, on a standalone cluster; run by the path of the package's own file."""
    import pyspark

    script = project / "src" / "application.py"
    script.write_text(APPLICATION)
    package = Path(horovodrunner.__file__).parent
    environ = {
        **os.environ,
        "PYTHONPATH": str(package.parent),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    submit = [str(Path(pyspark.__file__).parent / "bin" / "spark-submit"), "--master"]
    confs = ["--conf", "spark.ui.enabled=false", "--conf", "spark.log.level=ERROR"]
    application = [str(package / "__main__.py"), "run", "-np", "2", "--", str(script)]
    with standalone(tmp_path, environ) as url:
        words = [*submit, url, *confs, *application, "--code"]
        done = processes.run(words, capture_output=True, env=environ)
        assert done.returncode == 3, done.stderr
        # spark-submit shows both streams of the driver's Python on its own standard output.
        assert "[1]<stdout>:rank 1 of 2 ['--code']" in done.stdout
        assert f"Spark's master is {url}, from spark-submit or the environment" in done.stdout
        words = [sys.executable, "-m", "horovodrunner", "run", "-np", "2", "--master", url, *confs]
        log = tmp_path / "log"
        with (
            log.open("wb") as output,
            processes.started(
                [*words, str(script), "--wait"], env=environ, stdout=output, stderr=output
            ) as process,
        ):
            wait_for_line("begun(?s:.*)begun", log)
            process.send_signal(signal.SIGTERM)
            process.wait()
        assert process.returncode == 143, log.read_text()
        assert "error: SIGTERM: the run of 2 ranks was stopped" in log.read_text()
