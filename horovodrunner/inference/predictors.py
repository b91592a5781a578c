"""Models of every kind as functions of NumPy arrays. Runs in: Spark's Python workers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from horovodrunner.errors import ConfigurationError
from horovodrunner.flows.call.called import called_signature
from horovodrunner.inference.host_copy import local_directory
from horovodrunner.inference.outputs import HALVES, OutputError, as_numpy

if TYPE_CHECKING:
    from horovodrunner.inference.devices import Device

__all__ = ["Predictor", "function_predictor", "keras_predictor", "torch_predictor"]

_NUMERIC_KINDS = "biufc"

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Predictor:
    """A function of arrays of shape ``(batch, ...)``, and what its caller has to know about it."""

    function: Callable[..., Any]
    expected_inputs: int | None
    """How many arrays it takes; None: any number."""
    stacks_scalars: bool = False
    """Whether several columns of scalars are one input of shape ``(batch, columns)``."""
    scalar_dtype: np.dtype[Any] | None = None
    """The type that such an input should have; None: the columns' own."""

    def __call__(self, *inputs: _Array) -> Any:
        return self.function(*inputs)


def function_predictor(function: Callable[..., Any]) -> Predictor:
    """Wrap a function of NumPy arrays, which is called as it is."""
    if not callable(function):
        raise ConfigurationError(
            f"make_predict_fn returned {function!r:.100} ({type(function).__name__}): it must "
            "return the function that predicts"
        )
    parameters = _by_position(called_signature(function))
    expected = None if parameters is None else len(parameters)
    return Predictor(lambda *inputs: _own(function(*inputs)), expected)


def _own(outputs: Any) -> Any:
    """Copy arrays: a function may write to the same ones again in its next call."""
    if isinstance(outputs, Mapping):
        return {name: _own(value) for name, value in outputs.items()}
    return outputs.copy() if isinstance(outputs, np.ndarray) else outputs


def torch_predictor(net: Any, compiled: bool, *, device: Device) -> Predictor:
    """Wrap a PyTorch module, which is put into evaluation mode."""
    import torch

    name = type(net).__qualname__
    net.eval()
    net.to(device.torch_name)
    tensors = (*net.parameters(), *net.buffers())
    dtype = next((each.dtype for each in tensors if each.is_floating_point()), None)
    expected, stacks = _required(net.forward), _takes_one(net.forward)
    embeddings = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    embeds = any(isinstance(each, embeddings) for each in net.modules())
    scalar_dtype = None
    if dtype is not None and not embeds:
        scalar_dtype = np.dtype("float64" if dtype == torch.float64 else "float32")
    call = torch.compile(net) if compiled else net

    def tensor(array: Any) -> Any:
        if not isinstance(array, np.ndarray) or array.dtype.kind not in _NUMERIC_KINDS:
            return array
        # A column's memory may be Arrow's: a module that changes its input must not change that.
        given = torch.from_numpy(np.require(array, requirements=("C", "W")))
        return given.to(device.torch_name, dtype if given.is_floating_point() else None)

    def array(value: Any, what: str) -> _Array:
        if isinstance(value, torch.Tensor | np.ndarray):
            return cast(_Array, as_numpy(value))
        raise OutputError(
            f"{what} is of type {type(value).__name__}, not a tensor: wrap the module in one whose "
            "forward returns a tensor, or a dict of tensors with the names of the fields"
        )

    def predict(*inputs: Any) -> Any:
        with torch.inference_mode():
            return _named_outputs(call(*map(tensor, inputs)), f"what {name} returned", array)

    return Predictor(predict, expected, stacks, scalar_dtype)


def keras_predictor(
    package: str, backend: str, custom_objects: bytes, archive: Any, *, device: Device
) -> Predictor:
    """Load a Keras model from its archive, and wrap it; the custom objects are pickled."""
    keras = _import_keras(package, backend)
    if backend == "tensorflow":
        device.prepare_tensorflow()
    elif backend == "torch":
        device.prepare_torch()
    with _device_scope(keras, device), tempfile.TemporaryDirectory(dir=local_directory()) as parent:
        path = Path(parent, "model.keras")  # the ending tells Keras the format
        path.write_bytes(archive)
        # code in the archive is the driver's own, as all that Spark sends
        model = keras.saving.load_model(
            str(path),
            custom_objects=pickle.loads(custom_objects),  # noqa: S301
            compile=False,
            safe_mode=False,
        )
    return _wrapped_keras(keras, model, backend, device)


def _import_keras(package: str, backend: str) -> Any:
    if package != "keras":
        return importlib.import_module(package)
    if package not in sys.modules:
        os.environ["KERAS_BACKEND"] = backend
    keras = importlib.import_module(package)
    used = keras.backend.backend()
    if used != backend:
        raise ConfigurationError(
            f"the model was made with Keras's backend {backend!r}, and this Python worker imported "
            f"Keras with {used!r} before: use models of one backend in a Spark application, and "
            f"set spark.executorEnv.KERAS_BACKEND={backend} if other functions import keras"
        )
    return keras


def _device_scope(keras: Any, device: Device) -> AbstractContextManager[Any]:
    if keras.__name__ == "keras":
        by_torch = keras.backend.backend() == "torch"  # which tells "cpu" from "cpu:0"
        name = device.torch_name if by_torch else device.keras_name
        return cast(AbstractContextManager[Any], keras.device(name))
    import tensorflow as tf

    return cast(AbstractContextManager[Any], tf.device(device.keras_name))


def _wrapped_keras(keras: Any, model: Any, backend: str, device: Device) -> Predictor:
    # what a functional model was made of; others have no such thing
    structure = getattr(model, "input", None)
    expected = _required(model.call) if structure is None else len(model.inputs)
    stacks = _takes_one(model.call) if structure is None else expected == 1
    embeds = any("Embedding" in type(each).__name__ for each in model._flatten_layers())

    def evaluate(inputs: tuple[Any, ...]) -> Any:
        with _device_scope(keras, device):
            return model(*inputs, training=False)

    call: Callable[[tuple[Any, ...]], Any] = evaluate
    in_mode: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    if backend == "tensorflow":
        import tensorflow as tf

        call = tf.function(evaluate, reduce_retracing=True)
    elif backend == "torch":
        import torch

        in_mode = torch.inference_mode
    pack = tf.nest.pack_sequence_as if backend == "tensorflow" else keras.tree.pack_sequence_as

    def predict(*inputs: _Array) -> Any:
        given = inputs if structure is None else (pack(structure, list(inputs)),)
        with in_mode():
            return _named_outputs(call(given), f"what {model.name} returned", array)

    def array(value: Any, what: str) -> _Array:
        found = np.asarray(as_numpy(value))
        if found.dtype.kind == "O":
            raise OutputError(
                f"{what} is of type {type(value).__name__}, not a tensor: make a model whose "
                "output is a tensor, or a dict of tensors with the names of the fields"
            )
        return found.astype(np.float32) if found.dtype.name in HALVES else found

    scalar_dtype = None if embeds else np.dtype("float32")
    return Predictor(predict, expected, stacks, scalar_dtype)


def _named_outputs(outputs: Any, what: str, array: Callable[[Any, str], _Array]) -> Any:
    """Make one array, or a dict of them, of what a model returned."""
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, Mapping | type):
        fields = {each.name: getattr(outputs, each.name) for each in dataclasses.fields(outputs)}
        outputs = {name: value for name, value in fields.items() if value is not None}
    elif hasattr(outputs, "_asdict"):
        outputs = outputs._asdict()
    if isinstance(outputs, Mapping):
        return {str(k): array(v, f"{what} as {k!r}") for k, v in outputs.items()}
    if isinstance(outputs, tuple | list):
        if len(outputs) != 1:
            raise OutputError(
                f"{what} is a {type(outputs).__name__} of {len(outputs)}: name them by returning a "
                "dict of tensors instead, whose keys are the fields of return_type"
            )
        outputs = outputs[0]
    return array(outputs, what)


def _by_position(signature: inspect.Signature | None) -> list[inspect.Parameter] | None:
    """List what can be given by position; None: any number, or nobody knows."""
    parameters = () if signature is None else signature.parameters.values()
    if signature is None or any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return None
    by_position = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return [each for each in parameters if each.kind in by_position]


def _required(function: Callable[..., Any]) -> int | None:
    """Count what has to be given by position; None: any number."""
    return _count_required(called_signature(function))


def _takes_one(function: Callable[..., Any]) -> bool:
    """Whether it has one input: by what a decorator wraps, if that itself does not tell."""
    signature = called_signature(function)
    if _by_position(signature) is None:
        with contextlib.suppress(TypeError, ValueError):
            signature = inspect.signature(function)
    return _count_required(signature) == 1


def _count_required(signature: inspect.Signature | None) -> int | None:
    parameters = _by_position(signature) or ()
    required = [each for each in parameters if each.default is each.empty]
    # a function with defaults for all its inputs takes some of them nevertheless
    return len(required) or None
