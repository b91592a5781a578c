"""Tensors out of the model's memory, so that main may change it. Runs in: the worker."""

from __future__ import annotations

import contextlib
import gc
import io
import pickle
import sys
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["Copies", "identity", "is_plain", "is_sharded", "tensors_in", "without_collections"]


def tensors_in(state: Any) -> Iterator[Any]:
    """Go through the tensors of a nested state dict."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_in(value)


def is_sharded(state: Any) -> bool:
    """Return whether a nested state dict has tensors of which each rank holds a part."""
    dtensor = _dtensor()
    return dtensor is not None and any(isinstance(each, dtensor) for each in tensors_in(state))


def _dtensor() -> Any:
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_plain(tensor: Any) -> bool:
    """Return whether a tensor is what its memory says: not the conjugate of it, say."""
    kind = type(tensor)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        return False
    if tensor.layout is not torch.strided or not tensor.numel():
        return False
    return not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)


def identity(tensor: Any) -> Hashable:
    """Tell tensors apart by where they are in memory: tied weights are the same."""
    if not is_plain(tensor):
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Keep the garbage collector from going through all objects of main's meanwhile."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Copies:
    """Copies tensors to memory of the CPU; what is tied stays so."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Any, Any]] = {}
        self._dtensor = _dtensor() or ()
        self.local: dict[int, Any] = {}
        """Copies of what DTensors have here, by their ids; they themselves stay in the state."""

    def of_tensor(self, tensor: Any) -> Any:
        """Return the copy, which is not complete before `finish`; a DTensor itself."""
        if isinstance(tensor, self._dtensor):
            self.local[id(tensor)] = self.of_tensor(tensor.to_local())
            return tensor
        key: Hashable = tensor.data_ptr() if is_plain(tensor) else id(tensor)
        found = self._made.get(key)
        if found is not None:
            key = identity(tensor)  # another view may begin there, too
            if key == identity(found[0]):
                return found[1]
            found = self._made.get(key)
        if found is None:
            source = tensor.detach()
            if source.is_cpu:
                copy = source.clone()
            else:  # non_blocking takes pinned memory of torch's cache
                copy = source.to("cpu", non_blocking=source.is_cuda)
            # the source is kept, so that no other has its address
            found = self._made[key] = tensor, copy
        return found[1]

    @without_collections()
    def of_state(self, state: Any) -> Any:
        """Return the copy of anything that can be pickled, not complete before `finish`."""
        tensors: list[Any] = []

        class Pickler(pickle.Pickler):
            def persistent_id(_, value: Any) -> int | None:  # noqa: N805
                if not isinstance(value, torch.Tensor):
                    return None
                tensors.append(self.of_tensor(value))
                return len(tensors) - 1

        class Unpickler(pickle.Unpickler):
            def persistent_load(_, number: int) -> Any:  # noqa: N805
                return tensors[number]

        buffer = io.BytesIO()
        with torch.no_grad():
            Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(state)
        buffer.seek(0)
        return Unpickler(buffer).load()

    def finish(self) -> None:
        """Wait until all copies are complete."""
        for device in {source.device for source, _ in self._made.values()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self._made.clear()
