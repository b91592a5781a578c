"""From what travelled to a function that predicts. Runs in: Spark's Python workers."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from horovodrunner.errors import ConfigurationError, HorovodRunnerError
from horovodrunner.inference.chunks import SentFile
from horovodrunner.inference.devices import Device, current_device
from horovodrunner.inference.host_copy import HostCopy
from horovodrunner.inference.weight_file import Contents, read_model
from horovodrunner.memory_limit import memory_hint
from horovodrunner.placement.environment import KEPT_MODELS

if TYPE_CHECKING:
    from horovodrunner.inference.predictors import Predictor

__all__ = ["Kind", "ModelHandle", "load", "release_oldest"]

_KEPT = 3

Kind = Literal["torch", "keras", "function"]


@dataclass(frozen=True)
class ModelHandle:
    """What travels of a model in the functions that Spark sends."""

    identity: str
    """In the cache of a Python worker."""
    name: str
    """In messages."""
    source: tuple[Kind, SentFile, Contents] | Callable[[], Callable[..., Any]]
    """What has to be made of which file; or what makes the function that predicts."""

    @classmethod
    def of_make_predict_fn(cls, make_predict_fn: Callable[[], Callable[..., Any]]) -> ModelHandle:
        """Describe a model of ``predict_batch_udf``'s kind, another one for each call of this."""
        name = getattr(make_predict_fn, "__qualname__", type(make_predict_fn).__qualname__)
        return cls(uuid.uuid4().hex, name, make_predict_fn)


_models: dict[tuple[str, Device], tuple[Predictor, HostCopy | None]] = {}
"""Those of this process, the one that was asked for last at the end."""

_loading = threading.RLock()


def load(handle: ModelHandle) -> Predictor:
    """Return a model of this process, loaded for the device of its current task.

    The models that were used last stay: three, unless the variable ``HOROVODRUNNER_MODELS`` says
    otherwise.
    """
    device = current_device()
    key = (handle.identity, device)
    most = _most_kept()
    with _loading:
        found = _models.pop(key, None)
        while len(_models) >= most:
            release_oldest()
        _models[key] = found or _made(handle, device)
        return _models[key][0]


def release_oldest() -> None:
    _, host_copy = _models.pop(next(iter(_models)))
    if host_copy is not None:
        host_copy.close()


def _most_kept() -> int:
    text = os.environ.get(KEPT_MODELS, str(_KEPT))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigurationError(
            f"{KEPT_MODELS}={text!r}: it must be how many models a Python worker keeps, at least 1"
        )
    return int(text)


def _made(handle: ModelHandle, device: Device) -> tuple[Predictor, HostCopy | None]:
    from horovodrunner.inference import predictors

    if not isinstance(handle.source, tuple):
        # its errors are the user's own, as with predict_batch_udf
        return predictors.function_predictor(handle.source()), None
    kind, file, contents = handle.source
    host_copy: HostCopy | None = None
    try:
        if file.content is None:
            host_copy = HostCopy(file.digest, file.size, file.open)
        memory = bytearray(file.content or b"") if host_copy is None else host_copy.map()
        if kind == "torch":
            device.prepare_torch()
        thing = read_model(memory, contents)
        if kind == "torch":
            return predictors.torch_predictor(*thing, device=device), host_copy
        if kind == "keras":
            return predictors.keras_predictor(*thing, device=device), host_copy
        return predictors.function_predictor(thing), host_copy
    except BaseException as error:
        if host_copy is not None:
            host_copy.close()
        if isinstance(error, HorovodRunnerError) or not isinstance(error, Exception):
            raise
        raise ConfigurationError(
            f"the model {handle.name} cannot be loaded in Spark's Python worker: "
            f"{type(error).__name__}: {error}{memory_hint(error)}"
        ) from error
