"""A model in one file, which processes map. Runs in: the driver and Spark's Python workers.

The pickle comes first, and the memory of its tensors and arrays stands behind it. Tensors that
share memory do so again, on the CPU.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from typing import Any, BinaryIO

from horovodrunner.errors import PayloadError
from horovodrunner.pickling.pickler import Pickler

__all__ = ["Contents", "read_model", "write_model"]

_ALIGNMENT = 64
_BESIDE_BYTES = 4096
"""A smaller buffer stays in the pickle."""


@dataclass(frozen=True)
class Contents:
    """What stands in a weight file."""

    places: tuple[tuple[int, int], ...]
    """Where the pickle is, and each buffer that it needs."""
    digest: str
    """The file's SHA-256."""
    weights_size: int
    """Bytes of all tensors and arrays."""
    broadcasts: tuple[Any, ...]
    """Spark's broadcast variables, which Spark itself has to pickle with each function it sends."""


def write_model(thing: object, file: BinaryIO) -> Contents:
    buffer = io.BytesIO()
    beside: list[memoryview] = []
    weights_size = 0

    def stays(memory: pickle.PickleBuffer) -> bool:
        nonlocal weights_size
        view = memory.raw()
        weights_size += view.nbytes
        if view.nbytes < _BESIDE_BYTES:
            return True
        beside.append(view)
        return False

    pickler = _Pickler(buffer, buffer_callback=stays)
    try:
        pickler.dump(thing)
    except Exception as error:  # whatever a __reduce__ raises
        raise _refusal(thing, error) from error
    digest = hashlib.sha256()
    places = []
    end = 0
    for part in (buffer.getbuffer(), *beside):
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        for piece in (bytes(start - end), part):
            digest.update(piece)
            file.write(piece)
        end = start + part.nbytes
        places.append((start, end))
    return Contents(tuple(places), digest.hexdigest(), weights_size, tuple(pickler.broadcasts))


def _refusal(thing: object, error: Exception) -> PayloadError:
    from horovodrunner.pickling.culprit import culprit_of  # hardly ever needed

    model = thing[0] if isinstance(thing, tuple) else thing
    kind = f"the model ({type(model).__module__}.{type(model).__qualname__})"
    what, _, why = culprit_of([(kind, model)], error, kind, by_spark=True)
    if what.startswith(f"{kind} ("):  # the model itself, with its class once more
        what = kind
    instead = why.scored if "main" in why.instead else why.instead
    return PayloadError(f"{what} cannot be sent to the executors: {why.reason}. {instead}")


def read_model(memory: Any, contents: Contents) -> Any:
    """Return what was written, over the same memory, such as a private mapping of the file."""
    view = memoryview(memory)
    data, *buffers = (view[start:end] for start, end in contents.places)
    return _Unpickler(data, buffers, contents.broadcasts).load()


class _Pickler(Pickler):
    to_cpu = True

    def __init__(self, file: BinaryIO, **options: Any) -> None:
        super().__init__(file, **options)
        self.broadcasts: list[Any] = []

    def persistent_id(self, obj: Any) -> int | None:
        kind = type(obj)
        if kind.__name__ != "Broadcast" or not kind.__module__.startswith("pyspark."):
            return None
        self.broadcasts.append(obj)
        return len(self.broadcasts) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, data: memoryview, buffers: list[memoryview], broadcasts: tuple[Any, ...]
    ) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._broadcasts = broadcasts

    def persistent_load(self, pid: int) -> Any:
        return self._broadcasts[pid]
