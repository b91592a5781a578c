"""The state of the random number generators that a process has. Runs in: the worker."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from typing import Any

from horovodrunner.errors import ArgumentTypeError

__all__ = ["RandomState"]


class RandomState:
    """The state of this process's global random number generators, to be saved and loaded.

    Of Python, NumPy, PyTorch (CPU and the current GPU) and TensorFlow, as far as each is imported.
    It has the methods of a PyTorch module, so it goes where one does::

        state = checkpoint.RandomState()
        start = checkpoint.load_torch(model=model, optimizer=optimizer, random=state)
        ...
        checkpoint.save_torch(step, model=model, optimizer=optimizer, random=state)

    Generators that are objects of yours, such as ``numpy.random.default_rng()``, are not in it.

    Examples
    --------
    >>> state = RandomState()
    >>> saved = state.state_dict()
    >>> first = random.random()
    >>> state.load_state_dict(saved)
    >>> random.random() == first
    True
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers, strings, lists, tuples and dicts.

        Returns
        -------
        dict
            By library: ``python``, ``numpy``, ``torch``, ``cuda``, ``tensorflow``.
        """
        found = {name: get() for name, (get, _) in _LIBRARIES.items()}
        return {name: state for name, state in found.items() if state is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the generators to a state.

        Parameters
        ----------
        state
            What :meth:`state_dict` returned. Generators that it has nothing of stay as they are.

        Raises
        ------
        ArgumentTypeError
            If it is something else.
        """
        if not isinstance(state, Mapping) or not _LIBRARIES.keys() >= state.keys():
            raise ArgumentTypeError(
                f"{state!r:.80} is no state of random numbers: load what "
                "RandomState().state_dict() returned"
            )
        for name, saved in state.items():
            _LIBRARIES[name][1](saved)


def _numpy_state() -> Any:
    if "numpy" not in sys.modules:
        return None
    import numpy as np

    return _without_arrays(np.random.get_state(legacy=False))


def _without_arrays(value: Any) -> Any:
    """Turn arrays into lists: torch.load() refuses arrays unless it is told to trust a file."""
    if isinstance(value, dict):
        return {name: _without_arrays(item) for name, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def _set_numpy_state(state: Any) -> None:
    import numpy as np

    np.random.set_state(state)


def _torch_state() -> Any:
    torch = sys.modules.get("torch")
    return None if torch is None else bytes(torch.get_rng_state().tolist()).hex()


def _set_torch_state(state: str) -> None:
    import torch

    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8))


def _cuda_state() -> Any:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return bytes(torch.cuda.get_rng_state().tolist()).hex()


def _set_cuda_state(state: str) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8))


def _tensorflow_state() -> Any:
    if "tensorflow" not in sys.modules:
        return None
    context, generators = _tensorflow_modules()
    # Asking TensorFlow for them would make them, of entropy that nobody can restore.
    seeds, generator = getattr(context.context(), "_rng", None), generators.global_generator
    return {
        "seeds": None if seeds is None else seeds.getstate(),
        "generator": None
        if generator is None
        else (int(generator.algorithm), generator.state.numpy().tolist()),
    }


def _set_tensorflow_state(state: dict[str, Any]) -> None:
    import tensorflow as tf

    context, _ = _tensorflow_modules()
    seeds = getattr(context.context(), "_rng", None)
    if state["seeds"] is not None and seeds is not None:
        seeds.setstate(state["seeds"])
        context.context().clear_kernel_cache()  # kernels count how often they were used
    if state["generator"] is not None:
        algorithm, numbers = state["generator"]
        tf.random.set_global_generator(tf.random.Generator.from_state(numbers, algorithm))


def _tensorflow_modules() -> tuple[Any, Any]:
    from tensorflow.python.eager import context
    from tensorflow.python.ops import stateful_random_ops

    return context, stateful_random_ops


_LIBRARIES: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "python": (random.getstate, random.setstate),
    "numpy": (_numpy_state, _set_numpy_state),
    "torch": (_torch_state, _set_torch_state),
    "cuda": (_cuda_state, _set_cuda_state),
    "tensorflow": (_tensorflow_state, _set_tensorflow_state),
}
