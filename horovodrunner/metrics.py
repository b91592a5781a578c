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
import time
from collections.abc import Iterable, Iterator
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

_Item = TypeVar("_Item")
_now, _monotonic = time.time, time.monotonic  # main may put clocks of its own in their place
_bar_numbers = itertools.count(1)
_last_step = -1


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
        tensors of one number, too. NaN and infinities are kept as they are.

    Raises
    ------
    ArgumentTypeError
        If a value is not a number, or step is not an int.
    ArgumentValueError
        If `ranks` is another word, or the numbers are too many (128 KiB as JSON).

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
        if kind is not float and kind is not int:
            values[name] = _number(name, value)
    context = current_context()
    if context is None:
        return
    is_kept = ranks == "all" or context.spec.rank == 0
    record = encode_point(step, _now(), values, is_kept=is_kept)
    if len(record) > MAX_RECORD_BYTES:
        raise ArgumentValueError(
            f"a report of {len(values)} numbers has {len(record)} bytes; at most "
            f"{MAX_RECORD_BYTES} are taken: report statistics, and save the rest to a file"
        )
    context.metrics.send(record)


def _checked_step(step: Any) -> int:
    if type(step) is not int:
        step = checked.integer("step", step)
    if abs(step) > MAX_STEP:
        raise ArgumentValueError(f"step={step}: it must be at most 2**53 ({MAX_STEP})")
    return step  # type: ignore[no-any-return]


def _number(name: str, value: Any) -> float:
    """Return a number of any library as Python's, without importing that library."""
    if isinstance(value, (str, bytes)):
        raise _not_a_number(name, value)
    if _is_on_gpu(value):
        notice(
            "metrics.gpu",
            f"metrics.report({name}=...) was given a tensor on a GPU, and waits for the GPU to "
            "have computed it; report every few steps if that costs time",
        )
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except Exception:  # noqa: BLE001 - it is somebody's object
        raise _not_a_number(name, value) from None


def is_number(value: Any) -> bool:
    """Return whether :func:`report` takes a value."""
    shape = getattr(value, "shape", ())
    size_is_one = all(length == 1 for length in shape)
    return size_is_one and not isinstance(value, (str, bytes)) and hasattr(value, "__float__")


def _not_a_number(name: str, value: Any) -> ArgumentTypeError:
    shape = getattr(value, "shape", ())
    of_shape = f" of shape {tuple(shape)}" if shape else ""
    return ArgumentTypeError(
        f"{name}={checked.shown(value)}: a metric is a number, or an array or a tensor of one "
        f"number, got {type(value).__name__}{of_shape}; give its mean, say, and text to "
        "log_to_driver()"
    )


def _is_on_gpu(value: Any) -> bool:
    if getattr(value, "is_cuda", False):
        return True
    device = getattr(value, "device", None)
    if isinstance(device, str):
        return "GPU" in device  # TensorFlow's /job:localhost/.../device:GPU:0
    return getattr(device, "platform", "cpu") in ("gpu", "cuda", "rocm")  # JAX


class Progress(Generic[_Item]):
    """A progress bar that the driver draws; made by :func:`progress`.

    It has the parts of tqdm's that training loops use.
    """

    def __init__(
        self, pipe: MetricsPipe, iterable: Iterable[_Item] | None, desc: str, total: int | None
    ) -> None:
        self._pipe = pipe
        self._iterable = iterable
        self._number = next(_bar_numbers)
        self._began = _now()
        self._has_ended = False
        self._postfix = ""
        self._next_report = 0.0
        self.desc = desc
        self.n = 0
        self.total = total
        self._report()

    def __iter__(self) -> Iterator[_Item]:
        """Iterate, and count."""
        try:
            for item in self._iterable or ():
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

    def update(self, n: int = 1) -> None:
        """Count so many steps."""
        self.n += n
        if _monotonic() >= self._next_report:
            self._report()

    def set_description(self, desc: str = "") -> None:
        """Change the text before the bar."""
        self.desc = str(desc)
        self._report()

    def set_postfix(self, **values: Any) -> None:
        """Show values behind the bar."""
        self._postfix = format_logs(values)
        if _monotonic() >= self._next_report:
            self._report()

    def close(self) -> None:
        """End the bar, as far as it got."""
        if not self._has_ended:
            self._has_ended = True
            self._report()

    def _report(self) -> None:
        self._next_report = _monotonic() + BAR_SECONDS
        state = Bar(
            number=self._number,
            began=self._began,
            time=_now(),
            description=self.desc,
            done=self.n,
            total=self.total,
            postfix=self._postfix,
            has_ended=self._has_ended,
        )
        self._pipe.send(encode_bar(state))


def progress(
    iterable: Iterable[_Item] | None = None, desc: str | None = None, total: int | None = None
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

    Returns
    -------
    Progress
        The iterable, with ``update(n)``, ``set_description(text)``, ``set_postfix(**values)`` and
        ``close()``; also a context manager.

    Raises
    ------
    ArgumentTypeError
        If `iterable` is none, or `total` is not an int.

    Examples
    --------
    >>> for epoch in progress(range(3), desc="epoch"):  # doctest: +SKIP
    ...     train_one_epoch()
    """
    try:
        iter(() if iterable is None else iterable)
    except TypeError:
        raise ArgumentTypeError(
            f"progress({checked.shown(iterable)}): give something to iterate over, range(...) say"
        ) from None
    if total is not None:
        total = checked.integer("total", total, at_least=0)
    else:
        with contextlib.suppress(TypeError, AttributeError):  # as of a generator
            total = len(iterable)  # type: ignore[arg-type]
    context = current_context()
    if context is None:
        from tqdm.auto import tqdm

        bar: Progress[_Item] = tqdm(iterable, desc=desc, total=total)
        return bar
    return Progress(context.metrics, iterable, desc or "", total)
