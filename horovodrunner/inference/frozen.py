"""Takes the weights out of an object, and puts it together. Runs in: the driver, Python workers.

The weights become one file in the safetensors format, which a process maps instead of reading it;
the rest is a small pickle. The format is written and read here: the safetensors package would copy
NumPy arrays out of its mapping, and the executors do without it.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from horovodrunner.errors import PayloadError
from horovodrunner.formatting import in_one_line
from horovodrunner.pickling.pickler import Pickler

__all__ = ["Frozen", "freeze", "restore"]

_ALIGNMENT = 64
_LARGE_ARRAY = 16 * 1024
"""Bytes of a NumPy array that is worth an entry in the file."""

_FORMAT_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""What the two libraries' types, which have the same names but for one, are in the format."""


@dataclass
class Frozen:
    """An object without its weights.

    Parameters
    ----------
    skeleton
        The pickle of the rest.
    size
        Bytes of the file with the weights; 0 when there is none.
    weights_size
        Bytes of the weights alone.
    digest
        The file's SHA-256 in hexadecimal digits.
    companions
        What has to be pickled by Spark itself with each function it sends: broadcast variables.
    """

    skeleton: bytes
    size: int
    weights_size: int
    digest: str
    companions: tuple[Any, ...] = ()


@dataclass
class _Entry:
    """A run of bytes in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    item: int
    data: Any
    keeps: Any
    """Holds the memory, and so its address, which is how an entry is found again."""

    @property
    def size(self) -> int:
        return int(self.data.nbytes)


class _Stored:
    """Stands in the skeleton for the bytes of an entry."""

    def __init__(self, key: int) -> None:
        self.key = key


class _Companion:
    """Stands in the skeleton for what travels beside it."""

    def __init__(self, index: int) -> None:
        self.index = index


def freeze(thing: object, file: BinaryIO, names: Mapping[str, Any] | None = None) -> Frozen:
    """Pickle an object, its tensors and large arrays apart from it.

    Parameters
    ----------
    thing
        Any object. Tensors that share memory do so again when it is restored, on the CPU.
    file
        Gets the weights.
    names
        Tensors by the name that they have in the file.

    Returns
    -------
    Frozen
        The rest.

    Raises
    ------
    PayloadError
        If something does not pickle.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, names or {})
    try:
        pickler.dump(thing)
    except Exception as error:  # whatever a __reduce__ raises
        from horovodrunner.pickling.culprit import find_culprit  # hardly ever needed
        from horovodrunner.pickling.staying import Staying

        model = thing[0] if isinstance(thing, tuple) else thing
        kind = f"the model ({type(model).__module__}.{type(model).__qualname__})"
        found = find_culprit([(kind, model)], by_spark=True)
        what, why = (found.where, found.why) if found else (kind, Staying(in_one_line(error)))
        if what.startswith(f"{kind} ("):  # the model itself, with its class once more
            what = kind
        instead = why.scored if "main" in why.instead else why.instead
        raise PayloadError(
            f"{what} cannot be sent to the executors: {why.reason}. {instead}"
        ) from error
    size, digest = _write(pickler.entries.values(), file)
    weights = sum(entry.size for entry in pickler.entries.values())
    return Frozen(buffer.getvalue(), size, weights, digest, tuple(pickler.companions))


def restore(skeleton: bytes, weights: Any, companions: tuple[Any, ...] = ()) -> Any:
    """Put an object together again; its tensors and large arrays lie in `weights`.

    Parameters
    ----------
    skeleton
        As :func:`freeze` gave it.
    weights
        A writable buffer, such as a private mapping, with what :func:`freeze` wrote; None when
        that was nothing.
    companions
        As :func:`freeze` gave them.

    Returns
    -------
    object
        An equal object.
    """
    unpickler = _Unpickler(io.BytesIO(skeleton))
    unpickler.companions = companions
    if weights is not None:
        unpickler.entries = _entries(weights)
    return unpickler.load()


class _Pickler(Pickler):
    def __init__(self, buffer: io.BytesIO, names: Mapping[str, Any]) -> None:
        super().__init__(buffer)
        self.entries: dict[tuple[Any, ...], _Entry] = {}
        self.companions: list[Any] = []
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._names = {"__metadata__"}
        for name, tensor in names.items():
            if _is_plain_tensor(tensor):
                self._storage_of(tensor, name)

    def persistent_id(self, thing: Any) -> Any:
        """Tell what the skeleton has instead of these bytes."""
        if type(thing) is _Stored:
            return thing.key
        if type(thing) is _Companion:
            return ("companion", thing.index)
        return None

    def reducer_override(self, thing: Any) -> Any:
        """Tell tensors and large arrays apart from what cloudpickle is to pickle."""
        if type(thing) is np.ndarray and _is_large(thing):
            return _array, (self._array(thing), thing.dtype, thing.shape)
        if type(thing).__module__.startswith("pyspark.") and type(thing).__name__ == "Broadcast":
            self.companions.append(thing)
            return _same, (_Companion(len(self.companions) - 1),)
        if _is_plain_tensor(thing):
            return _tensor, (
                self._storage_of(thing),
                thing.dtype,
                thing.storage_offset(),
                tuple(thing.shape),
                thing.stride(),
                thing.requires_grad,
                type(thing).__name__ == "Parameter",
                vars(thing) or None,
            )
        return super().reducer_override(thing)

    def _array(self, array: np.ndarray[Any, Any]) -> _Stored:
        key = ("array", id(array))
        if key not in self.entries:
            dtype = _FORMAT_NAMES.get(array.dtype.name, "")
            data = array.reshape(-1).view(np.uint8)
            name = f"array.{len(self.entries)}"
            self._add(key, _Entry(name, dtype, array.shape, array.itemsize, data, array))
        return _Stored(self._numbers[key])

    def _storage_of(self, tensor: Any, name: str | None = None) -> _Stored:
        import torch

        storage = tensor.untyped_storage()
        key = (str(tensor.device), storage.data_ptr(), storage.nbytes())
        if key not in self.entries:
            whole = tensor.is_contiguous() and tensor.numel() * tensor.itemsize == storage.nbytes()
            dtype = _FORMAT_NAMES.get(str(tensor.dtype).removeprefix("torch."), "") if whole else ""
            name = name or f"tensor.{len(self.entries)}"
            flat = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage.cpu())
            shape = tuple(tensor.shape)
            self._add(key, _Entry(name, dtype, shape, tensor.itemsize, flat.numpy(), storage))
        return _Stored(self._numbers[key])

    def _add(self, key: tuple[Any, ...], entry: _Entry) -> None:
        if not entry.dtype:  # bytes of any meaning, as many as leave what follows them aligned
            padded = np.zeros(-(-entry.size // _ALIGNMENT) * _ALIGNMENT, np.uint8)
            padded[: entry.size] = entry.data
            entry.dtype, entry.shape, entry.item, entry.data = "U8", padded.shape, 1, padded
        while entry.name in self._names:
            entry.name += "_"
        self._names.add(entry.name)
        self._numbers[key] = len(self.entries)
        self.entries[key] = entry


class _Unpickler(pickle.Unpickler):
    companions: tuple[Any, ...] = ()
    entries: tuple[memoryview, ...] = ()

    def persistent_load(self, key: Any) -> Any:
        """Give what :meth:`_Pickler.persistent_id` named."""
        return self.entries[key] if isinstance(key, int) else self.companions[key[1]]


def _is_large(array: np.ndarray[Any, Any]) -> bool:
    return (
        array.nbytes >= _LARGE_ARRAY
        and array.dtype.kind in "biufc"
        and array.dtype.isnative
        and array.flags.c_contiguous
    )


def _is_plain_tensor(thing: Any) -> bool:
    """Whether it is a tensor or parameter, no kind of its own, that is nothing but memory."""
    kind = type(thing)
    if kind.__module__ not in {"torch", "torch.nn.parameter"}:
        return False
    import torch

    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        return False
    return bool(
        thing.layout is torch.strided
        and not thing.is_quantized
        and thing.device.type != "meta"
        and not thing.is_conj()
        and not thing.is_neg()
        and thing.untyped_storage().nbytes()
    )


def _same(thing: Any) -> Any:
    return thing


def _array(data: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    count = int(np.prod(shape))
    return np.frombuffer(data, dtype, count).reshape(shape)


def _tensor(  # noqa: PLR0917 - unpickling passes them by position
    data: memoryview,
    dtype: Any,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    is_parameter: bool,
    attributes: dict[str, Any] | None,
) -> Any:
    import torch

    # every tensor over the same bytes of the buffer shares them, as it did before
    memory = torch.frombuffer(data, dtype=torch.uint8)
    tensor = torch.empty(0, dtype=dtype, device="cpu")
    tensor.set_(memory.untyped_storage(), offset, shape, stride)
    if is_parameter:
        tensor = torch.nn.Parameter(tensor, requires_grad)
    else:
        tensor.requires_grad_(requires_grad)
    if attributes:
        vars(tensor).update(attributes)
    return tensor


def _write(entries: Iterable[_Entry], file: BinaryIO) -> tuple[int, str]:
    """Write a safetensors file; gives its size and its SHA-256.

    Entries of whole 64 bytes come first and then those of larger items, so that all are aligned
    although the format allows no gaps.
    """
    numbered = list(enumerate(entries))
    if not numbered:
        return 0, ""
    numbered.sort(key=lambda each: (each[1].size % _ALIGNMENT != 0, -each[1].item))
    header: dict[str, Any] = {}
    start = 0
    places: dict[int, tuple[int, int]] = {}
    for number, entry in numbered:
        end = start + entry.size
        places[number] = (start, end)
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape}
        header[entry.name]["data_offsets"] = (start, end)
        start = end
    order = " ".join(f"{a}:{b}" for _, (a, b) in sorted(places.items()))
    text = json.dumps({"__metadata__": {"entries": order}, **header}, separators=(",", ":"))
    head = text.encode()
    head += b" " * (-(len(head) + 8) % _ALIGNMENT)
    digest = hashlib.sha256()
    size = 0
    for part in (
        struct.pack("<Q", len(head)),
        head,
        *(entry.data for _, entry in numbered),
    ):
        digest.update(part)
        size += file.write(part)
    return size, digest.hexdigest()


def _entries(weights: Any) -> tuple[memoryview, ...]:
    view = memoryview(weights)
    (length,) = struct.unpack("<Q", view[:8])
    header = json.loads(bytes(view[8 : 8 + length]))
    places = (place.split(":") for place in header["__metadata__"]["entries"].split())
    body = view[8 + length :]
    return tuple(body[int(start) : int(end)] for start, end in places)
