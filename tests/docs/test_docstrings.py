"""The examples in the docstrings of every module are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import horovodrunner


def module_names() -> list[str]:
    found = pkgutil.walk_packages(horovodrunner.__path__, "horovodrunner.")
    return ["horovodrunner", *(module.name for module in found)]


@pytest.mark.parametrize("name", module_names())
def test_examples(name: str) -> None:
    if name.endswith((".task.horovodrun", ".horovod_build.allreduce")):
        pytest.importorskip("horovod")
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    names = ("errors", "core.lines")
    modules = [importlib.import_module(f"horovodrunner.{name}") for name in names]
    examples = [test for module in modules for test in finder.find(module) if test.examples]
    assert len(examples) >= 2
