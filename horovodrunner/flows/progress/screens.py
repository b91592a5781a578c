"""Where a run is shown: a notebook, a terminal, or a log. Runs in: the driver."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from tqdm import tqdm

from horovodrunner.flows.logs.showing import show_text
from horovodrunner.flows.metrics.history import first_in_words
from horovodrunner.flows.progress.html import in_html
from horovodrunner.flows.progress.view import RunState, in_words
from horovodrunner.formatting import printable

__all__ = ["LogScreen", "NotebookScreen", "Screen", "TerminalScreen", "find_screen"]


class Screen(Protocol):
    """Shows one run; all of it is called in the thread that called ``run()``."""

    pause_seconds: float
    """So long a state is left as it is."""

    def draw(self, run: RunState, *, is_final: bool) -> None:
        """Show the run's state."""

    def beside(self) -> contextlib.AbstractContextManager[object]:
        """Make room for lines of text."""


def find_screen() -> Screen:
    """Return what fits this process: a kernel's area, a terminal's bars, or lines."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if getattr(shell, "kernel", None) is not None:
        return NotebookScreen()
    with contextlib.suppress(Exception):  # it is the user's object
        if sys.stderr.isatty():
            return TerminalScreen()
    return LogScreen()


class NotebookScreen:
    """An area below the cell, which is updated in place; the last state is what is saved."""

    pause_seconds = 0.5

    def __init__(self) -> None:
        self._handle: Any = None

    def draw(self, run: RunState, *, is_final: bool) -> None:
        from IPython.display import display

        texts = {"text/html": in_html(run), "text/plain": in_words(run)}
        if self._handle is None:
            self._handle = display(texts, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(texts, raw=True)

    def beside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


class TerminalScreen:
    """tqdm's bars, at the bottom; from the first thing that main reports.

    Those of several runs at once are one below the other.
    """

    pause_seconds = 0.5

    _lock = threading.Lock()
    _all: ClassVar[list[Any]] = []
    """The bars of all runs, from top to bottom."""

    def __init__(self) -> None:
        self._bars: dict[int, Any] = {}

    def draw(self, run: RunState, *, is_final: bool) -> None:
        if not run.has_news:
            return
        shown = {bar.number: bar for bar in run.bars}
        title = f"{run.title} " if run.title else ""
        metrics = "" if run.history.last is None else first_in_words(run.history.last.values)
        with self._lock:
            self._close([number for number in self._bars if number not in shown])
            if not shown:
                bar = self._bar(0, None, "{desc}")
                step = run.history.last.step if run.history.last else 0
                bar.set_description_str(f"{title}{run.headline}; step {step}: {metrics}")
            for place, state in enumerate(shown.values()):
                bar = self._bar(state.number, state.total)
                bar.n, bar.total = state.done, state.total
                bar.start_t = min(bar.start_t, time.time() - (state.time - state.began))
                description = f"{title}{printable(state.description)}"
                bar.set_description_str(description, refresh=False)
                postfix = [printable(state.postfix)] if state.postfix else []
                bar.set_postfix_str(", ".join([*postfix, *([metrics] if not place else [])]))
            if is_final:
                self._close(list(reversed(self._bars)))

    def _bar(self, number: int, total: int | None, bar_format: str | None = None) -> Any:
        if number not in self._bars:
            self._bars[number] = tqdm(
                total=total,
                position=len(self._all),
                leave=not self._bars,
                bar_format=bar_format,
                dynamic_ncols=True,
                delay=1e-9,  # nothing before the first state
            )
            self._all.append(self._bars[number])
        return self._bars[number]

    def _close(self, numbers: list[int]) -> None:
        if not numbers:
            return
        with self._room():
            for number in numbers:
                bar = self._bars.pop(number)
                self._all.remove(bar)
                bar.close()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        with self._lock, self._room():
            yield

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Take the bars of all runs away, and draw those that are left below what was written."""
        for bar in self._all:
            bar.clear(nolock=True)
        try:
            yield
        finally:
            for place, bar in enumerate(self._all):
                bar.pos = -place
                bar.refresh(nolock=True)


class LogScreen:
    """A line every 30 seconds, of a run that has reported something new."""

    pause_seconds = 30.0

    def __init__(self) -> None:
        self._last = ""

    def draw(self, run: RunState, *, is_final: bool) -> None:
        if not run.has_news or is_final:
            return
        _, *lines = in_words(run).splitlines()
        text = "; ".join(line.strip() for line in lines)
        if text != self._last:
            self._last = text
            title = f"{run.title} " if run.title else ""
            show_text(f"{title}HorovodRunner: {text}\n")

    def beside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()
