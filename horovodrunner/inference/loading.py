"""From what travelled to a function that predicts. Runs in: Spark's Python workers."""

from __future__ import annotations

import os
import tempfile
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol, cast

from horovodrunner.errors import ConfigurationError, HorovodRunnerError
from horovodrunner.inference import frozen
from horovodrunner.inference.devices import Device, current_device
from horovodrunner.inference.host_copy import HostCopy, local_directory
from horovodrunner.inference.parcels import Parcel
from horovodrunner.memory_limit import memory_hint
from horovodrunner.placement.environment import KEPT_MODELS

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ModelHandle", "Predictor", "load"]

_KEPT = 3


@dataclass(frozen=True)
class ModelHandle:
    """What travels of a model in the functions that Spark sends.

    Parameters
    ----------
    identity
        Names the model in the cache of a Python worker.
    name
        Names it in messages.
    kind
        What has to be made of it.
    skeleton
        The pickle of all but the weights.
    parcel
        Where the weights are, if it has any.
    companions
        Spark's own broadcast variables that the skeleton refers to.
    make_predict_fn
        The function that makes the one that predicts, for that kind.
    """

    identity: str
    name: str
    kind: Literal["torch", "keras", "function", "make_predict_fn"]
    skeleton: bytes = b""
    parcel: Parcel | None = None
    companions: tuple[Any, ...] = ()
    make_predict_fn: Callable[[], Callable[..., Any]] | None = None

    @classmethod
    def of_make_predict_fn(cls, make_predict_fn: Callable[[], Callable[..., Any]]) -> ModelHandle:
        """Describe a model of ``predict_batch_udf``'s kind.

        Parameters
        ----------
        make_predict_fn
            Is called once in each Python worker and returns the function that predicts.

        Returns
        -------
        ModelHandle
            Another one for each call of this.
        """
        name = getattr(make_predict_fn, "__qualname__", type(make_predict_fn).__qualname__)
        return cls(uuid.uuid4().hex, name, kind="make_predict_fn", make_predict_fn=make_predict_fn)


class Predictor(Protocol):
    """A model that is ready to predict.

    Attributes
    ----------
    expected_inputs : int or None
        How many arrays it takes; None: any number.
    stacks_scalars : bool
        Whether several columns of scalars are one input of shape ``(batch, columns)``.
    scalar_dtype : numpy.dtype or None
        The type that such an input should have; None: the columns' own.
    """

    expected_inputs: int | None
    stacks_scalars: bool
    scalar_dtype: np.dtype[Any] | None

    def __call__(self, *inputs: np.ndarray[Any, Any]) -> Any:
        """Predict for a batch.

        Parameters
        ----------
        *inputs
            Arrays of shape ``(batch, ...)``.

        Returns
        -------
        numpy.ndarray, or dict or list of dict
            As ``predict_batch_udf`` takes them.
        """


class _Slot:
    """A place in the cache, whose lock is held while the model is loaded."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.predictor: Predictor | None = None
        self.host_copy: HostCopy | None = None

    def release(self) -> None:
        with self.lock:
            if self.host_copy is not None:
                self.host_copy.close()


_slots: dict[tuple[str, Device], _Slot] = {}
"""The models of this process, the one that was asked for last at the end."""

_slots_lock = threading.Lock()


def load(handle: ModelHandle) -> Predictor:
    """Give a model of this process, loaded for the device of its current task.

    The models that were used last stay: three, unless the variable ``HOROVODRUNNER_MODELS`` says
    otherwise.

    Parameters
    ----------
    handle
        The model.

    Returns
    -------
    Predictor
        The same one for each call, unless others took its place.

    Raises
    ------
    ConfigurationError
        If it cannot be loaded; the text names the model and the cause.
    """
    device = current_device()
    key = (handle.identity, device)
    bound = _bound()
    with _slots_lock:
        slot = _slots.pop(key, None) or _Slot()
        _slots[key] = slot
        surplus = [_slots.pop(each) for each in list(_slots)[:-bound]]
    for each in surplus:
        each.release()
    with slot.lock:
        if slot.predictor is None:
            try:
                slot.predictor, slot.host_copy = _made(handle, device)
            except BaseException:
                with _slots_lock:
                    if _slots.get(key) is slot:
                        del _slots[key]
                raise
        return slot.predictor


def _bound() -> int:
    text = os.environ.get(KEPT_MODELS, str(_KEPT))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigurationError(
            f"{KEPT_MODELS}={text!r}: it must be how many models a Python worker keeps, at least 1"
        )
    return int(text)


def _made(handle: ModelHandle, device: Device) -> tuple[Predictor, HostCopy | None]:
    from horovodrunner.inference import predictors

    if handle.kind == "make_predict_fn":
        # its errors are the user's own, as with predict_batch_udf
        make = cast(Callable[[], Callable[..., Any]], handle.make_predict_fn)
        return predictors.function_predictor(make()), None
    host_copy: HostCopy | None = None
    try:
        host_copy = _host_copy(handle.parcel)
        if handle.kind == "keras":
            content = handle.parcel.content if handle.parcel else None
            file = host_copy.path if host_copy else (content or b"")
            return predictors.keras_predictor(handle.skeleton, file, device), host_copy
        weights: Any = host_copy.map() if host_copy else None
        if host_copy is None and handle.parcel is not None:
            weights = bytearray(handle.parcel.content or b"")
        if handle.kind == "torch":
            device.prepare_torch()
        thing = frozen.restore(handle.skeleton, weights, handle.companions)
        if handle.kind == "torch":
            net, compiled = thing
            return predictors.torch_predictor(net, compiled, device), host_copy
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


def _host_copy(parcel: Parcel | None) -> HostCopy | None:
    if parcel is None or parcel.content is not None:
        return None

    def obtain() -> BinaryIO:
        path = parcel.artifact_path()
        if path is not None:
            return path.open("rb")
        file = cast(BinaryIO, tempfile.TemporaryFile(dir=local_directory()))  # noqa: SIM115
        try:
            parcel.write_to(file)
        except BaseException:
            file.close()
            raise
        return file

    return HostCopy(parcel.digest, parcel.size, obtain)
