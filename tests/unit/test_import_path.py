"""Which directories a worker looks for modules in, and in which order."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path

import pytest

from horovodrunner.flows.call.import_path import (
    ImportPath,
    before_stdlib,
    of_worker,
    start_command,
)
from horovodrunner.pickling.installed import is_of_a_python
from tests import processes

STDLIB = os.path.dirname(os.__file__)  # noqa: PTH120
OURS = tuple(dict.fromkeys(e for e in sys.path if Path(e).is_dir() and not is_of_a_python(e)))
PACKAGES = next(entry for entry in sys.path if entry.endswith("site-packages"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with one directory for each letter."""
    for letter in "abcdeft":
        tmp_path.joinpath(letter).mkdir()
    monkeypatch.chdir(tmp_path)
    for name, module in list(sys.modules.items()):  # what other tests imported from elsewhere
        if str(getattr(module, "__file__", None)).startswith(tempfile.gettempdir()):
            monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_path_is_split_at_the_directories_of_its_python(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = here / "lib" / "python3.11" / "site-packages"
    others.mkdir(parents=True)
    hook = "__editable__.something.finder.__path_hook__"
    monkeypatch.setattr(
        sys, "path", [*OURS, "a", "b", "a", here, STDLIB, "", PACKAGES, "c", str(others), hook]
    )
    assert ImportPath.of_this_process() == ImportPath(
        first=(*OURS, f"{here}/a", f"{here}/b"),
        before_packages=(f"{here}",),
        last=(f"{here}/c", hook),
    )


def test_a_relative_entry_means_what_it_meant_when_its_modules_were_imported(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.joinpath("beside_the_notebook.py").touch()
    package = here / "a" / "package_of_the_users"
    package.mkdir()
    package.joinpath("__init__.py").touch()
    monkeypatch.setattr(sys, "path", [*OURS, STDLIB, "", PACKAGES])
    importlib.invalidate_caches()
    importlib.import_module("beside_the_notebook")
    assert ImportPath.of_this_process().before_packages == (f"{here}",)
    monkeypatch.chdir("a")
    importlib.import_module("package_of_the_users")
    expected = (f"{here}", f"{here}/a")
    assert ImportPath.of_this_process().before_packages == expected
    monkeypatch.chdir("../c")
    assert ImportPath.of_this_process().before_packages == (*expected, f"{here}/c")
    for name in ("beside_the_notebook", "package_of_the_users"):
        del sys.modules[name]
    assert ImportPath.of_this_process().before_packages == (f"{here}/c",)


def test_a_working_directory_that_is_gone_is_left_out(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("a")
    here.joinpath("a").rmdir()
    monkeypatch.setattr(sys, "path", ["", *OURS, STDLIB, PACKAGES, "a hook's"])
    assert ImportPath.of_this_process() == ImportPath(first=OURS, last=("a hook's",))


def test_the_users_directories_are_where_the_driver_has_them(here: Path) -> None:
    users = ImportPath(
        first=(f"{here}/a", f"{here}/missing", f"{here}/t"),
        before_packages=(f"{here}/b",),
        last=(f"{here}/c", f"{here}/d", "hook"),
    )
    own = [f"{here}/e", f"{here}/t", STDLIB, f"{STDLIB}/lib-dynload", PACKAGES, f"{here}/d"]
    path = of_worker(users, own)
    first = [f"{here}/a", f"{here}/t", f"{here}/e"]
    assert path[:3] == first == before_stdlib(path)
    assert path[3:] == [
        STDLIB,
        f"{STDLIB}/lib-dynload",
        f"{here}/b",
        PACKAGES,
        f"{here}/d",
        f"{here}/c",
    ]


def test_an_archive_that_spark_brought_takes_the_place_of_the_drivers(here: Path) -> None:
    here.joinpath("e", "lib.zip").touch()
    brought = f"{here}/e/lib.zip"
    users = ImportPath(first=(f"{here}/a", "/driver/only/lib.zip", f"{here}/b"))
    assert of_worker(users, [f"{here}/t", brought, STDLIB])[:4] == [
        f"{here}/a",
        brought,
        f"{here}/b",
        f"{here}/t",
    ]


def test_what_was_added_to_the_session_is_the_executors_own(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drivers = here / "userFiles-c41d2dda-f142-404d-ae2e-918da11363f1"
    drivers.mkdir()
    for archive in (drivers / "lib.zip", here / "e" / "lib.zip"):
        archive.touch()
    executors = [f"{here}/e", f"{here}/e/lib.zip"]
    monkeypatch.chdir(here / "e")
    users = ImportPath(first=(f"{here}/a", f"{drivers}/lib.zip", str(drivers), f"{here}/b"))
    assert of_worker(users, [*executors, f"{here}/t", STDLIB])[:5] == [
        f"{here}/a",
        f"{here}/e/lib.zip",
        f"{here}/e",
        f"{here}/b",
        f"{here}/t",
    ]
    local = [f"{drivers}/lib.zip", str(drivers), STDLIB]  # a master that is this machine
    assert of_worker(users, local)[1:3] == local[:2]


def test_modules_deep_in_an_archive_are_lent(here: Path) -> None:
    here.joinpath("lib.egg").touch()
    users = ImportPath(first=(f"{here}/lib.egg/src", f"{here}/a/src"))
    assert of_worker(users, [STDLIB]) == [f"{here}/lib.egg/src", STDLIB]


def test_a_start_meets_no_module_of_the_users(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("queue", "runpy", "json"):
        here.joinpath(f"{name}.py").write_text("raise SystemExit('the wrong one')")
    here.joinpath("greets.py").write_text("import json, queue, sys; print(sys.argv[1:])")
    monkeypatch.setattr(sys, "path", [str(here), *sys.path])
    done = processes.run([*start_command("greets"), "hello"], capture_output=True)
    assert done.stdout == "['hello']\n", done.stderr
