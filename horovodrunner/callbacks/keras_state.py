"""The files of a checkpoint of a Keras model in training. Runs in: the worker."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from horovodrunner.callbacks import saving
from horovodrunner.errors import CheckpointError

__all__ = [
    "WEIGHTS",
    "callbacks_in",
    "load_own",
    "load_weights",
    "position_in",
    "save",
    "values_of",
]

WEIGHTS = "model.weights.h5"
_CALLBACKS = "callbacks.pkl"
_RANK = "rank.pkl"
_OF_KERAS = {"params", "_params", "validation_data"}


def save(directory: Path, model: Any, callbacks: dict[str, Any], position: dict[str, Any]) -> None:
    """Write this rank's part of a training into a directory."""
    if saving.is_first():
        model.save_weights(directory / WEIGHTS)  # the optimizer's, too
    saving.write(directory / _CALLBACKS, callbacks)
    own = {
        **position,
        "built": model.get_build_config(),
        "variables": list(map(_array, _own_variables(model))),
        "metrics": list(map(_array, model.metrics_variables)),
    }
    saving.write(directory / _RANK, own)


def position_in(directory: Path) -> dict[str, Any]:
    """Return what `save` wrote of this rank."""
    position: dict[str, Any] = saving.read(directory / _RANK)
    return position


def callbacks_in(directory: Path) -> dict[str, Any]:
    """Return what `save` wrote of the other callbacks."""
    callbacks: dict[str, Any] = saving.read(directory / _CALLBACKS)
    return callbacks


def load_weights(directory: Path, model: Any, built: dict[str, Any] | None) -> None:
    """Set what all ranks share: weights and the optimizer's state."""
    if not model.built:
        model.build_from_config(built)
    for optimizer in _optimizers(model):
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
    weights = {id(variable) for variable in model.weights}
    seeds = [each for each in _own_variables(model) if id(each) not in weights]
    arrays = list(map(_array, seeds))
    model.load_weights(directory / WEIGHTS)
    _assign(seeds, arrays)  # the file has those of rank 0


def load_own(model: Any, position: dict[str, Any], in_epoch: bool) -> None:
    """Set what is this rank's own: batch statistics, seeds and, within an epoch, metrics."""
    _assign(_own_variables(model), position["variables"])
    if in_epoch:
        _assign(model.metrics_variables, position["metrics"])


def _own_variables(model: Any) -> list[Any]:
    shared = {id(variable) for variable in (*model.trainable_variables, *model.metrics_variables)}
    return [variable for variable in model.variables if id(variable) not in shared]


def _assign(variables: list[Any], arrays: list[Any]) -> None:
    now, before = [[tuple(each.shape) for each in group] for group in (variables, arrays)]
    if now != before:
        raise CheckpointError(
            f"the checkpoint is of a model whose variables have the shapes {before}, and this one "
            f"has {now}: HorovodRunner(..., resume=False) starts anew"
        )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


def _array(variable: Any) -> Any:
    import keras

    return keras.ops.convert_to_numpy(variable.value)


def _optimizers(model: Any) -> list[Any]:
    import keras

    found = [model.optimizer, *vars(model).values()]
    return [each for each in found if isinstance(each, keras.optimizers.Optimizer)]


def values_of(callback: Any) -> dict[str, Any]:
    """Return the numbers, texts and arrays among a callback's attributes, but for its arguments.

    Those are settings, even where they change: Keras negates `min_delta`, once in each process.
    """
    arguments = {
        name
        for each in type(callback).__mro__
        if "__init__" in vars(each)
        for name in inspect.signature(vars(each)["__init__"]).parameters
    }
    return {
        name: value
        for name, value in vars(callback).items()
        if name not in arguments and name not in _OF_KERAS and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    is_of_numpy = type(value).__module__ == "numpy"
    return value is None or is_of_numpy or isinstance(value, (bool, int, float, str))
