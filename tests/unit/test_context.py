"""What main finds in the notebook without being given it: registrations, settings, enumerations."""

from __future__ import annotations

import logging
import pickle
import sys
from typing import Any

import pytest

from horovodrunner.errors import PayloadError
from horovodrunner.flows.call import log_settings
from horovodrunner.pickling import payload
from horovodrunner.pickling.pickler import dumps
from tests.processes import run

_RANK = """
import os, sys
answer = os.dup(1)
os.dup2(2, 1)
from horovodrunner.pickling.buffers import loads
from horovodrunner.pickling.pickler import dumps
main, kwargs = loads(sys.stdin.buffer.read())
os.write(answer, dumps(main(**kwargs)))
"""

_DRIVER = """
import os, sys, subprocess, pickle
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
answer = os.dup(1)
os.dup2(2, 1)
exec(compile({cell!r}, "<cell>", "exec"))
from horovodrunner.pickling import payload
call = payload.dump_call(main, {{}})
rank = subprocess.run([sys.executable, "-c", {rank!r}], input=call, stdout=subprocess.PIPE)
assert rank.returncode == 0
returned = pickle.loads(rank.stdout)
here = main()
assert check(returned, here) if "check" in globals() else returned == here, (returned, here)
os.write(answer, b"the same")
"""


def same_in_the_worker(cell: str) -> None:
    """Run main of a cell where the cell was run, and in another process; compare."""
    done = run([sys.executable, "-c", _DRIVER.format(cell=cell, rank=_RANK)], capture_output=True)
    assert done.stdout == "the same", done.stderr


_PLAIN = {
    "enum": """
import enum
class Planet(enum.Enum):
    EARTH = (5.9, 6.3)
    WORLD = EARTH
    def __init__(self, mass, radius):
        self.mass = mass
class Mode(str, enum.Enum):
    def __new__(cls, value, label):
        self = str.__new__(cls, value)
        self._value_, self.label = value, label
        return self
    A = ("a", "first")
class Access(enum.Flag):
    R = enum.auto()
    W = enum.auto()
    RW = R | W
F = enum.Enum("F", "X Y")
def main():
    return Planet.WORLD, Planet.EARTH.mass, Mode("a").label, Mode.A, Access.R | Access.W, F.X
def check(there, here):
    return all(a is b for a, b in zip(there, here) if not isinstance(a, float)) and there == here
""",
    "mixed-in": """
import dataclasses, enum
@dataclasses.dataclass
class Config:
    lr: float
    tags: list
class Preset(Config, enum.Enum):
    SLOW = 0.5, ["x"]
class Point(tuple, enum.Enum):
    A = (1, 2)
class Unhashable(enum.Enum):
    A = [1]
def main():
    return Preset.SLOW, Preset.SLOW.lr, tuple(Point.A), Unhashable.A.value
""",
    "plug-ins": """
known = {}
class Plugin:
    def __init_subclass__(cls): known[cls.__name__] = cls
class Mine(Plugin): pass
def main(): return Mine(), sorted(known)
def check(there, here): return type(there[0]) is Mine is known["Mine"] and there[1] == here[1]
""",
    "abstract classes": """
import collections.abc, numbers
@collections.abc.Sequence.register
class Row: pass
@numbers.Number.register
class Amount: pass
def main():
    return isinstance(Row(), collections.abc.Sequence), isinstance(Amount(), numbers.Number)
""",
    "copyreg": """
import copyreg, threading
class Locked:
    def __init__(self, n): self.n, self.lock = n, threading.Lock()
copyreg.pickle(Locked, lambda locked: (Locked, (locked.n,)))
def main(): return Locked(3)
def check(there, here): return there.n == 3
""",
    "decimal and recursion": """
import decimal, sys
decimal.getcontext().prec = 5
sys.setrecursionlimit(4321)
def main():
    import decimal, sys
    return str(decimal.Decimal(1) / 3), sys.getrecursionlimit()
""",
}

_LIBRARIES = {
    "torch": """
import argparse, torch, torch.utils._pytree as pytree
torch.serialization.add_safe_globals([argparse.Namespace])
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
pytree.register_pytree_node(Pair, lambda p: ([p.a, p.b], None), lambda c, _: Pair(*c))
torch.set_default_dtype(torch.float64)
torch.set_float32_matmul_precision("high")
torch.use_deterministic_algorithms(True, warn_only=True)
torch.backends.cudnn.benchmark = True
def main():
    import argparse, io, torch, torch.utils._pytree as pytree
    file = io.BytesIO()
    torch.save(argparse.Namespace(a=1), file)
    file.seek(0)
    return (torch.load(file).a, pytree.tree_map(lambda x: x + 1, Pair(1, 2)).b,
        str(torch.ones(1).dtype), torch.get_float32_matmul_precision(),
        torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark)
""",
    "numpy and pandas": """
import numpy as np, pandas as pd
np.seterr(all="raise")
np.set_printoptions(precision=2)
pd.set_option("display.max_rows", 7)
@pd.api.extensions.register_dataframe_accessor("mine")
class Mine:
    def __init__(self, df): self.rows = len(df)
def main():
    import numpy as np, pandas as pd
    try:
        np.ones(1) / 0
        raised = False
    except FloatingPointError:
        raised = True
    rows = pd.get_option("display.max_rows"), pd.DataFrame([1]).mine.rows
    return raised, str(np.ones(1) / 3), rows
""",
    "keras and tensorflow and tf_keras": """
import os, tempfile, keras, numpy as np
import tensorflow as tf, tf_keras
@keras.saving.register_keras_serializable("nb")
class Scale(keras.layers.Layer):
    def __init__(self, k=2.0, **kw): super().__init__(**kw); self.k = k
    def call(self, x): return x * self.k
    def get_config(self): return {**super().get_config(), "k": self.k}
@keras.saving.register_keras_serializable("nb", name="sq")
def square(x): return x * x
keras.config.set_floatx("float64")
def make():
    import keras
    dense = keras.layers.Dense(1, activation=square, kernel_initializer="ones")
    return keras.Sequential([keras.Input((1,)), Scale(3.0), dense])
captured = make()
path = tempfile.mkdtemp() + "/saved.keras"
captured.save(path)
class Wrapped:
    def __init__(self, value): self.value = value
def convert(wrapped, dtype=None, name=None, as_ref=False): return tf.constant(wrapped.value, dtype)
tf.register_tensor_conversion_function(Wrapped, convert)
tf.config.run_functions_eagerly(True)
@tf_keras.saving.register_keras_serializable("nb")
class Legacy(tf_keras.layers.Layer): pass
tf_keras.mixed_precision.set_global_policy("mixed_float16")
def of_tensorflow():
    import tensorflow as tf, tf_keras
    name = tf_keras.saving.get_registered_name(Legacy)
    policy = tf_keras.layers.Dense(1).compute_dtype
    return name, policy, float(tf.add(Wrapped(1.0), 2.0)), tf.config.functions_run_eagerly()
def main():
    import keras, numpy as np, tempfile
    one = np.ones((1, 1))
    saved = tempfile.mkdtemp() + "/new.keras"
    make().save(saved)
    found = [float(captured(one)[0, 0])]
    found += [float(keras.models.load_model(each)(one)[0, 0]) for each in (path, saved)]
    names = keras.saving.get_registered_name(Scale), keras.saving.get_registered_name(square)
    dtypes = captured.weights[0].dtype, keras.layers.Dense(1).dtype
    return of_tensorflow(), found, names, dtypes, saved
def check(there, here):
    loaded = keras.models.load_model(there[-1])
    mine = keras.saving.get_registered_object("nb>Scale") is Scale
    return there[:-1] == here[:-1] and float(loaded(np.ones((1, 1)))[0, 0]) == 9.0 and mine
""",
}


@pytest.mark.parametrize("kind", _PLAIN)
def test_what_a_cell_defines_is_the_same_in_main_and_when_it_comes_back(kind: str) -> None:
    same_in_the_worker(_PLAIN[kind])


@pytest.mark.heavy
@pytest.mark.parametrize("library", _LIBRARIES)
def test_what_was_set_and_registered_is_in_force_in_main(library: str) -> None:
    for module in library.split(" and "):
        pytest.importorskip(module)
    same_in_the_worker(_LIBRARIES[library])


_LOGGING = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s|%(message)s", stream=sys.stdout)
logging.addLevelName(5, "TRACE")
quiet = logging.getLogger("train")
quiet.setLevel(logging.ERROR)
def main(own=None):
    import io, logging, sys
    sys.stdout = stream = io.StringIO()
    for handler in getattr(logging.lastResort, "_handlers", {}).get("", logging.root.handlers):
        handler.setStream(stream)
    logging.info("one")
    logging.getLogger("other").debug("two")
    quiet.warning("three")
    logging.getLogger("other").log(logging.INFO, "four")
    shown = stream.getvalue()
    return shown, logging.getLevelName(5)
def check(there, here): return there == here == ("INFO|one\\nINFO|four\\n", "TRACE")
"""


def test_log_lines_are_shown_as_in_the_notebook() -> None:
    same_in_the_worker(_LOGGING)


def test_mains_own_set_up_of_logging_is_in_force_as_ever() -> None:
    same_in_the_worker("""
import logging, sys
logging.basicConfig(level=logging.INFO, format="notebook|%(message)s")
def main():
    import io, logging
    stream = io.StringIO()
    logging.info("before")
    logging.basicConfig(format="main|%(message)s", stream=stream)
    logging.info("after")
    return stream.getvalue()
def check(there, here): return there == "main|after\\n"
""")


def test_a_setting_imports_no_library() -> None:
    cell = """
import pandas
pandas.set_option("display.max_rows", 7)
def main():
    import sys
    return "pandas" in sys.modules
def check(there, here): return not there
"""
    pytest.importorskip("pandas")
    same_in_the_worker(cell)


@pytest.mark.heavy
def test_what_this_process_registered_itself_stays() -> None:
    keras = pytest.importorskip("keras")
    scope: dict[str, Any] = {"__name__": "__main__", "keras": keras}
    exec("@keras.saving.register_keras_serializable('mine')\ndef act(x): return x", scope)
    data = dumps(scope["act"])
    objects = keras.saving.get_custom_objects()
    try:
        came_back = pickle.loads(data)
        assert came_back is not scope["act"]
        assert keras.saving.get_registered_name(came_back) == "mine>act"
        assert objects["mine>act"] is scope["act"]
        del objects["mine>act"]
        first, second = pickle.loads(data), pickle.loads(data)
        assert objects["mine>act"] is second is not first  # a cell that was run again
    finally:
        objects.pop("mine>act", None)


def test_loggers_of_a_librarys_own_class_stay_with_it() -> None:
    name = "SQLQueryContextLogger"  # its formatter would have each worker import pyspark
    assert pytest.importorskip("pyspark.logger").PySparkLogger.getLogger(name).handlers
    assert name not in log_settings.changed(logging).get("handlers", {})


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_what_does_not_pickle_of_torch_says_what_to_send_instead() -> None:
    torch = pytest.importorskip("torch")
    from horovodrunner.inference import Model

    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 1))
    for net, text in (
        (torch.jit.trace(torch.nn.Linear(2, 1), torch.ones(1, 2)), "torch.jit.load(...)"),
        (normed, "remove_parametrizations(layer, 'weight')"),
        (torch.nn.Sequential(normed), "remove_parametrizations(layer, 'weight')"),
    ):
        for send in (Model.from_torch, lambda net: payload.dump_call(len, {"net": net})):
            with pytest.raises(PayloadError) as caught:
                send(net)
            assert text in str(caught.value).splitlines()[0]
    batches = iter(torch.utils.data.DataLoader([1]))
    with pytest.raises(PayloadError, match="Let main have the DataLoader"):
        payload.dump_call(len, {"batches": batches})


@pytest.mark.heavy
def test_a_function_that_tensorflow_has_traced_says_what_to_send_instead() -> None:
    tf = pytest.importorskip("tensorflow")
    traced = tf.function(lambda x: x * 2)
    traced(tf.constant(1.0))
    with pytest.raises(PayloadError, match=r"Apply tf\.function inside main"):
        payload.dump_call(len, {"step": traced})


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["LearningRateWarmupCallback", "LearningRateScheduleCallback"])
def test_a_schedule_without_its_first_rate_says_so(name: str) -> None:
    for module in ("keras", "horovod.tensorflow"):
        pytest.importorskip(module)
    from horovodrunner.errors import ArgumentValueError
    from horovodrunner.keras import callbacks

    with pytest.raises(ArgumentValueError, match=f"{name} has no initial_lr"):
        getattr(callbacks, name)()
