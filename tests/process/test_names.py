"""What main finds by name and by source: ``__main__``, modules that travel by value, sys.argv.

Most drivers are processes of their own: only a script's or a notebook's ``__main__`` travels.
"""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from horovodrunner import HorovodRunner, WorkerFailedError
from tests import processes
from tests.conftest import HAS_TORCH
from tests.process.notebooks import run_notebook
from tests.process.travelling import module_by_value

DEFINITIONS = """
    import abc, collections, copy, copyreg, dataclasses, enum, functools, inspect, io
    import multiprocessing, os, pickle, shelve, sys, threading, typing
    from concurrent.futures import ProcessPoolExecutor
    from horovodrunner import HorovodRunner, WorkerFailedError

    count = 0

    def bump(by=1):
        global count
        count += by
        return count

    class Net:
        def __init__(self, size=1):
            self.size = size
        def grown(self):
            return self.size + count

    class Outer:
        class Inner:
            def method(self):
                pass

    class Registered:
        def __init__(self, x):
            self.x = x

    copyreg.pickle(Registered, lambda each: (Registered, (each.x,)))

    class Error(Exception):
        def __init__(self, text, number):
            super().__init__(text)
            self.number = number
        def __reduce__(self):
            return Error, (self.args[0], self.number)

    class Color(enum.Enum):
        RED = 1

    class Named(typing.NamedTuple):
        a: int

    Point = collections.namedtuple("Point", "x y")

    class Config:
        pass

    @dataclasses.dataclass
    class Node:
        next: "typing.Optional[Node]" = None
        config: "Config" = None

    class Slots:
        __slots__ = ("a",)

    @functools.lru_cache
    def cached(x):
        return x

    def doubled(function):
        @functools.wraps(function)
        def inner(x):
            return 2 * function(x)
        return inner

    @doubled
    def decorated(x):
        return x

    def run(main, np=-1, **kwargs):
        return HorovodRunner(np=np).run(main, **kwargs)
"""


def drive(tmp_path: Path, script: str, *arguments: str) -> str:
    """Run a script as ``__main__``, which reaches the ranks by value, and return its output."""
    program = tmp_path / "train.py"
    program.write_text(textwrap.dedent(DEFINITIONS) + textwrap.dedent(script))
    done = processes.run(
        [sys.executable, str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_travelled_can_be_pickled_in_main(tmp_path: Path) -> None:
    drive(
        tmp_path,
        """
        def main(inner):
            global Late
            class Late:
                pass
            Late.__qualname__ = "Late"
            things = [Net(), inner, inner.method, Registered(1), Error("a", 2), Color.RED, Named(1)]
            things += [Point(1, 2), Node(), Slots, cached, decorated, bump, Late(), main, Outer]
            missing = []
            for thing in things:
                try:
                    assert type(pickle.loads(pickle.dumps(thing))) is type(thing), thing
                    copy.deepcopy(thing)
                except pickle.PicklingError as error:
                    missing.append(str(error))
            with shelve.open("shelf") as shelf:
                shelf["net"] = Net(3)
            return missing, repr(sys.modules["__main__"]), __name__

        assert run(main, inner=Outer.Inner()) == ([], "<module '__main__'>", "__main__")
        with shelve.open("shelf") as shelf:
            assert type(shelf["net"]) is Net and shelf["net"].size == 3
        """,
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_that_main_starts_find_its_names(tmp_path: Path, method: str) -> None:
    drive(
        tmp_path,
        f"""
        def make_late(_):
            return Late()

        def fails(_):
            raise Error("no", 5)

        def grandchild():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context({method!r})) as pool:
                return pool.submit(Net, 4).result()

        def main():
            global Late, lock
            class Late:
                pass
            Late.__qualname__ = "Late"
            lock = threading.Lock()  # cannot be pickled
            context = multiprocessing.get_context({method!r})
            with context.Pool(1) as pool:
                nets, late = pool.map(Net, [1, 2]), pool.map(make_late, [0])
                sums = pool.map(bump, [1, 2])
                try:
                    pool.map(fails, [0])
                except Error as error:
                    number = error.number
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                deep = pool.submit(grandchild).result()
            class_of = [type(each) is Net for each in [*nets, deep]]
            return class_of, type(late[0]) is Late, sums, number, count

        def uses_lock():
            return lock

        assert run(main) == ([True] * 3, True, [1, 3], 5, 0)
        """,
    )


def test_functions_share_their_globals_and_the_driver_keeps_its_own(tmp_path: Path) -> None:
    drive(
        tmp_path,
        """
        def main():
            bump(), bump()
            Net.grown = lambda self: "changed"
            import __main__
            __main__.count += 1
            return count, Net(5), Net, Error("x", 3), Point(1, 2), bump

        seen, net, *rest = run(main, np=-2)
        assert seen == 3 and count == 0
        assert type(net) is Net and rest[0] is Net and type(rest[1]) is Error
        assert type(rest[2]) is Point
        assert net.grown() == 5 and Net.grown.__globals__ is globals()
        bump(2)
        assert net.grown() == 7
        assert run(main)[0] == 5  # nothing is left of the first run

        def raises():
            raise Error("boo", 4)

        try:
            run(raises)
        except WorkerFailedError as error:
            assert type(error.__cause__) is Error and error.__cause__.number == 4
        """,
    )


def test_a_class_that_only_a_file_names_is_asked_for(tmp_path: Path) -> None:
    drive(
        tmp_path,
        """
        with open("net.pickle", "wb") as file:
            pickle.dump(Net(7), file)

        def loads(path):
            with open(path, "rb") as file:
                return pickle.load(file)

        def loads_net(path):
            Net
            return loads(path)

        assert run(loads_net, path="net.pickle").size == 7
        try:
            run(loads, path="net.pickle")
        except WorkerFailedError as error:
            assert "mention Net in main" in str(error).splitlines()[0], error
        else:
            raise AssertionError

        def imports():
            from __main__ import count

        try:
            run(imports)
        except WorkerFailedError as error:
            assert "mention count in main" in str(error).splitlines()[0], error
        else:
            raise AssertionError
        """,
    )


def test_classes_whose_making_runs_code_travel_and_come_back(tmp_path: Path) -> None:
    drive(
        tmp_path,
        """
        registry = {}

        class Checked:
            def __init_subclass__(cls):
                if not hasattr(cls, "name"):
                    raise TypeError("it has no name")

        class Keyed(abc.ABC, typing.Generic[typing.TypeVar("T")]):
            def __init_subclass__(cls, *, key):
                registry[key] = cls
                cls.key = key

        class Named(type):
            def __new__(meta, name, bases, namespace, *, tag):
                kind = super().__new__(meta, name, bases, namespace)
                kind.tag = tag
                return kind
            def __init__(cls, name, bases, namespace, *, tag):
                super().__init__(name, bases, namespace)
                registry[namespace["title"]] = cls

        class OfChecked(Checked):
            name = "a"
            def count(self):
                return count

        class OfKeyed(Keyed[int], key="k"):
            __slots__ = ("x",)
            def own(self):
                return __class__

        class OfNamed(metaclass=Named, tag=3):
            title = "t"

        kinds = OfChecked, OfKeyed, OfNamed

        def main():
            assert OfChecked.name == "a" and OfKeyed.key == "k" and OfNamed.tag == 3
            assert registry == {"k": OfKeyed, "t": OfNamed} and OfKeyed().own() is OfKeyed
            try:
                class Nameless(Checked):
                    pass
            except TypeError:
                pass
            else:
                raise AssertionError
            OfChecked.name = "changed"
            assert [type(pickle.loads(pickle.dumps(kind()))) for kind in kinds] == [*kinds]
            return [kind() for kind in kinds]

        assert [type(each) for each in run(main)] == [*kinds]
        assert OfChecked.name == "a" and OfChecked.count.__globals__ is globals()
        """,
    )


def test_what_many_methods_use_is_pickled_once(tmp_path: Path) -> None:
    drive(
        tmp_path,
        """
        class Large:
            def __reduce__(self):
                bump()
                return Large, ()

        large = Large()

        class Uses:
            def first(self): return large
            def second(self): return large
            class Inner:
                def third(self): return large

        def main(uses: "Uses"):
            return type(uses).__name__

        assert run(main, uses=Uses()) == "Uses" and count == 1, count
        """,
    )


def test_forward_references_are_found(tmp_path: Path) -> None:
    drive(
        tmp_path,
        """
        def main():
            hints = typing.get_type_hints(Node)
            return hints["next"] == typing.Optional[Node], hints["config"].__name__

        assert run(main) == (True, "Config")
        """,
    )


def test_the_source_of_a_script_that_is_gone_is_known(tmp_path: Path) -> None:
    output = drive(
        tmp_path,
        """
        import linecache, os
        linecache.getlines(__file__)
        os.remove(__file__)

        def main():
            linecache.checkcache()
            def fails():
                raise KeyError("in a thread")
            thread = threading.Thread(target=fails)
            thread.start()
            thread.join()
            sources = inspect.getsource(Net), inspect.getsource(Net.grown), inspect.getsource(main)
            return [source.splitlines()[0] for source in sources]

        assert run(main) == ["class Net:", "    def grown(self):", "def main():"]

        def raises():
            raise ValueError("here")

        try:
            run(raises)
        except WorkerFailedError as error:
            assert '    raise ValueError("here")' in str(error), error
        """,
    )
    assert 'raise KeyError("in a thread")' in output


def test_main_finds_a_scripts_arguments_and_no_others(tmp_path: Path) -> None:
    drive(
        tmp_path,
        """
        def main():
            import argparse
            parser = argparse.ArgumentParser()
            parser.add_argument("--lr", type=float)
            return parser.parse_args().lr, parser.prog

        def needs_more():
            import argparse
            parser = argparse.ArgumentParser()
            parser.add_argument("--epochs", required=True)
            parser.parse_args([])

        assert run(main) == (0.5, "train.py"), run(main)
        try:
            run(needs_more)
        except WorkerFailedError as error:
            first = str(error).splitlines()[0]
            assert "the following arguments are required: --epochs" in first, first
            assert "arguments of run()" in first, first
            assert error.exit_code == 2
        """,
        "--lr",
        "0.5",
    )


def test_a_notebook_has_its_names_and_its_source(tmp_path: Path) -> None:
    run_notebook(
        tmp_path,
        """
        import inspect, pickle, typing
        from horovodrunner import HorovodRunner, PayloadError, WorkerFailedError
        """,
        "class Net:\n    version = 1",
        "old = Net()",
        "class Net:\n    version = 2",
        """
        def main(old):
            import argparse
            argparse.ArgumentParser().parse_args()
            again = pickle.loads(pickle.dumps(Net())), pickle.loads(pickle.dumps(old))
            source = inspect.getsource(main).splitlines()[0]
            return [each.version for each in again], type(old).version, source, Net()

        def fails():
            raise ValueError("here")  # the line

        def shell():
            !echo
        """,
        """
        import sys
        of_the_kernel = sys.argv
        sys.argv = ["train", "--lr", "0.5"]  # as people do where a parser reads them
        assert HorovodRunner(np=-1).run(lambda: sys.argv) == sys.argv
        sys.argv = of_the_kernel
        """,
        """
        try:
            HorovodRunner(np=-1).run(shell)
        except PayloadError as error:
            assert "magics and ! commands are on the driver only" in str(error), error
        else:
            raise AssertionError
        try:
            pickle.dumps(old)
        except pickle.PicklingError:
            old = Net()  # as it has to be here
        for runner in (HorovodRunner(np=-1), HorovodRunner(np=-1, keep_warm=True)):
            *found, net = runner.run(main, old=old)
            assert found == [[2, 2], 2, "def main(old):"], found
            assert type(net) is Net
            try:
                runner.run(fails)
            except WorkerFailedError as error:
                assert 'raise ValueError("here")  # the line' in str(error), error
        """,
    )


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_torchscript_and_loaders_work_in_a_notebook(tmp_path: Path) -> None:
    run_notebook(
        tmp_path,
        """
        from typing import List
        import torch
        from horovodrunner import HorovodRunner

        class Net(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                parts: List[torch.Tensor] = [x]
                return parts[0] + 1

        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 2
            def __getitem__(self, index):
                return index * scale

        scale = 10
        """,
        """
        def main():
            torch.save(Net(), "net.pt")
            again = torch.load("net.pt", weights_only=False)
            found = torch.jit.script(again)(torch.ones(1)).item()
            for context in ("spawn", "forkserver"):
                loader = torch.utils.data.DataLoader(
                    Data(), num_workers=1, multiprocessing_context=context
                )
                found += sum(batch.item() for batch in loader)
            return found, Net()

        found, net = HorovodRunner(np=-1).run(main)
        assert found == 22 and type(net) is Net
        assert type(torch.load("net.pt", weights_only=False)) is Net
        """,
    )


def test_arguments_of_pytest_do_not_reach_main() -> None:
    found = HorovodRunner(np=-1).run(lambda: [sys.argv, sys.orig_argv[1:]])
    assert found == [sys.argv[:1]] * 2


def test_a_module_that_travels_by_value_is_found_by_its_name() -> None:
    found = (True, 1, 1, "class Net:\n    pass\n")
    with module_by_value() as module:
        assert HorovodRunner(np=-1).run(module.round_trip) == found
        assert HorovodRunner(np=-1).run(module.in_a_child) == [found]
        assert type(HorovodRunner(np=-1).run(module.returns)) is module.Net
        assert HorovodRunner(np=-1).run(lambda: module.call() + module.calls) == 2
        assert module.calls == 0


def test_what_did_not_travel_of_a_module_is_read_where_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("partly.py").write_text("def f(): return VALUE\nVALUE = 1\nOTHER = 5\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import partly  # type: ignore[import-not-found]

    monkeypatch.setattr(partly, "VALUE", 2)
    cloudpickle.register_pickle_by_value(partly)
    try:
        f = partly.f

        def main() -> Any:
            import partly

            return f(), partly.f(), partly.OTHER

        assert HorovodRunner(np=-1).run(main) == (2, 2, 5)
    finally:
        cloudpickle.unregister_pickle_by_value(partly)
        del sys.modules["partly"]


def test_what_pickle_cannot_find_in_main_is_said_by_pytest_too() -> None:
    def main() -> None:
        import __main__

        print(__main__.no_such_name)

    with pytest.raises(WorkerFailedError, match="mention no_such_name in main"):
        HorovodRunner(np=-1).run(main)
