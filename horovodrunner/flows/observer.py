"""What follows a run on the driver, beside the run itself. Runs in: the driver."""

from __future__ import annotations

import logging
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from horovodrunner.formatting import in_one_line
from horovodrunner.wire.events import Handlers

__all__ = ["Observer", "Observers", "RunFacts"]

_MAX_LABEL = 100

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before it is launched."""

    run_id: str
    np: int
    """As it was given: negative for ranks on the driver, 0 for all slots."""
    main: str
    """The name of the training function."""
    arguments: Mapping[str, Any]
    """What main is called with."""
    options: Mapping[str, Any]
    """The options of HorovodRunner that are not their defaults."""
    began: float
    """Seconds since the epoch."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The variables that reach the ranks from the driver."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Where files that Horovod writes are put on the driver, by the variable that names each."""
    name: str = ""
    """What the user calls the run, in one line."""
    secret_variables: frozenset[str] = frozenset()
    """Names of those in `environment` whose values nothing may show, whatever they are."""

    @property
    def label(self) -> str:
        """The run's id and its name, as a file may be called.

        >>> RunFacts("1f0c22ab", 2, "train", {}, {}, began=0, name="lr = 0.1/b").label
        '1f0c22ab-lr-0.1-b'
        """
        words = re.findall(r"[\w.+-]+", self.name, re.ASCII)
        return "-".join([self.run_id, *words])[:_MAX_LABEL]

    def secret_values(self) -> list[str]:
        """Return the values that nothing may show."""
        return [self.environment[name] for name in self.secret_variables]


class Observer:
    """Takes events of a run; what it raises ends its own observing, and never the run.

    Handlers are called in the thread that reads events, and must not wait; :meth:`begin` and
    :meth:`end` in the one that called ``run()``.
    """

    title = "observing the run"
    wants_usage = False
    """Whether ``Usage`` events are to come."""
    wants_output = False
    """Whether all output of the ranks is to come, as ``Lines``, even if the cell shows none."""
    wants_profiles = False
    """Whether ``Profile`` events are to come."""
    handlers: Handlers = types.MappingProxyType({})

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that the ranks of the attempt that has begun are to have."""
        return {}

    def begin(self, attempt: int) -> None:
        """Note that an attempt is launched, counted from 1."""

    def end(self, error: BaseException | None) -> None:
        """Note how the run ended, after the last event of the last attempt."""


class Observers:
    """Calls all observers of a run, and leaves out one that has failed."""

    def __init__(self, observers: Sequence[Observer], note: Callable[[str], None]) -> None:
        self._note = note
        self._failed: set[Observer] = set()
        self._observers = observers
        self.wants_usage = any(each.wants_usage for each in observers)
        self.wants_profiles = any(each.wants_profiles for each in observers)
        self.wants_output = any(each.wants_output for each in observers)
        self.handlers = [
            {kind: self._guarded(each, handler) for kind, handler in each.handlers.items()}
            for each in observers
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the ranks of the attempt that has begun are to have."""
        found: dict[str, str] = {}
        for each in self._observers:
            self._guarded(each, lambda each: found.update(each.environment))(each)
        return found

    def begin(self, attempt: int) -> None:
        """Note that an attempt is launched."""
        for each in self._observers:
            self._guarded(each, each.begin)(attempt)

    def end(self, error: BaseException | None) -> None:
        """Note how the run ended."""
        for each in self._observers:
            self._guarded(each, each.end)(error)

    def _guarded(self, observer: Observer, act: Callable[[Any], object]) -> Callable[[Any], None]:
        def call(argument: Any) -> None:
            if observer in self._failed:
                return
            try:
                act(argument)
            except Exception as error:
                self._failed.add(observer)
                _logger.debug("%s failed", observer.title, exc_info=error)
                self._note(f"{observer.title} ends here, the run goes on: {in_one_line(error)}")

        return call
