"""Metrics and progress, as main() reports them. Runs in: the worker.

What any rank reports reaches the driver while training goes on, is shown there, and stays in
``HorovodRunner.history``, also after a failure::

    from horovodrunner import metrics

    def train(epochs):
        for epoch in metrics.progress(range(epochs), desc="epoch"):
            ...
            metrics.report(step=epoch, loss=loss, val_acc=accuracy)

Outside a run :func:`report` checks its arguments and keeps nothing, and :func:`progress` draws
tqdm's bar, so the same code can be called in a notebook or a test.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError
from horovodrunner.flows.logs.training_log import format_logs
from horovodrunner.flows.metrics.records import MAX_STEP, Bar, encode_bar, encode_point
from horovodrunner.flows.metrics.worker import MetricsPipe
from horovodrunner.processes.worker.context import current_context, notice

__all__ = ["Progress", "progress", "report"]

MAX_RECORD_BYTES = 128 * 1024
"""Of one report; some thousand numbers."""

BAR_SECONDS = 0.1
"""A bar is reported so often, as tqdm draws one."""

TQDM_OPTIONS = {
    *("leave", "file", "ncols", "mininterval", "maxinterval", "miniters", "ascii", "disable"),
    *("unit", "unit_scale", "dynamic_ncols", "smoothing", "bar_format", "initial", "position"),
    *("postfix", "unit_divisor", "write_bytes", "lock_args", "nrows", "colour", "delay", "gui"),
}
"""What ``tqdm.tqdm`` takes beside what :func:`progress` names."""

_Item = TypeVar("_Item")
_bar_numbers = itertools.count(1)
_last_step = -1


class _Clocks:
    """In a class: freezegun puts clocks of its own in the place of a module's."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


def report(step: int | None = None, *, ranks: str = "summary", **values: Any) -> None:
    """Report numbers of a training step; it costs about ten microseconds and never waits.

    All that rank 0 reports is kept. Of the other ranks, their mean, minimum and maximum at each
    step are, or everything with ``ranks="all"``. Reporting a tensor that is on a GPU waits for the
    GPU, as printing it would, which is said once.

    Parameters
    ----------
    step
        The step, epoch or batch that the numbers belong to, of at most 2**53. None counts on from
        the step before, and from 0.
    ranks
        ``"summary"`` or ``"all"``: what is kept of ranks other than 0.
    **values
        Numbers by name: of Python, NumPy, PyTorch, TensorFlow, JAX or any library; arrays and
        tensors of one number, too. They are kept as floats, NaN and infinities as they are.

    Raises
    ------
    ArgumentTypeError
        If a value is not a number, or step is not an int.
    ArgumentValueError
        If `ranks` is another word, a number is too large for a float, or the numbers are too many
        (128 KiB as JSON).

    Examples
    --------
    >>> report(step=3, loss=0.25, val_acc=0.91)  # outside a run nothing is kept
    """
    global _last_step
    step = _last_step + 1 if step is None else _checked_step(step)
    _last_step = step
    if ranks != "summary":
        ranks = checked.choice("ranks", ranks, ("summary", "all"))
    for name, value in values.items():
        kind = type(value)
        if kind is float or (kind is int and -MAX_STEP <= value <= MAX_STEP):
            continue
        values[name] = number_of(name, value)
    context = current_context()
    if context is None:
        return
    if context.on_step is not None:
        context.on_step(step)
    is_kept = ranks == "all" or context.spec.rank == 0
    record = encode_point(step, _Clocks.now(), values, is_kept=is_kept)
    if len(record) > MAX_RECORD_BYTES:
        raise ArgumentValueError(
            f"a report of {len(values)} numbers has {len(record)} bytes; at most "
            f"{MAX_RECORD_BYTES} are taken: report statistics, and save the rest to a file"
        )
    if context.spec.rank == 0 and context.spec.keeps_checkpoints:
        context.metrics.keep_for_checkpoint(values)
    context.metrics.send(record)


def _checked_step(step: Any) -> int:
    if type(step) is not int:
        step = checked.integer("step", step)
    if abs(step) > MAX_STEP:
        raise ArgumentValueError(f"step={step}: it must be at most 2**53 ({MAX_STEP})")
    return step  # type: ignore[no-any-return]


def number_of(name: str, value: Any) -> float:
    """Return a number of any library as Python's, without importing that library."""
    if isinstance(value, (str, bytes, bytearray)):
        raise _not_a_number(name, value)
    if _is_on_gpu(value):
        notice(
            "metrics.gpu",
            f"metrics.report({name}=...) was given a tensor on a GPU, and waits for the GPU to "
            "have computed it; report every few steps if that costs time",
        )
    try:
        if not hasattr(value, "item") and callable(getattr(value, "numpy", None)):
            value = value.numpy()  # of TensorFlow
        number = float(value.item() if hasattr(value, "item") else value)
        if type(number) is float:  # in a tf.function it may be a tensor
            return number
    except OverflowError as error:
        raise ArgumentValueError(
            f"{name}={checked.shown(value)}: {error}; a metric is kept as a float: give its "
            "logarithm, say"
        ) from None
    except Exception:  # noqa: BLE001, S110 - it is somebody's object
        pass
    raise _not_a_number(name, value)


def _not_a_number(name: str, value: Any) -> ArgumentTypeError:
    shape = getattr(value, "shape", ())
    of_shape = f" of shape {tuple(shape)}" if shape else ""
    return ArgumentTypeError(
        f"{name}={checked.shown(value)}: a metric is a number, or an array or a tensor of one "
        f"number, got {type(value).__name__}{of_shape}; give its mean, say, and text to "
        "log_to_driver()"
    )


def _is_on_gpu(value: Any) -> bool:
    with contextlib.suppress(Exception):  # it is somebody's object
        if getattr(value, "is_cuda", False):
            return True
        device = getattr(value, "device", None)
        if isinstance(device, str):
            return "GPU" in device  # TensorFlow's /job:localhost/.../device:GPU:0
        return getattr(device, "platform", "cpu") in ("gpu", "cuda", "rocm")  # JAX
    return False


class Progress(Generic[_Item]):
    """A progress bar that the driver draws; made by :func:`progress`.

    It has the parts of tqdm's that training loops use.
    """

    def __init__(
        self,
        pipe: MetricsPipe,
        iterable: Iterable[_Item] | None,
        desc: str,
        total: int | None,
        *,
        initial: float = 0,
        disable: bool = False,
    ) -> None:
        self._pipe = pipe
        self._iterable = iterable
        self._initial = initial
        self._postfix = ""
        self.disable = disable
        self.desc = desc
        self.total = total
        self._begin()

    def _begin(self) -> None:
        self._number = next(_bar_numbers)
        self._began = _Clocks.now()
        self._has_ended = False
        self._next_count = self._next_postfix = 0.0
        self.n = self._initial
        self._report()

    def __iter__(self) -> Iterator[_Item]:
        """Iterate, and count; another time, from the beginning."""
        if self._has_ended:
            self._begin()
        try:
            for item in () if self._iterable is None else self._iterable:
                yield item
                self.update()
        finally:
            self.close()

    def __len__(self) -> int:
        """Return how many steps there are."""
        if self.total is None:
            raise TypeError("the length of this progress bar is not known: give total=")
        return self.total

    def __enter__(self) -> Progress[_Item]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # it was not made, or Python is leaving
            self.close()

    def update(self, n: float = 1) -> None:
        """Count so many steps; none once the bar has ended."""
        if self._has_ended:
            return
        self.n += n if type(n) is int else _count(n)
        if (now := _Clocks.monotonic()) >= self._next_count:
            self._next_count = now + BAR_SECONDS
            self._report()

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        """Change the text before the bar."""
        self.desc = _text(desc)
        self._report()

    set_description_str = set_description

    def set_postfix(
        self, ordered_dict: Mapping[str, Any] | None = None, refresh: bool = True, **values: Any
    ) -> None:
        """Show values behind the bar."""
        self.set_postfix_str(format_logs({**(ordered_dict or {}), **values}))

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Show a text behind the bar."""
        self._postfix = str(s)
        if (now := _Clocks.monotonic()) >= self._next_postfix:
            self._next_postfix = now + BAR_SECONDS
            self._report()

    def refresh(self) -> None:
        """Show the bar as it is now, after a change of ``n`` or ``total``."""
        self._report()

    def reset(self, total: float | None = None) -> None:
        """Begin anew."""
        self.close()
        self.total = self.total if total is None else _checked_total(total)
        self._begin()

    def close(self) -> None:
        """End the bar, as far as it got."""
        if not self._has_ended:
            self._has_ended = True
            self._report()

    def _report(self) -> None:
        if self.disable:
            return
        state = Bar(
            number=self._number,
            began=self._began,
            time=_Clocks.now(),
            description=self.desc,
            done=_whole(self.n),
            total=None if self.total is None else _whole(self.total),
            postfix=self._postfix,
            has_ended=self._has_ended,
        )
        self._pipe.send(encode_bar(state))


def _count(n: Any) -> float:
    """Return a number of steps that a library counted."""
    try:
        return operator.index(n)
    except Exception:  # noqa: BLE001 - it is somebody's object
        return number_of("n", n)


def _whole(n: float) -> int:
    return int(min(max(0, n), MAX_STEP))  # 0 for NaN, because it comes first


def _text(desc: Any) -> str:
    return "" if desc is None else str(desc)


def _checked_total(total: Any) -> int | None:
    """Check a number of steps, which tqdm takes as a float, too."""
    found = checked.number("total", total)
    if not found >= 0:
        raise ArgumentValueError(f"total={checked.shown(total)}: it must be at least 0")
    return None if math.isinf(found) else math.ceil(found)


def progress(
    iterable: Iterable[_Item] | None = None,
    desc: str | None = None,
    total: float | None = None,
    **options: Any,
) -> Progress[_Item]:
    """Iterate over something, and show how far it is; called as ``tqdm.tqdm`` is.

    In a run the driver draws the bar of rank 0, whatever the driver's log verbosity is; of a
    nested one the innermost, too. Outside a run it is tqdm's own.

    Parameters
    ----------
    iterable
        What to iterate over; None to call ``update()`` on what is returned.
    desc
        A text before the bar.
    total
        How many steps there are; None takes ``len(iterable)``, where there is one.
    **options
        Others of ``tqdm.tqdm``, such as ``leave`` and ``unit``, for the bar outside a run. In a run
        ``disable`` and ``initial`` count.

    Returns
    -------
    Progress
        The iterable, with tqdm's ``update(n)``, ``set_description(text)``, ``set_postfix(...)``,
        ``refresh()``, ``reset()`` and ``close()``; also a context manager.

    Raises
    ------
    ArgumentTypeError
        If `iterable` is none, `total` is not a number, or tqdm has no such option.
    ArgumentValueError
        If `total` is negative.

    Examples
    --------
    >>> for epoch in progress(range(3), desc="epoch"):  # doctest: +SKIP
    ...     train_one_epoch()
    """
    # not iter(): that of a DataLoader starts its workers
    if not (iterable is None or hasattr(iterable, "__iter__") or hasattr(iterable, "__getitem__")):
        raise ArgumentTypeError(
            f"progress({checked.shown(iterable)}): give something to iterate over, range(...) say"
        )
    if unknown := options.keys() - TQDM_OPTIONS:
        raise ArgumentTypeError(
            f"progress() has no option {sorted(unknown)[0]!r}: it takes desc, total and tqdm's own"
        )
    if total is not None:
        total = _checked_total(total)
    elif iterable is not None:
        with contextlib.suppress(Exception):  # as of a generator, or of a stream
            total = len(iterable)  # type: ignore[arg-type]
    context = current_context()
    if context is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where ipywidgets is missing
            from tqdm.auto import tqdm

        outside: Progress[_Item] = tqdm(iterable, desc=desc, total=total, **options)
        return outside
    initial = _count(options.get("initial", 0))
    is_off = bool(options.get("disable"))
    whole = None if total is None else _whole(total)
    return Progress(context.metrics, iterable, _text(desc), whole, initial=initial, disable=is_off)
