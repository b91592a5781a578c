"""The examples in the docstrings of every module are true."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

import horovodrunner
from tests import processes

OF_KERAS = ".keras"


ROOT = Path(horovodrunner.__file__).parent


def module_names() -> list[str]:
    """List all modules; their packages are not imported for it, because some import a framework."""
    paths = [path.relative_to(ROOT.parent).with_suffix("") for path in ROOT.rglob("*.py")]
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


def source_of(name: str) -> str:
    path = ROOT.parent / name.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


@pytest.mark.parametrize("name", [name for name in module_names() if OF_KERAS not in name])
def test_examples(name: str) -> None:
    if name.endswith((".placement.rendezvous", ".horovod_build.allreduce")):
        pytest.importorskip("horovod")
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0


def test_examples_of_what_imports_keras() -> None:
    """Run them in a process of their own: this one stays free of TensorFlow."""
    if not (importlib.util.find_spec("tensorflow") and importlib.util.find_spec("horovod")):
        pytest.skip("needs TensorFlow and Horovod")
    names = [name for name in module_names() if OF_KERAS in name and ">>>" in source_of(name)]
    assert names
    code = "import doctest, importlib, sys; sys.exit(sum(" + (
        "doctest.testmod(importlib.import_module(name)).failed for name in sys.argv[1:]))"
    )
    done = processes.run([sys.executable, "-c", code, *names], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    names = ("errors", "placement.environment")
    modules = [importlib.import_module(f"horovodrunner.{name}") for name in names]
    examples = [test for module in modules for test in finder.find(module) if test.examples]
    assert len(examples) >= 2
