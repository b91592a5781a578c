"""What does nothing in main is said on the driver, once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import HorovodRunner


@pytest.fixture
def mpi4py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be seen of mpi4py without MPI: the real one needs its libraries."""
    package = tmp_path / "mpi4py"
    package.mkdir()
    package.joinpath("__init__.py").touch()
    package.joinpath("MPI.py").write_text(
        "class COMM_WORLD:\n    Get_size = staticmethod(lambda: 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def use_mpi(on_ranks: list[str]) -> Any:
    import mpi4py

    if os.environ["RANK"] in on_ranks:
        from mpi4py import MPI

        return MPI.__loader__.get_source("mpi4py.MPI") is not None  # as inspect asks
    return "MPI" in vars(mpi4py)


@pytest.mark.usefixtures("mpi4py")
@pytest.mark.parametrize("on_ranks", [["0", "1"], ["1"]])
def test_mpi_among_processes_that_mpirun_did_not_start(
    on_ranks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert HorovodRunner(np=-2).run(use_mpi, on_ranks=on_ranks) == ("0" in on_ranks)
    out = capsys.readouterr().out
    assert out.count("MPI.COMM_WORLD has size 1 on each of the 2 ranks") == 1
    assert f"({__file__}:{use_mpi.__code__.co_firstlineno + 4})" in out


@pytest.mark.usefixtures("mpi4py")
def test_of_one_rank_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    HorovodRunner(np=-1).run(use_mpi, on_ranks=["0"])
    assert "MPI.COMM_WORLD" not in capsys.readouterr().out


def test_libraries_that_ask_whether_they_are_in_a_task_are_not_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As MLflow does whenever it starts a run."""
    packages = "lib/python3.11/site-packages"
    monkeypatch.syspath_prepend(tmp_path / packages)
    for path in (f"{packages}/of_others.py", "of_mine.py"):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("from pyspark import TaskContext\nask = lambda: TaskContext.get()\n")
    monkeypatch.syspath_prepend(tmp_path)

    def main(name: str) -> Any:
        return __import__(name).ask()

    for name, times in (("of_others", 0), ("of_mine", 1)):
        assert HorovodRunner(np=-1).run(main, name=name) is None
        assert capsys.readouterr().out.count("TaskContext.get() is None in main") == times


def import_a_library(packages: str, use_it_too: bool) -> None:
    sys.path.insert(0, packages)
    import built_with_mpi  # type: ignore[import-not-found]  # noqa: F401

    if use_it_too:
        from mpi4py import MPI  # noqa: F401


@pytest.mark.usefixtures("mpi4py")
@pytest.mark.parametrize("use_it_too", [False, True])
def test_a_library_that_was_built_with_mpi_may_be_imported(
    use_it_too: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    packages.joinpath("built_with_mpi.py").write_text("from mpi4py import MPI")
    HorovodRunner(np=-2).run(import_a_library, packages=str(packages), use_it_too=use_it_too)
    out = capsys.readouterr().out
    assert out.count("MPI.COMM_WORLD has size 1") == use_it_too
    assert ("test_notices.py" in out) == use_it_too


def test_a_worker_imports_none_of_what_it_watches() -> None:
    watched = "jax keras mpi4py pyspark tensorflow tf_keras"
    assert HorovodRunner(np=-1).run(lambda: {*watched.split()} & {*sys.modules}) == set()


def show_a_figure(how: str) -> None:
    import matplotlib.pyplot as plt

    if how == "nothing":
        plt.show()  # there is no figure
        return
    figure, _ = plt.subplots()
    if how == "show":
        plt.show()
        plt.show()
    else:
        import importlib

        importlib.import_module("IPython.display").display("text" if how == "text" else figure)


@pytest.mark.parametrize(
    ("how", "times"), [("show", 1), ("display", 1), ("text", 0), ("nothing", 0)]
)
@pytest.mark.parametrize("backend", ["agg", "module://matplotlib_inline.backend_inline"])
def test_pictures_that_cannot_travel(
    how: str,
    times: int,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MPLBACKEND", backend)
    HorovodRunner(np=-2).run(show_a_figure, how=how)
    out = capsys.readouterr().out
    assert out.count("no picture of a rank's reaches the notebook") == times
    line = show_a_figure.__code__.co_firstlineno + (8 if how == "show" else 13)
    assert out.count(f"({__file__}:{line})") == times
