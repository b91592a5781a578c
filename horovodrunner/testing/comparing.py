"""What is to be equal: weights of ranks, of one process and several, and after a restart.

Runs in: the driver.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError
from horovodrunner.testing.faults import Faults

__all__ = ["assert_equal_to_single_process", "assert_resumes", "assert_same_weights"]

TOLERANCES = {
    **{"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2, "float8": 0.5},
    **{"complex128": 1e-10, "complex64": 1e-5},
}
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
    if isinstance(ranks, (str, bytes)) or not isinstance(ranks, Sequence):
        raise ArgumentTypeError(
            f"ranks={checked.shown(ranks)}: give what every rank returned, by rank: "
            'HorovodRunner(np=-2, results="all") keeps it in runner.results'
        )
    if len(ranks) < 2:
        raise ArgumentTypeError(f"ranks has {len(ranks)} of them: two are needed to compare")
    first = _weights(ranks[0], "rank 0")
    for rank in range(1, len(ranks)):
        found = _differences(first, _weights(ranks[rank], f"rank {rank}"), exactly=True)
        _require(
            not found,
            f"rank {rank} and rank 0 have different weights. Do they begin with the same ones, and "
            "are gradients averaged (hvd.DistributedOptimizer, DistributedDataParallel)?\n"
            f"{_listed(found)}",
        )


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
    if tolerance is not None and not checked.number("tolerance", tolerance) >= 0:
        raise ArgumentValueError(f"tolerance={tolerance}: it must be at least 0")
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
        If the weights of a rank differ, no checkpoint was saved, or the rank never got to that
        step.
    HorovodRunnerError
        If a run fails otherwise.

    Examples
    --------
    >>> assert_resumes(train, at_step=3, epochs=6)  # doctest: +SKIP
    """
    rank = checked.integer("rank", rank, at_least=0)
    at_step = checked.integer("at_step", at_step, at_least=1)  # a checkpoint has to be before
    if rank >= abs(np) > 0:
        raise ArgumentValueError(f"rank={rank}: np={np} has ranks 0 to {abs(np) - 1}")
    make = runner or _plain_runner

    def trained(directory: Path, **options: Any) -> dict[str, _Weight]:
        made = make(np=np, results="all", checkpoint_dir=directory, **options)
        made.run(train, **kwargs)
        _require(
            made.checkpoints,
            "train saved no checkpoint that a run could go on from: checkpoint.save(step=...)",
        )
        return _weights({f"rank {of}": each for of, each in enumerate(made.results)}, "train")

    with tempfile.TemporaryDirectory(prefix="horovodrunner-resuming-") as kept:
        expected = trained(Path(kept, "calm"))
        disturbed = Path(kept, "disturbed")
        happened, went_on = Path(kept, "happened"), Path(kept, "went on")
        with Faults() as faults:
            faults.kill(rank, at_step)
            faults.after_checkpoint(disturbed)
            faults.note_in(happened, went_on)
            found = trained(disturbed, max_restarts=1)
        _require(
            happened.exists(),
            f"rank {rank} never got to step {at_step}, and was not killed: does train report its "
            "steps (metrics.report(step=...)) or save them (checkpoint.save(step=...))?",
        )
        _require(
            went_on.exists(),
            "after the restart train began anew: it did not ask for its checkpoint with "
            "checkpoint.latest() or checkpoint.load_torch()",
        )
        if not (differences := _differences(expected, found, exactly=True)):
            return
        by_itself = _differences(expected, trained(Path(kept, "calm again")), exactly=True)
    _require(
        not by_itself,
        "two undisturbed runs end with different weights, so nothing follows from a third. Are "
        f"random numbers seeded, and is the order of the data the same?\n{_listed(by_itself)}",
    )
    raise AssertionError(
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


@dataclass(frozen=True)
class _Weight:
    numbers: np.ndarray
    type: str
    """What its library calls the type of the numbers; NumPy does not know all of them."""


def _weights(value: Any, whose: str) -> dict[str, _Weight]:
    """Return weights by name; an ArgumentTypeError if there is none."""
    found: dict[str, _Weight] = {}
    for name, weight in _named(value, ""):
        more = sum(each.partition("#")[0] == name for each in found) if name in found else 0
        found[f"{name}#{more}" if more else name] = weight  # "1" and 1 are two keys
    if not found:
        raise ArgumentTypeError(
            f"what {whose} returned has no weights in it ({checked.shown(value)}): return a model, "
            "a state_dict(), arrays, or dicts and lists of them, on every rank"
        )
    return found


def _named(value: Any, name: str) -> Iterator[tuple[str, _Weight]]:
    if callable(getattr(value, "state_dict", None)):
        value = value.state_dict()
    elif callable(getattr(value, "get_weights", None)):
        value = value.get_weights()
    elif is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _named(item, f"{name}[{place}]")
    elif (weight := _weight(value)) is not None:
        yield name or "the value", weight


def _weight(value: Any) -> _Weight | None:
    if isinstance(value, (str, bytes)) or value is None:
        return None
    kind = ""
    if hasattr(value, "detach"):
        kind = str(value.dtype).removeprefix("torch.")
        value = value.detach().cpu().to_dense().resolve_conj().resolve_neg()
        if value.is_quantized:
            value = value.dequantize()
        elif kind.startswith(("bfloat", "float8")):  # NumPy does not know them
            value = value.float()
    if hasattr(value, "numpy"):
        value = value.numpy()
    array = np.asarray(value)
    kind = kind or str(array.dtype)
    if kind.startswith(("bfloat", "float8")):  # of ml_dtypes, as Keras and JAX have them
        array = array.astype("float32")
    return None if array.dtype == object else _Weight(array, kind)


def _differences(
    expected: Mapping[str, _Weight],
    found: Mapping[str, _Weight],
    *,
    exactly: bool,
    tolerance: float | None = None,
) -> list[str]:
    texts = [f"{name} is there only once" for name in expected.keys() ^ found.keys()]
    for name in expected.keys() & found.keys():
        a, b, kind = expected[name].numbers, found[name].numbers, expected[name].type
        if a.shape != b.shape or kind != found[name].type:
            texts.append(
                f"{name} is {kind} of shape {a.shape}, and {found[name].type} of {b.shape}"
            )
        elif a.dtype.kind not in "fc" or exactly:
            same = a.tobytes() == b.tobytes() or np.array_equal(
                a, b, equal_nan=a.dtype.kind in "fc"
            )
            if not same:
                texts.append(f"{name}: {_apart(a, b)}")
        else:
            limit = _tolerance(kind) if tolerance is None else tolerance
            if not np.allclose(a, b, rtol=limit, atol=limit, equal_nan=True):
                texts.append(f"{name}: {_apart(a, b)}, and {limit:g} is allowed")
    return sorted(texts)


def _tolerance(kind: str) -> float:
    return next((each for name, each in TOLERANCES.items() if kind.startswith(name)), 1e-5)


def _apart(a: np.ndarray, b: np.ndarray) -> str:
    if a.dtype.kind not in "fciub" or not a.size:
        return "they differ"
    differs = a != b
    if a.dtype.kind in "fc":
        differs &= ~(np.isnan(a) & np.isnan(b))
    wide = "complex128" if a.dtype.kind == "c" else "float64"
    with np.errstate(all="ignore"):
        furthest = np.max(np.abs(a[differs].astype(wide) - b[differs].astype(wide)))
    return f"{np.count_nonzero(differs)} of {a.size} numbers differ, by {furthest:.3g} at most"


def _listed(texts: Sequence[str]) -> str:
    shown = [f"  {text}" for text in texts[:_MAX_SHOWN]]
    if more := len(texts) - len(shown):
        shown.append(f"  and {more} more")
    return "\n".join(shown)
