"""A process imports what it needs: there is one worker a rank, and each pays for its imports."""

from __future__ import annotations

import json
import sys

import pytest

import horovodrunner
from tests import processes


def _imported_by(statement: str) -> set[str]:
    code = f"{statement}; import json, sys; print(json.dumps(list(sys.modules)))"
    done = processes.run([sys.executable, "-c", code], check=True, capture_output=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_worker_imports_nothing_of_the_other_processes() -> None:
    modules = _imported_by("import horovodrunner.processes.worker.__main__")
    assert not {name for name in modules if name.startswith("horovodrunner.processes.driver")}
    assert not {name for name in modules if name.startswith("horovodrunner.processes.task")}
    assert not modules & {"asyncio", "hashlib", "importlib.metadata", "psutil", "pyspark"}


def test_a_task_imports_nothing_of_the_driver() -> None:
    modules = _imported_by("import horovodrunner.processes.task.barrier")
    assert not {name for name in modules if name.startswith("horovodrunner.processes.driver")}


def test_the_driver_imports_no_tracking_tool() -> None:
    run = "horovodrunner.HorovodRunner(np=-1).run(int)"
    modules = _imported_by(f"import horovodrunner; {run}")
    assert not modules & {"mlflow", "tensorboard"}


def test_every_public_name_is_there_when_it_is_asked_for() -> None:
    statement = "from horovodrunner import *; HorovodRunner, checkpoint.save, log_to_driver"
    assert "horovodrunner.runner" in _imported_by(statement)
    assert set(horovodrunner.__all__) <= set(dir(horovodrunner))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'horovodrunner' has no attribute 'HorovodRuner'"):
        horovodrunner.HorovodRuner  # noqa: B018
    with pytest.raises(ImportError):
        from horovodrunner import nothing  # noqa: F401
