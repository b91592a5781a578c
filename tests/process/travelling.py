"""A module of which there is no file: what executors lack, and what therefore travels by value."""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import cloudpickle

MODULE = """
calls = 0

def call():
    global calls
    calls += 1
    return calls

class Net:
    pass

def round_trip(_=None):
    import inspect, pickle, sys
    net = pickle.loads(pickle.dumps(Net()))
    return type(net) is Net, call(), sys.modules[__name__].calls, inspect.getsource(Net)

def in_a_child():
    import multiprocessing
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(round_trip, [0])

def returns():
    return Net()
"""


@contextlib.contextmanager
def module_by_value() -> Iterator[Any]:
    """Have it, in a package, and registered with cloudpickle."""
    names = ["not_there", "not_there.inner"]
    module = ModuleType(names[1])
    module.__file__ = file = "/nowhere/not_there/inner.py"
    exec(compile(MODULE, file, "exec"), vars(module))
    linecache.cache[file] = len(MODULE), None, MODULE.splitlines(keepends=True), file
    sys.modules.update({names[0]: ModuleType(names[0]), names[1]: module})
    cloudpickle.register_pickle_by_value(module)
    try:
        yield module
    finally:
        cloudpickle.unregister_pickle_by_value(module)
        for name in names:
            del sys.modules[name]
        del linecache.cache[file]
