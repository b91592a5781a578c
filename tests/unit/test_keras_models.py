"""Keras models: saved in one process, loaded in another that knows none of their classes."""

from __future__ import annotations

import importlib.util
import os
import sys
import textwrap
from pathlib import Path

import pytest

from tests import processes

pytestmark = pytest.mark.heavy

DRIVER = """
    import importlib, sys, types
    import cloudpickle, numpy as np
    from horovodrunner.inference.model import Model

    package, target = sys.argv[1:]
    keras = importlib.import_module(package)

    @keras.saving.register_keras_serializable("mine")
    class Scale(keras.layers.Layer):
        def __init__(self, by=2.0, **options):
            super().__init__(**options)
            self.by = by
        def call(self, x):
            return x * self.by
        def get_config(self):
            return {**super().get_config(), "by": self.by}

    class Shift(keras.layers.Layer):  # not registered
        def call(self, x):
            return x + 1

    class Sub(keras.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.dense = keras.layers.Dense(2)
        def call(self, a, b=0.0):  # tf_keras saves no model that needs two
            return self.dense(a) + b

    def squashed(x):
        return x / (1 + x * x)

    class Sent:
        def __init__(self, chunk):
            self.value = chunk.__reduce__()[1][0]

    session = types.SimpleNamespace(sparkContext=types.SimpleNamespace(broadcast=Sent))
    one, other = keras.Input((8,), name="a"), keras.Input((3,), name="b")
    dense = keras.layers.Dense(3)
    x, y = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
    sub = Sub()
    sub(x)
    layers = keras.layers
    chain = [keras.Input((8,)), layers.Dense(3, activation=squashed), Scale(3.0), Shift()]
    summed = layers.Add()([dense(one), other])
    models = {
        "chain": (keras.Sequential([*chain, layers.Dropout(0.9)]), [x]),
        "pair": (keras.Model([one, other], summed), [x, y[:, :3]]),
        "dicts": (keras.Model({"a": one, "b": other}, {"sum": summed, "one": dense(one)}),
                  [x, y[:, :3]]),
        "sub": (sub, [x]),
        "large": (keras.Sequential([keras.Input((8,)), layers.Dense(9000)]), [x]),
    }
    calls = {"pair": lambda m, a: m(a), "dicts": lambda m, a: m(dict(zip("ab", a)))}

    def array(tensor):
        return tensor.detach().numpy() if hasattr(tensor, "detach") else np.asarray(tensor)

    cases = {}
    for name, (model, inputs) in models.items():
        outputs = calls.get(name, lambda m, a: m(*a))(model, inputs)
        outputs = {k: array(v) for k, v in outputs.items()} if name == "dicts" else array(outputs)
        made = Model.from_keras(model, custom_objects={"squashed": squashed})
        assert "keras" in repr(made)
        cases[name] = made.handle(session), inputs, outputs
    with open(target, "wb") as file:
        file.write(cloudpickle.dumps(cases))
"""

WORKER = """
    import os, pickle, sys
    import numpy as np
    from horovodrunner.errors import ConfigurationError
    from horovodrunner.inference.loading import load

    with open(sys.argv[1], "rb") as file:
        cases = pickle.load(file)
    for name, (handle, inputs, outputs) in cases.items():
        predict = load(handle)
        for _ in range(2):
            found = predict(*inputs)
            for key in outputs if name == "dicts" else [()]:
                assert isinstance(found[key], np.ndarray), name
                np.testing.assert_allclose(found[key], outputs[key], rtol=1e-5, err_msg=name)
        assert predict(*(each[:2] for each in inputs)) is not None
        assert predict.expected_inputs == len(inputs), name
        assert predict.stacks_scalars == (len(inputs) == 1)
        assert predict(*(each.astype("int64") for each in inputs)) is not None
    if len(sys.argv) > 2:  # another backend's models
        with open(sys.argv[2], "rb") as file:
            handle, *_ = pickle.load(file)["pair"]
        try:
            load(handle)
        except ConfigurationError as error:
            print(error)
"""


def run(script: str, *arguments: str | Path, backend: str = "") -> str:
    environ = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    environ.pop("KERAS_BACKEND", None)
    if backend:
        environ["KERAS_BACKEND"] = backend
    done = processes.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        env=environ,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def of_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a driver with Keras on PyTorch sends."""
    pytest.importorskip("torch")
    target = tmp_path_factory.mktemp("torch") / "cases"
    run(DRIVER, "keras", target, backend="torch")
    return target


def test_models_on_torch_arrive(of_torch: Path) -> None:
    run(WORKER, of_torch)


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow")
def test_models_on_tensorflow_arrive_and_no_others_beside_them(
    of_torch: Path, tmp_path: Path
) -> None:
    run(DRIVER, "keras", tmp_path / "cases", backend="tensorflow")
    shown = run(WORKER, tmp_path / "cases", of_torch)
    assert "made with Keras's backend 'torch', and this Python worker imported" in shown


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tf_keras") is None, reason="needs tf_keras")
def test_models_of_legacy_keras_arrive(tmp_path: Path) -> None:
    run(DRIVER, "tf_keras", tmp_path / "cases")
    run(WORKER, tmp_path / "cases")
