"""A trained model, ready to be applied to DataFrames. Runs in: the driver."""

from __future__ import annotations

import hashlib
import mmap
import os
import pickle
import shutil
import sys
import tempfile
import uuid
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle

from horovodrunner import validation as checked
from horovodrunner.errors import (
    ArgumentTypeError,
    CheckpointError,
    ConfigurationError,
    PayloadError,
)
from horovodrunner.flows.checkpoints.manifest import MANIFEST_NAME, Manifest, directory_of
from horovodrunner.flows.checkpoints.worker.source import INDEX_NAME
from horovodrunner.formatting import format_bytes
from horovodrunner.inference.chunks import Shipment
from horovodrunner.inference.loading import Kind, ModelHandle
from horovodrunner.inference.weight_file import write_model
from horovodrunner.storage import LocalStorage, open_storage

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["Model"]


class Model:
    """A trained model that Spark's executors can load.

    It is a copy: what happens to the original later changes nothing. The weights are sent to the
    executors once, and PyTorch's and NumPy's are there once for each host, whatever number of
    Python workers uses them. :meth:`delete`, and the end of a ``with`` block, removes what was
    sent; else Spark does so when nothing refers to it any more, or the application ends.
    """

    def __init__(self, name: str, kind: Kind, thing: object) -> None:
        self._name = name
        self._kind = kind
        self._shipments: list[Shipment] = []
        self._deleted = False
        self._directory = Path(tempfile.mkdtemp(prefix="horovodrunner-model-"))
        self._file = self._directory / "weights"
        self._finalizer = weakref.finalize(self, _clean_up, self._directory, os.getpid())
        try:
            with self._file.open("wb") as file:
                self._contents = write_model(thing, file)
        except BaseException:
            self.delete()  # whoever keeps the error keeps this object
            raise
        # the file does not tell one broadcast variable from another
        unique = uuid.uuid4().hex if self._contents.broadcasts else ""
        self._identity = f"{kind} {self._contents.digest} {unique}"

    @classmethod
    def from_torch(cls, net: Any, *, compile: bool = False) -> Model:  # noqa: A002
        """Take a PyTorch module.

        Parameters
        ----------
        net
            Any ``torch.nn.Module``. Its class has to be importable on the executors, or be defined
            in a notebook. It predicts in evaluation mode and without gradients; NumPy arrays of
            floating-point numbers reach it in the type of its parameters.
        compile
            Whether each Python worker calls ``torch.compile``, which takes half a minute, and a C++
            compiler on the executors. It pays for convolutional networks.

        Raises
        ------
        ArgumentTypeError, PayloadError
            If it is no module, or cannot be pickled.

        Examples
        --------
        >>> import torch
        >>> with Model.from_torch(torch.nn.Linear(2, 1)) as model:
        ...     model
        Model(Linear, torch, 12 bytes of weights)
        """
        if not _is_instance(net, "torch.nn", "Module"):
            raise ArgumentTypeError(
                f"net={net!r:.100}: it must be a torch.nn.Module, got {type(net).__name__}"
            )
        compiles = checked.boolean("compile", compile)
        net = _unwrapped(net)
        return cls(type(net).__qualname__, "torch", (net, compiles))

    @classmethod
    def from_keras(cls, model: Any, *, custom_objects: Mapping[str, Any] | None = None) -> Model:
        """Take a Keras model, of Keras 3 or ``tf_keras``.

        Parameters
        ----------
        model
            A model that its own ``save()`` can save. The Python workers use the same backend.
        custom_objects
            Classes and functions that loading it needs, by name. Those that are registered with
            Keras, and classes of its layers, come along anyway.

        Raises
        ------
        ArgumentTypeError, PayloadError
            If it is no Keras model, or it cannot be saved, or a custom object not be pickled.
        """
        packages = [each for each in ("keras", "tf_keras") if _is_instance(model, each, "Model")]
        if not packages:
            raise ArgumentTypeError(
                f"model={model!r:.100}: it must be a model of Keras 3 or tf_keras, got "
                f"{type(model).__name__}"
            )
        with tempfile.TemporaryDirectory(prefix="horovodrunner-model-") as directory:
            saved = _saved_keras(model, packages[0], dict(custom_objects or {}), Path(directory))
            return cls(str(model.name), "keras", saved)

    @classmethod
    def from_function(cls, function: Callable[..., Any]) -> Model:
        """Take a function that predicts.

        Parameters
        ----------
        function
            Called with one NumPy array of shape ``(batch, ...)`` for each input; returns an array
            whose first dimension is the batch, a dict of them, or a list of dicts. Arrays and
            tensors that it captures travel once, as weights do.

        Raises
        ------
        ArgumentTypeError, PayloadError
            If it is not callable, or cannot be pickled.

        Examples
        --------
        >>> with Model.from_function(lambda x: x * 2) as model:
        ...     model
        Model(<lambda>, function)
        """
        if not callable(function):
            raise ArgumentTypeError(
                f"function={function!r:.100}: it must be callable, got {type(function).__name__}"
            )
        checked.runs_at_once("function", function)
        if maker := _maker_of(function):
            raise ArgumentTypeError(
                f"function={function!r:.100}: it is a model, use Model.{maker}(...)"
            )
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return cls(name.rpartition(".")[2], "function", function)

    @classmethod
    def from_checkpoint(cls, checkpoint: Any, build: Any) -> Model:
        """Take a model from a checkpoint's files.

        Parameters
        ----------
        checkpoint
            ``runner.best_checkpoint`` or one of ``runner.checkpoints``, a directory, or the URL of
            a checkpoint. Of one that every rank saved its own into, rank 0's files are taken.
        build
            A function that is called here with the directory, a ``pathlib.Path``, and
            returns a PyTorch module, a Keras model, a function or a :class:`Model`. Or a PyTorch
            module, which gets the weights that ``checkpoint.save_torch(step, model=...)`` saved.

        Raises
        ------
        ArgumentTypeError, CheckpointError
            If what build returned has the wrong type, or the checkpoint is not there or damaged.
        """
        is_module = _is_instance(build, "torch.nn", "Module")
        if not is_module and not callable(build):
            raise ArgumentTypeError(
                f"build={build!r:.100}: it must be a function of the checkpoint's directory, or "
                f"the torch.nn.Module to load it into, got {type(build).__name__}"
            )
        if checkpoint is None:
            raise ArgumentTypeError(
                "checkpoint=None: there is none. runner.best_checkpoint is None until one is saved "
                "with the metric of keep_best"
            )
        location = checked.path("checkpoint", getattr(checkpoint, "path", checkpoint))
        with tempfile.TemporaryDirectory(prefix="horovodrunner-checkpoint-") as copied:
            directory = _local_files(location, Path(copied))
            made = _load_module(build, directory, location) if is_module else build(directory)
        if isinstance(made, cls):
            return made
        maker = _maker_of(made)
        if not maker and not callable(made):
            raise ArgumentTypeError(
                f"build returned {made!r:.100} ({type(made).__name__}): it must return a "
                "torch.nn.Module, a Keras model, a function or a Model"
            )
        model: Model = getattr(cls, maker or "from_function")(made)
        return model

    def __repr__(self) -> str:
        size = self._contents.weights_size
        weights = f", {format_bytes(size)} of weights" if size else ""
        return f"Model({self._name}, {self._kind}{weights}{', deleted' if self._deleted else ''})"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.delete()

    def __reduce__(self) -> Any:
        raise PayloadError(
            f"{self!r} stays on the driver: give it to predict_udf or predict instead of using it "
            "in a function that Spark sends to its executors"
        )

    def delete(self) -> None:
        """Remove what was sent to the executors; queries that still use it fail."""
        self._deleted = True
        for shipment in self._shipments:
            shipment.withdraw()
        self._shipments.clear()
        self._finalizer()

    def handle(self, spark: SparkSession) -> ModelHandle:
        """Send the file to an application's executors, unless it is there; for use in functions."""
        if self._deleted:
            raise ConfigurationError(f"{self!r} cannot be used any more")
        shipment = next((each for each in self._shipments if each.serves(spark)), None)
        if shipment is None:
            shipment = Shipment(spark, self._file, self._contents.digest)
            self._shipments.append(shipment)
        source = (self._kind, shipment.file, self._contents)
        return ModelHandle(self._identity, self._name, source)


def _saved_keras(
    model: Any, package: str, custom_objects: dict[str, Any], directory: Path
) -> tuple[object, ...]:
    """Save a Keras model; returns what the Python workers take, its archive mapped."""
    keras = sys.modules[package]
    backend = keras.backend.backend() if package == "keras" else "tensorflow"
    own = {
        type(layer).__name__: type(layer)
        for layer in model._flatten_layers()
        if not type(layer).__module__.startswith(("keras.", "tf_keras."))
    }
    custom_objects = {**own, **keras.saving.get_custom_objects(), **custom_objects}
    try:
        custom = cloudpickle.dumps(custom_objects)
    except Exception as error:
        raise PayloadError(
            f"the custom objects {', '.join(custom_objects)} of the model {model.name} cannot "
            f"be sent to the executors: {type(error).__name__}: {error}"
        ) from error
    path = directory / "model.keras"
    try:
        model.save(str(path))
    except Exception as error:
        raise PayloadError(
            f"the model {model.name} cannot be saved by {package}: {type(error).__name__}: {error}"
        ) from error
    with path.open("rb") as file:
        archive = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return package, backend, custom, pickle.PickleBuffer(archive)


def _clean_up(directory: Path, owner: int) -> None:
    if os.getpid() == owner:  # no forked child
        shutil.rmtree(directory, ignore_errors=True)


def _is_instance(thing: Any, module: str, name: str) -> bool:
    """Whether it is an instance of a class of a module that need not be installed."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(thing, kind)


def _maker_of(thing: Any) -> str:
    """Name the constructor for a framework's model; empty for anything else."""
    if _is_instance(thing, "torch.nn", "Module"):
        return "from_torch"
    is_keras = any(_is_instance(thing, package, "Model") for package in ("keras", "tf_keras"))
    return "from_keras" if is_keras else ""


def _unwrapped(net: Any) -> Any:
    """Take a module out of what distributes or compiles it, which no other process could use."""
    import torch

    while True:
        if isinstance(net, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            net = net.module
        elif type(net).__name__ == "OptimizedModule" and hasattr(net, "_orig_mod"):
            net = net._orig_mod
        else:
            return net


def _local_files(location: str, copied: Path) -> Path:
    """Return the directory of a checkpoint's files, copied from behind a URL if they are there.

    Of a checkpoint of all ranks they are rank 0's, which are all in its own directory: what is the
    same on several ranks is stored with the lowest.
    """
    place = open_storage(location)
    if isinstance(place, LocalStorage):
        root = place.root / directory_of(0) if _is_of_all_ranks(place.root) else place.root
        if not root.is_dir():
            raise CheckpointError(f"there is no checkpoint at {root}: it is no directory")
        return root
    try:
        with place.open(MANIFEST_NAME) as stream:
            manifest = Manifest.from_json(stream.read().decode())
        rank = None if manifest.world_size is None else 0
        for directory in manifest.directories_of(rank):
            (copied / directory).mkdir(parents=True, exist_ok=True)
        for name, each in manifest.files_of(rank).items():
            target = copied / name
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with place.open(each.path) as stream, target.open("wb") as file:
                while part := stream.read(2**20):
                    digest.update(part)
                    file.write(part)
            if digest.hexdigest() != each.sha256:
                raise CheckpointError(
                    f"{place.url(each.path)} is not what was saved there (its SHA-256 differs from "
                    "the manifest's): take another checkpoint"
                )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint at {location} cannot be read: {type(error).__name__}: {error}. The "
            "URL has to be that of one checkpoint, such as runner.checkpoints[-1].path"
        ) from error
    return copied


def _is_of_all_ranks(directory: Path) -> bool:
    try:
        manifest = Manifest.from_json((directory / MANIFEST_NAME).read_text())
    except (OSError, ValueError):  # any directory will do
        return False
    return manifest.world_size is not None


def _load_module(net: Any, directory: Path, location: str) -> Any:
    """Load what ``checkpoint.save_torch(step, model=net)`` saved into a module."""
    import torch

    path = directory / "model.pt"
    if not path.is_file() and _has_shards(directory):
        return _load_shards(net, directory, location)
    files = sorted(directory.glob("*.pt"))
    if len(files) == 1:
        path = files[0]
    if not path.is_file():
        held = ", ".join(sorted(each.name for each in directory.iterdir()))
        raise CheckpointError(
            f"{directory} has no model.pt and no other single .pt file, only {held or 'nothing'}: "
            "give a function of the directory as build"
        )
    net.load_state_dict(torch.load(path, map_location="cpu"))
    return net


def _load_shards(net: Any, directory: Path, location: str) -> Any:
    """Load a module whose weights are spread over the ranks' directories."""
    if (directory / INDEX_NAME).is_file():
        from horovodrunner.inference.shards import load_shards

        return load_shards(net, location)
    raise CheckpointError(
        f"{directory} has only rank 0's shards of the weights, and no model.pt: give a function as "
        "build that loads them from all ranks' directories, torch.distributed.checkpoint.load("
        "state, storage_reader=checkpoint.torch_reader(path))"
    )


def _has_shards(directory: Path) -> bool:
    """Whether a rank's directory has parts of tensors."""
    return any([*directory.glob(INDEX_NAME), *directory.rglob(".metadata")])
