"""What a worker imports before it knows its rank: found in bytecode, without running any of it."""

from __future__ import annotations

import compileall
import functools
import importlib
import shutil
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from horovodrunner.flows.call.early_imports import early_imports
from horovodrunner.pickling import payload

TRAINS = ("torch", "torch._dynamo", "horovod.torch")
FIT = """
    import torch
    import horovod.torch as hvd

    def fit(model):
        return hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))

    def evaluate(model):
        return model(torch.ones(2))
"""


class Directory:
    """The user's own modules, on the import path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **modules: str) -> None:
        for name, source in modules.items():
            file = self.path.joinpath(*name.split("__in__")[::-1]).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(source))

    def main(self, name: str = "fit", module: str = "mytraining") -> Any:
        return getattr(importlib.import_module(module), name)


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Directory]:
    """A directory in front of the import path; no module of it is left in memory."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    stub = tmp_path / "frameworks"  # the modules below import a framework: it need not be there
    monkeypatch.setattr(sys, "meta_path", [_Frameworks(), *sys.meta_path])
    yield Directory(tmp_path)
    assert not stub.exists()
    for name in set(sys.modules) - before:
        del sys.modules[name]


class _Frameworks:
    """Lets the tests' own modules be imported here without importing a framework."""

    def find_spec(self, name: str, path: object, target: object = None) -> Any:
        if name.partition(".")[0] in ("torch", "horovod", "tensorflow", "lightning"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        module.__all__ = []
        module.__getattr__ = lambda _: _Anything


class _Anything:
    def __init__(self, *_: object) -> None:
        pass


def in_a_notebook(source: str, name: str = "main") -> Any:
    """Define functions the way notebook cells do: in __main__, with shared globals."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(textwrap.dedent(source), scope)
    return scope[name]


def found_for(main: Any, **kwargs: Any) -> tuple[str, ...]:
    return early_imports(main, payload.dump_call(main, kwargs))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "def main():\n    import torch\n    import horovod.torch as hvd",
            ("torch", "horovod.torch"),
        ),
        ("def main():\n    import horovod.torch", ("horovod.torch",)),
        ("def main():\n    from horovod import torch as hvd", ("horovod.torch",)),
        ("def main():\n    import torch.nn.functional as F", ("torch",)),
        ("def main():\n    return 1", ()),
        ("def main():\n    return 'torch', 'tensorflow'", ()),
        ("def helper():\n    import torch\ndef main():\n    helper()", ("torch",)),
        ("def main():\n    class Inner:\n        import torch\n    return Inner", ("torch",)),
        ("def main():\n    import torch\n    torch.optim.SGD([])", ("torch", "torch._dynamo")),
        (
            "def main():\n    from torch.optim import SGD as S\n    return S([])",
            ("torch", "torch._dynamo"),
        ),
        ("def main(loss):\n    import torch\n    loss.backward()", ("torch", "torch._dynamo")),
        ("def main():\n    import torch.optim", ("torch",)),
        ("def main():\n    import lightning", ("torch", "torch._dynamo")),
        ("def main():\n    import torchvision", ("torch",)),
        ("def main():\n    from transformers import pipeline", ("torch",)),
        ("def main():\n    import transformers as t\n    t.Trainer()", ("torch", "torch._dynamo")),
        ("def main():\n    import transformers, tensorflow", ("tensorflow",)),
    ],
)
def test_what_a_main_by_value_imports_is_imported_early(
    source: str, expected: tuple[str, ...]
) -> None:
    assert found_for(in_a_notebook(source)) == expected


CHANGES = [
    "import os; os.environ['OMP_NUM_THREADS'] = '1'",
    "import os; os.environ.update(A='1')",
    "import os; os.environ.setdefault('A', '1')",
    "import os; environment = os.environ; environment['A'] = '1'",
    "import os; del os.environ['A']",
    "import os as o; o.environ['A'] = '1'",
    "import os; getattr(os, 'environ')['A'] = '1'",
    "from os import putenv; putenv('A', '1')",
    "from os import environ as e; e['A'] = '1'",
    "import sys; sys.path.insert(0, '/x')",
    "import sys; sys.path += ['/x']",
    "import sys; sys.modules['x'] = None",
    "from sys import path; path.append('/x')",
    "import importlib; importlib.import_module('x')",
    "__import__('x')",
    "exec('x = 1')",
    "import ctypes; ctypes.CDLL('libx.so')",
    "import os; os.sched_setaffinity(0, {0})",
    "import multiprocessing as m; m.set_start_method('spawn')",
    "from dotenv import load_dotenv",
    "import gevent.monkey",
    "prepare(OMP_NUM_THREADS='1')",
    "prepare('TORCHDYNAMO_DISABLE')",
]
READS = [
    "import os; rank = int(os.environ['LOCAL_RANK'])",
    "import os; os.environ.get('OMP_NUM_THREADS', '1'), os.getenv('TF_CONFIG')",
    "import os; debug = 'DEBUG' in os.environ; given = {**os.environ}",
    "from os import environ; environ.get('A')",
    "import os, sys; os.path.join(sys.argv[0], 'x'), sys.path[0], sys.modules.get('x')",
    "from importlib.metadata import version; import importlib.resources",
    "import re; re.compile('x')",
]


@pytest.mark.parametrize("statement", [*CHANGES, *READS])
@pytest.mark.parametrize("where", ["main", "module", "helper of a module", "other function"])
def test_nothing_is_early_for_a_main_that_changes_what_imports_give(
    users: Directory, statement: str, where: str
) -> None:
    call = f"def never_called(prepare=print):\n        {statement}\n"
    if where == "main":
        main = in_a_notebook(f"def main(prepare=print):\n    {statement}\n    import torch")
    elif where == "module":
        users.write(mytraining=f"import torch\ndef fit(prepare=print):\n    {statement}")
        main = users.main()
    elif where == "other function":
        users.write(mytraining=f"import torch\n{call}\ndef fit():\n    pass")
        main = users.main()
    else:
        users.write(
            mytraining="import torch\ndef fit():\n    from helper import never_called",
            helper=call,
        )
        main = users.main()
    assert found_for(main) == (() if statement in CHANGES else ("torch",))


def test_settings_and_registrations_that_travel_are_no_obstacle() -> None:
    main = in_a_notebook("def main():\n    import os, torch\n    os.environ.get('A')")
    with np.errstate(all="raise"):
        assert found_for(main) == ("torch",)


def test_a_main_of_a_module_is_followed_to_what_it_uses(users: Directory) -> None:
    users.write(mytraining=FIT)
    assert found_for(users.main("fit")) == TRAINS
    assert found_for(users.main("evaluate")) == ("torch", "horovod.torch")


def test_changed_source_is_looked_at_anew_though_the_driver_has_imported_it(
    users: Directory,
) -> None:
    users.write(mytraining=FIT)
    main = users.main()
    assert found_for(main) == TRAINS
    users.write(mytraining="def fit(model):\n    import tensorflow")
    assert found_for(main) == ("tensorflow",)
    users.write(mytraining="def fit(model:\n")
    assert found_for(main) == ()


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (
            {"mytraining": "def fit():\n    import helper", "helper": FIT.replace("fit", "x")},
            ("torch", "horovod.torch"),
        ),
        ({"mytraining": "from helper import fit", "helper": FIT}, TRAINS),
        (
            {"mytraining": "def fit():\n    from helper import fit as f\n    f()", "helper": FIT},
            TRAINS,
        ),
        (
            {
                "mytraining": "from package.parts import deep\ndef fit(): deep.fit(1)",
                "__init____in__package": "",
                "__init____in__parts__in__package": "from . import deep",
                "deep__in__parts__in__package": "from ..top import fit",
                "top__in__package": FIT,
            },
            TRAINS,
        ),
        (  # a directory without __init__.py
            {
                "mytraining": "def fit():\n    import space.deep as d\n    d.fit(1)",
                "deep__in__space": FIT,
            },
            TRAINS,
        ),
        (  # importing a submodule runs its packages first
            {
                "mytraining": "def fit():\n    import package.leaf",
                "__init____in__package": "import tensorflow",
                "leaf__in__package": "",
            },
            ("tensorflow",),
        ),
        (
            {
                "mytraining": """
                    from typing import TYPE_CHECKING
                    import typing
                    if TYPE_CHECKING:
                        import tensorflow
                    if typing.TYPE_CHECKING:
                        import tensorflow
                    else:
                        import torch
                    def fit(): pass
                    if __name__ == "__main__":
                        import os, tensorflow
                        os.environ["A"] = "1"
                """
            },
            ("torch",),
        ),
        (
            {
                "mytraining": """
                    try:
                        import not_there.at_all
                    except ImportError:
                        import torch
                    def fit(): pass
                """
            },
            ("torch",),
        ),
        ({"mytraining": "import helper\ndef fit(): pass", "helper": "import mytraining"}, ()),
        ({"mytraining": "from torch.optim import *\ndef fit(): pass"}, ("torch", "torch._dynamo")),
        ({"mytraining": "import torch\nfrom h import *\ndef fit(): 1", "h": ""}, ("torch",)),
        (
            {
                "mytraining": """
                    import torch, functools
                    def around(f):
                        @functools.wraps(f)
                        def call(*a): return f(*a)
                        return call
                    @around
                    def fit(): torch.optim.SGD([])
                """
            },
            ("torch", "torch._dynamo"),
        ),
        (
            {
                "mytraining": """
                    import torch
                    class Base:
                        def step(self): torch.optim.SGD([])
                    class Trainer(Base):
                        def __call__(self): pass
                        def fit(self): pass
                        @classmethod
                        def of_class(cls): pass
                    fit = Trainer()
                """
            },
            ("torch", "torch._dynamo"),
        ),
    ],
)
def test_the_users_modules_are_followed_through_each_other(
    users: Directory, modules: dict[str, str], expected: tuple[str, ...]
) -> None:
    users.write(**modules)
    assert found_for(users.main()) == expected


def test_whatever_is_wrapped_around_main_and_given_to_it_is_followed(users: Directory) -> None:
    users.write(mytraining=FIT, mymodel="import torch\nclass Net:\n    pass\n", other="")
    fit, net = users.main("fit"), users.main("Net", "mymodel")
    assert found_for(functools.partial(fit, model=1)) == TRAINS
    assert found_for(print, model=net) == ("torch",)
    assert found_for(print, models=[{"a": net()}]) == ("torch",)
    in_cell = in_a_notebook("def main(): return fit(1)")
    in_cell.__globals__["fit"] = fit
    assert found_for(in_cell) == TRAINS
    assert found_for(in_a_notebook("def main():\n    import mytraining as m\n    m.fit")) == TRAINS
    mytraining = sys.modules["mytraining"]
    in_cell = in_a_notebook("def main(): return m.fit(1)")
    in_cell.__globals__["m"] = mytraining
    assert found_for(in_cell) == TRAINS
    # A variable that is called as a module is not an import.
    assert found_for(in_a_notebook("def main(mytraining): return mytraining")) == ()


def test_bound_methods_and_instances_of_a_notebooks_classes_are_followed() -> None:
    trainer = in_a_notebook(
        "class Trainer:\n    def fit(self):\n        import torch\n        torch.optim.SGD([])\n",
        "Trainer",
    )()
    assert found_for(trainer.fit) == ("torch", "torch._dynamo")
    assert found_for(print, trainer=trainer) == ("torch", "torch._dynamo")


@pytest.mark.parametrize("kind", ["bytecode", "archive", "archive of bytecode"])
def test_modules_without_a_source_file_are_followed(users: Directory, kind: str) -> None:
    users.write(mytraining=FIT)
    source, archive = users.path / "mytraining.py", users.path / "shipped.zip"
    if "bytecode" in kind:
        compileall.compile_file(source, legacy=True, quiet=1)
        source.unlink()
        source = source.with_suffix(".pyc")
    if "archive" in kind:
        with zipfile.ZipFile(archive, "w") as file:
            file.write(source, source.name)
        source.unlink()
        sys.path.insert(0, str(archive))
    assert found_for(users.main()) == TRAINS
    shutil.rmtree(users.path / "__pycache__", ignore_errors=True)


def test_nothing_is_early_where_a_module_cannot_be_read(users: Directory) -> None:
    users.write(mytraining="import torch\ndef fit():\n    import compiled")
    assert found_for(users.main()) == ("torch",)
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (users.path / f"compiled{suffix}").touch()
    assert found_for(users.main()) == ()


@pytest.mark.parametrize("name", ["torch", "numpy", "queue", "yaml", "psutil"])
def test_nothing_is_early_where_a_module_of_the_users_hides_an_installed_one(
    users: Directory, name: str
) -> None:
    main = in_a_notebook("def main():\n    import torch")
    (users.path / name).mkdir()
    assert found_for(main) == ("torch",), "without __init__.py it hides nothing"
    users.write(**{f"__init____in__{name}": ""})
    assert found_for(main) == ()


def test_installed_packages_are_not_followed_but_for_mains_own(
    tmp_path: Path, users: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = Directory(tmp_path / "lib" / "python3.11" / "site-packages")
    packages.write(company="from company_parts import fit", company_parts=FIT, pandas_like=FIT)
    monkeypatch.syspath_prepend(str(packages.path))
    assert found_for(in_a_notebook("def main():\n    import pandas_like")) == ()
    assert found_for(users.main("fit", "company_parts")) == TRAINS


def test_a_repository_too_large_to_look_at_is_left_alone(users: Directory) -> None:
    users.write(mytraining="import data, torch\ndef fit(): pass", data="x = 1\n")
    assert found_for(users.main()) == ("torch",)
    users.write(data="x = 1\n" * 200_000)
    assert found_for(users.main()) == ()


def test_looking_runs_nothing(users: Directory) -> None:
    users.write(helper="import torch\nassert not torch, 'it was imported'")
    assert found_for(in_a_notebook("def main():\n    import helper")) == ("torch",)
    assert "helper" not in sys.modules
