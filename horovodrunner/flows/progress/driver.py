"""Follows a run for whoever watches it. Runs in: the driver."""

from __future__ import annotations

import contextlib
import time

from horovodrunner.errors import RunStoppedError
from horovodrunner.flows.going import GoingRun
from horovodrunner.flows.metrics.driver import MetricsRecorder
from horovodrunner.flows.metrics.history import History
from horovodrunner.flows.observer import Observer
from horovodrunner.flows.outcome.outcome import FailureKind, Outcome
from horovodrunner.flows.progress.screens import Screen
from horovodrunner.flows.progress.view import FAILED, RUNNING, STOPPED, SUCCEEDED, RunState
from horovodrunner.wire.events import CheckpointStored, Failed, Placed, Points, RankStates

__all__ = ["ProgressView"]

LOST = "lost"
_FAILED_STATES = (FAILED, LOST)

TICK_SECONDS = 5.0
"""The time is drawn so often when nothing else has changed."""


class ProgressView(Observer):
    """Draws the run's state when it has changed, in the thread that shows the run's output."""

    title = "showing the run's progress"

    def __init__(
        self,
        screen: Screen,
        recorder: MetricsRecorder,
        history: History,
        attempts: int,
        *,
        run: GoingRun | None = None,
    ) -> None:
        self._run = run or GoingRun("")
        self._screen = screen
        self._recorder = recorder
        self._history = history
        self._attempts = attempts
        self._attempt = 1
        self._ranks: tuple[str, ...] = ()
        self._hosts = 1
        self._checkpoint: int | None = None
        self._began = time.monotonic()
        self._has_changed = False
        self._has_ended = False
        self._drawn_at = 0.0
        self.handlers = {
            Points: self._change,
            Placed: self._take_placement,
            RankStates: self._take_states,
            CheckpointStored: self._take_checkpoint,
            Failed: self._take_failure,
        }

    def begin(self, attempt: int) -> None:
        self._attempt = attempt
        self._ranks = ()
        self._has_changed = True

    def end(self, error: BaseException | None) -> None:
        state = SUCCEEDED if error is None else STOPPED
        if isinstance(error, Exception) and not isinstance(error, RunStoppedError):
            state = FAILED
        cause = (str(error).splitlines() or [type(error).__name__])[0] if error else ""
        known = {*_FAILED_STATES, "ended"} if error else set()
        self._ranks = tuple(
            each if each in known else "stopped" if error else "ended" for each in self._ranks
        )
        self._has_ended = True
        self._screen.draw(self._state(state, cause), is_final=True)

    def is_due(self) -> bool:
        """Return whether there is something new to draw; there is nothing after the end."""
        if self._has_ended:
            return False
        since = time.monotonic() - self._drawn_at
        pause = self._screen.pause_seconds
        return since >= (pause if self._has_changed else max(pause, TICK_SECONDS))

    def draw(self) -> None:
        """Draw the run's state."""
        self._has_changed = False
        self._drawn_at = time.monotonic()
        self._screen.draw(self._state(RUNNING), is_final=False)

    def beside(self) -> contextlib.AbstractContextManager[object]:
        """Make room for lines of text."""
        return self._screen.beside()

    def _state(self, state: str, cause: str = "") -> RunState:
        return RunState(
            state=state,
            seconds=time.monotonic() - self._began,
            bars=tuple(self._recorder.bars.get(0, {}).values()),
            ranks=self._ranks,
            hosts=self._hosts,
            history=self._history,
            attempt=self._attempt,
            attempts=self._attempts,
            checkpoint=self._checkpoint,
            cause=cause,
            title=self._run.label,
        )

    def _change(self, event: object) -> None:
        self._has_changed = True

    def _take_placement(self, event: Placed) -> None:
        self._hosts = len({host for _, _, host in event.ranks})
        self._ranks = ("starting",) * len(event.ranks)
        self._has_changed = True

    def _take_states(self, event: RankStates) -> None:
        if len(self._ranks) == len(event.states):  # what ended a rank is known better here
            self._ranks = tuple(
                known if known in _FAILED_STATES else told
                for known, told in zip(self._ranks, event.states, strict=True)
            )
        else:
            self._ranks = event.states
        self._has_changed = True

    def _take_checkpoint(self, event: CheckpointStored) -> None:
        self._checkpoint = event.step
        self._has_changed = True

    def _take_failure(self, event: Failed) -> None:
        failure = Outcome.from_bytes(event.outcome).failure
        if failure is None or failure.rank is None or failure.rank >= len(self._ranks):
            return
        states = list(self._ranks)
        states[failure.rank] = LOST if failure.kind is FailureKind.LOST else FAILED
        self._ranks = tuple(states)
        self._has_changed = True
