"""What is to be equal: weights of ranks, of one process and several, and after a restart.

Runs in: the driver.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError
from horovodrunner.testing.faults import Faults

__all__ = ["assert_equal_to_single_process", "assert_resumes", "assert_same_weights"]

TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}
"""Relative and absolute: sums of several ranks are added in another order than those of one.

They are a few hundred times the type's precision, which some dozen steps of training use up.
"""

_MAX_SHOWN = 5


def assert_same_weights(ranks: Sequence[Any]) -> None:
    """Assert that all ranks have the same weights, bit for bit.

    Parameters
    ----------
    ranks
        What each rank returned: a model of PyTorch or Keras, a ``state_dict()``, an array or a
        tensor, or dicts and lists of them.

    Raises
    ------
    AssertionError
        If they differ; it names ranks, weights and how far they are apart.
    ArgumentTypeError
        If there are not at least two, or one has no weights in it.

    Examples
    --------
    >>> assert_same_weights([{"w": np.ones(2)}, {"w": np.ones(2)}])
    """
    if isinstance(ranks, (str, bytes, Mapping)) or not hasattr(ranks, "__len__"):
        raise ArgumentTypeError(
            f"ranks={checked.shown(ranks)}: give what every rank returned, by rank: "
            'HorovodRunner(np=-2, results="all") keeps it in runner.results'
        )
    if len(ranks) < 2:
        raise ArgumentTypeError(f"ranks has {len(ranks)} of them: two are needed to compare")
    first = _weights(ranks[0], "rank 0")
    for rank in range(1, len(ranks)):
        found = _differences(first, _weights(ranks[rank], f"rank {rank}"), exactly=True)
        _require(not found, f"rank {rank} and rank 0 have different weights:\n{_listed(found)}")


def assert_equal_to_single_process(
    train: Callable[..., Any],
    *,
    np: int = -2,
    tolerance: float | None = None,
    runner: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> None:
    """Assert that several ranks train to the weights that one process does.

    It shows that gradients are really averaged. ``train`` returns its weights, and deals the same
    batches out to its ranks: with a global batch of 32, two ranks take 16 rows of it each.

    Parameters
    ----------
    train
        A training function, which returns weights as :func:`assert_same_weights` takes them.
    np
        The number of ranks to compare one with; negative: on this machine.
    tolerance
        How far numbers may be apart, relative and absolute. None: by their type, 1e-5 for float32,
        1e-10 for float64, 1e-2 for float16 and 3e-2 for bfloat16.
    runner
        Makes a runner: :class:`horovodrunner.HorovodRunner`, or the fixture ``horovod_runner``.
    **kwargs
        Arguments of ``train``.

    Raises
    ------
    AssertionError
        If the weights differ; it names them and how far they are apart.
    HorovodRunnerError
        If a run fails.

    Examples
    --------
    >>> assert_equal_to_single_process(train, epochs=2)  # doctest: +SKIP
    """
    make = runner or _plain_runner
    alone = _weights(make(np=-1).run(train, **kwargs), "train")
    several = make(np=np, results="all")
    several.run(train, **kwargs)
    assert_same_weights(several.results)
    together = _weights(several.results[0], "train")
    found = _differences(alone, together, exactly=False, tolerance=tolerance)
    _require(
        not found,
        f"{abs(np)} ranks do not train to what one process does. Are gradients averaged, and has "
        f"each rank its share of the same batches?\n{_listed(found)}",
    )


def assert_resumes(
    train: Callable[..., Any],
    *,
    at_step: int,
    rank: int = 0,
    np: int = -2,
    runner: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> None:
    """Assert that a run which loses a rank ends as an undisturbed one does, bit for bit.

    A rank is killed when it gets to a step, after a checkpoint is complete; the run is launched
    again and goes on from it. ``train`` reports or saves its steps, see
    :class:`horovodrunner.testing.Faults`, and returns its weights, or anything with arrays in it.

    Parameters
    ----------
    train
        A training function that saves checkpoints and goes on from them.
    at_step
        The step at which the rank is killed; there has to be a checkpoint before.
    rank
        The rank that is killed.
    np
        The number of ranks; negative: on this machine.
    runner
        Makes a runner: :class:`horovodrunner.HorovodRunner`, or the fixture ``horovod_runner``.
    **kwargs
        Arguments of ``train``.

    Raises
    ------
    AssertionError
        If the weights differ, or the rank never got to that step.
    HorovodRunnerError
        If a run fails otherwise.

    Examples
    --------
    >>> assert_resumes(train, at_step=3, epochs=6)  # doctest: +SKIP
    """
    make = runner or _plain_runner
    with tempfile.TemporaryDirectory(prefix="horovodrunner-resuming-") as kept:
        calm, disturbed = Path(kept, "calm"), Path(kept, "disturbed")
        expected = _weights(make(np=np, checkpoint_dir=calm).run(train, **kwargs), "train")
        happened = Path(kept, "happened")
        with Faults() as faults:
            faults.kill(rank, at_step)
            faults.after_checkpoint(disturbed)
            faults.note_in(happened)
            again = make(np=np, checkpoint_dir=disturbed, max_restarts=1)
            found = _weights(again.run(train, **kwargs), "train")
        _require(
            happened.exists(),
            f"rank {rank} never got to step {at_step}, and was not killed: does train report its "
            "steps (metrics.report(step=...)) or save them (checkpoint.save(step=...))?",
        )
    differences = _differences(expected, found, exactly=True)
    _require(
        not differences,
        f"a run whose rank {rank} was killed at step {at_step} ends with other weights than an "
        "undisturbed one. Are optimizer, learning rate, random numbers and the position in the "
        f"data restored, too?\n{_listed(differences)}",
    )


def _require(holds: object, text: str) -> None:
    if not holds:  # also where Python leaves assert statements out
        raise AssertionError(text)


def _plain_runner(**options: Any) -> Any:
    from horovodrunner.runner import HorovodRunner

    return HorovodRunner(**options)


def _weights(value: Any, whose: str) -> dict[str, np.ndarray]:
    """Return arrays by name; an ArgumentTypeError if there is none."""
    found = dict(_arrays(value, ""))
    if not found:
        raise ArgumentTypeError(
            f"what {whose} returned has no weights in it ({checked.shown(value)}): return a model, "
            "a state_dict(), arrays, or dicts and lists of them"
        )
    return found


def _arrays(value: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    if callable(getattr(value, "state_dict", None)):
        value = value.state_dict()
    elif callable(getattr(value, "get_weights", None)):
        value = value.get_weights()
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _arrays(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _arrays(item, f"{name}[{place}]")
    elif (array := _array(value)) is not None:
        yield name or "the value", array


def _array(value: Any) -> np.ndarray | None:
    if isinstance(value, (str, bytes)) or value is None:
        return None
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy does not know it
            value = value.float()
    if hasattr(value, "numpy"):
        value = value.numpy()
    array = np.asarray(value)
    return None if array.dtype == object else array


def _differences(
    expected: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    *,
    exactly: bool,
    tolerance: float | None = None,
) -> list[str]:
    texts = [f"{name} is there only once" for name in expected.keys() ^ found.keys()]
    for name in expected.keys() & found.keys():
        a, b = expected[name], found[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            texts.append(f"{name} is {a.dtype} of shape {a.shape}, and {b.dtype} of {b.shape}")
        elif a.dtype.kind not in "fc" or exactly:
            same = a.tobytes() == b.tobytes() or np.array_equal(
                a, b, equal_nan=a.dtype.kind in "fc"
            )
            if not same:
                texts.append(f"{name}: {_apart(a, b)}")
        else:
            limit = TOLERANCES.get(str(a.dtype), 1e-5) if tolerance is None else tolerance
            if not np.allclose(a, b, rtol=limit, atol=limit, equal_nan=True):
                texts.append(f"{name}: {_apart(a, b)}, and {limit:g} is allowed")
    return sorted(texts)


def _apart(a: np.ndarray, b: np.ndarray) -> str:
    if a.dtype.kind not in "fciub" or not a.size:
        return "they differ"
    wide = "complex128" if a.dtype.kind == "c" else "float64"
    furthest = np.nanmax(np.abs(a.astype(wide) - b.astype(wide)))
    return f"{np.count_nonzero(a != b)} of {a.size} numbers differ, by {furthest:.3g} at most"


def _listed(texts: Sequence[str]) -> str:
    shown = [f"  {text}" for text in texts[:_MAX_SHOWN]]
    if more := len(texts) - len(shown):
        shown.append(f"  and {more} more")
    return "\n".join(shown)
