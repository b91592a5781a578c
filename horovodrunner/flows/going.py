"""A run that is going: what it is called, and whether it is to stop. Runs in: the driver."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import ClassVar

from horovodrunner.wire.events import SaveWanted

__all__ = ["GoingRun"]

_END = "end"


class GoingRun:
    """A run from the call of ``run()`` to its end; :meth:`stop` may be called from anywhere."""

    _all: ClassVar[set[GoingRun]] = set()
    _lock = threading.Lock()

    def __init__(self, run_id: str, name: str = "") -> None:
        self.run_id = run_id
        self.name = name
        # Whoever comes first decides how the run ends: setdefault() is atomic, and a handler of
        # signals may call it, which must not wait for a lock that its own thread has.
        self._end: dict[str, BaseException | None] = {}
        self._end_with_main: BaseException | None = None
        self._wishes: deque[SaveWanted] = deque()
        self._send_wish: Callable[[SaveWanted], None] | None = None
        self.is_closed = False
        """Whether nothing can stop it any more."""

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        """Be one of the runs that this process has at the moment."""
        with self._lock:
            self._all.add(self)
        try:
            yield
        finally:
            self.close()
            with self._lock:
                self._all.discard(self)

    @property
    def label(self) -> str:
        """What its lines begin with: its name, or its id while there are others; else nothing."""
        return self.name or (self.run_id if len(self._all) > 1 else "")

    @property
    def title(self) -> str:
        """What other runs call it.

        >>> GoingRun("1f0c22ab", "lr=0.1").title
        "run 'lr=0.1' (1f0c22ab)"
        """
        return f"run {self.name!r} ({self.run_id})" if self.name else f"run {self.run_id}"

    def stop(self, error: BaseException) -> bool:
        """Have the run's own thread raise an error; return False if the run has ended."""
        return self._end.setdefault(_END, error) is not None

    def stop_with_main(self, error: BaseException) -> None:
        """Have the run's own thread raise an error when main has ended, however it did."""
        self._end_with_main = error

    def main_has_ended(self) -> None:
        """Stop the run if it is to be stopped by now."""
        if self._end_with_main is not None:
            self.stop(self._end_with_main)

    @property
    def has_ranks(self) -> bool:
        """Whether its ranks run, or are being launched."""
        return self._send_wish is not None

    def want_save(self, wanted: SaveWanted) -> bool:
        """Have all ranks save, as soon as they run; return False if the run has ended."""
        if self.is_closed:
            return False
        self._wishes.append(wanted)
        self._send_wishes()
        return True

    @contextlib.contextmanager
    def wishes_go_to(self, send: Callable[[SaveWanted], None]) -> Iterator[None]:
        """Send what was wanted, and will be, to the ranks."""
        self._send_wish = send
        self._send_wishes()
        try:
            yield
        finally:
            self._send_wish = None

    def _send_wishes(self) -> None:
        with contextlib.suppress(IndexError):  # another thread has sent it
            while (send := self._send_wish) is not None and self._wishes:
                send(self._wishes.popleft())

    def check(self) -> None:
        """Raise what the run was stopped with, as long as it is not ending."""
        error = self._end.get(_END)
        if error is not None and not self.is_closed:
            raise error

    def close(self) -> BaseException | None:
        """Let nothing stop the run any more; return what has."""
        error = self._end.setdefault(_END, None)
        self.is_closed = True
        return error
