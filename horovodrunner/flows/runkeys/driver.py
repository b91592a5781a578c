"""A run under a key: whether it is to be done, waited for, or was done before. Runs in: the driver.

No clocks of different machines are compared. Whoever waits looks whether the other's beat changes.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, ClassVar

from horovodrunner.errors import (
    ArgumentValueError,
    ConfigurationError,
    PayloadError,
    RunSupersededError,
    StartTimeoutError,
)
from horovodrunner.flows.call.record import RunRecord, changes
from horovodrunner.flows.going import GoingRun
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.outcome.driver import open_outcome, open_result
from horovodrunner.flows.outcome.outcome import Outcome, Success
from horovodrunner.flows.results.sequence import RankResults
from horovodrunner.flows.runkeys.place import (
    Epoch,
    KeyPlace,
    StoredValue,
    has_ended,
    this_process,
)
from horovodrunner.formatting import format_bytes, in_one_line
from horovodrunner.pickling.buffers import BufferedPickle

__all__ = ["REFUSE", "RERUN", "KeyRequest", "KeyedRun", "keyed_run"]

REFUSE, RERUN = "refuse", "rerun"

BEAT_SECONDS = 5.0
"""How often a driver shows that it lives, and looks whether another one has taken over."""

SILENT_SECONDS = 60.0
"""A driver on another machine, or one that was stopped, is taken for dead after so long."""

LOOK_SECONDS = 0.5
"""How often a driver that waits looks."""


@dataclass(frozen=True)
class KeyRequest:
    """What the user wants to be done once."""

    key: str
    run_dir: str
    record: RunRecord
    """What it is called with, exactly."""
    on_change: str = REFUSE
    start_timeout: float = 600.0

    @property
    def title(self) -> str:
        shown = self.key if len(self.key) <= 60 else f"{self.key[:59]}…"
        return f"the run {shown!r}"


@contextlib.contextmanager
def keyed_run(request: KeyRequest, run: GoingRun) -> Iterator[KeyedRun]:
    """Wait until nobody else does the run, and keep others from it, unless it was done."""
    keyed = KeyedRun(request, run)
    try:
        try:
            keyed.begin()
        except StartTimeoutError:
            raise
        except OSError as error:
            raise ConfigurationError(
                f"run_key={request.key!r}: what is known of the run in {keyed.place.location} "
                f"cannot be read or written: {in_one_line(error)}. Choose a run_dir that this "
                "process may read and write"
            ) from error
        yield keyed
    except BaseException as error:
        keyed.end(error)
        raise
    else:
        keyed.end(None)


class KeyedRun:
    """The run of a key, as this driver finds it and leaves it."""

    _held: ClassVar[set[str]] = set()
    """The tokens of the epochs that this process is."""

    def __init__(self, request: KeyRequest, run: GoingRun) -> None:
        self._request = request
        self._run = run
        self._console = Console(run=run)
        self.place = KeyPlace(request.run_dir, request.key)
        self.epoch = Epoch(0)
        """What this driver is, if the run is to be done; the one that did it otherwise."""
        self.stored: StoredValue | None = None
        self._found: Outcome | None = None
        self._has_noted_size = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="horovodrunner-key", daemon=True)

    @property
    def is_done(self) -> bool:
        """Whether the run was done before."""
        return self._found is not None

    def begin(self) -> None:
        """Find the value, or begin an epoch; wait for another driver that lives."""
        deadline = time.monotonic() + self._request.start_timeout
        watch = _Watch()
        while True:
            self._run.check()
            found = self.place.newest()
            newest = found[0] if found else Epoch(0)
            known = found[-1] if found else newest
            is_another = self._is_another_call(known)
            value = self.place.value(newest.number) if found else None
            if value is not None and not is_another and self._take(newest, value):
                return
            if value is not None or not found or self._is_over(newest, watch):
                if self._claim(newest, known, is_another=is_another):
                    return
                continue
            if time.monotonic() >= deadline:
                raise StartTimeoutError(
                    f"{self._request.title} is held by {newest.describe()}, which has begun it "
                    f"{_when(newest.began)} and did not end within start_timeout="
                    f"{self._request.start_timeout:g} s: wait for it, end that process, or raise "
                    "start_timeout"
                )
            self._note_wait(newest, watch)
            self._console.show(LOOK_SECONDS)

    def value(self) -> Any:
        """Return the value of a run that was done before, unpickled."""
        return open_outcome(self._found or Outcome())

    def results(self) -> RankResults:
        """Return what all ranks of a run that was done before returned, if that was kept."""
        stored = self.stored
        if stored is None or stored.ranks != len(stored.others) + 1:
            why = "the run was done before, and rank 0's value alone is stored"
            return RankResults(why_none=why)

        def open_rank(rank: int) -> Any:
            try:
                return open_result(self.place.load(stored, rank), rank)
            except ValueError as error:
                raise PayloadError(
                    f"the stored value of rank {rank} is lost: {self.place.path_of(stored, rank)} "
                    f"{error}. Delete the values of {self._request.title} in {self.place.location} "
                    "to do it again"
                ) from error

        return RankResults(stored.ranks, open_rank)

    def keep(
        self,
        outcome: Outcome,
        others: Iterable[BufferedPickle],
        record: str | None,
        console: Console,
    ) -> Outcome:
        """Store what ranks returned, if rank 0 did, with the name of the run's record.

        Raises a RunSupersededError if another driver has begun meanwhile.
        """
        if outcome.success is None or (pickled := outcome.success.result) is None:
            return outcome
        name = (record or "").rpartition("/")[2]
        number, ranks = self.epoch.number, self._request.record.size
        try:
            value = self.place.store(
                number, pickled, others, ranks=ranks, record=name, check=self.check
            )
            self.check()  # whoever has begun in between has not seen it
            self.stored = value
        except OSError as error:
            console.note(
                f"the value of {self._request.title} ({format_bytes(pickled.size)}) could not be "
                f"stored in {self.place.location}: {in_one_line(error)}. It is returned all the "
                "same; the next run with this key is done again from its checkpoint"
            )
        else:
            with contextlib.suppress(OSError):
                self.place.tidy(number)
        return outcome

    def check(self) -> None:
        """Raise a RunSupersededError, and stop the run, if another driver has taken over."""
        if self.place.newest_number() <= self.epoch.number:
            return
        newer = self.place.newest()[0]
        when = f" {_when(newer.began)}" if newer.is_known else ""
        error = RunSupersededError(
            f"another driver, {newer.describe()}, has taken over {self._request.title}{when}, "
            "because nothing was heard of this one: this one's value and its later checkpoints are "
            "not kept. Call run() with the same key to wait for that one's value",
            host=newer.host,
            pid=newer.pid,
        )
        self._run.stop(error)
        raise error

    def end(self, error: BaseException | None) -> None:
        """Let others begin; raise a RunSupersededError where that is why the run has failed."""
        if self.is_done or not self.epoch.token:
            return
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join(BEAT_SECONDS)
        try:
            if error is not None and not isinstance(error, RunSupersededError):
                with contextlib.suppress(OSError):
                    try:
                        self.check()
                    except RunSupersededError as superseded:
                        raise superseded from error
            if self.stored is None:
                # the error's text may have a secret in it; the record has it without
                how = "its value was not stored" if error is None else type(error).__name__
                with contextlib.suppress(OSError):
                    self.place.end(self.epoch.number, how)
        finally:
            self._held.discard(self.epoch.token)

    def _is_another_call(self, known: Epoch) -> bool:
        """Compare what the run was called with; refuse another call, unless that is wanted."""
        before = known.record
        if before is None:
            return False
        record = self._request.record
        found = changes(replace(before, size=record.size), record)
        if found and self._request.on_change == REFUSE:
            raise ArgumentValueError(
                f"run_key={self._request.key!r} stands for another run: {'; '.join(found)}. Use "
                'another key, or on_change="rerun" to start anew under this one'
            )
        if not found and before.size != record.size and not self._has_noted_size:
            self._has_noted_size = True
            self._note(
                f"{self._request.title} had {before.size or 'all'} ranks before, and has "
                f"{record.size or 'all'} now"
            )
        return bool(found)

    def _take(self, newest: Epoch, value: StoredValue) -> bool:
        """Take a value that was stored, if it is sound."""
        try:
            pickled = self.place.load(value)
        except ValueError as error:
            self._note(
                f"the value of {self._request.title}, {self.place.path_of(value)}, {error}: the "
                "run is done again, from its checkpoint"
            )
            return False
        self._found = Outcome(success=Success(0, (value.size,), pickled))
        self.stored, self.epoch = value, newest
        self._note(
            f"{self._request.title} has ended {_when(value.ended)}: nothing is launched, and its "
            f"value is from {self._record_of(value)}"
        )
        return True

    def _record_of(self, value: StoredValue) -> str:
        return f"the record {value.record}" if value.record else self.place.path_of(value)

    def _claim(self, newest: Epoch, known: Epoch, *, is_another: bool) -> bool:
        """Begin the next epoch; False if another driver has."""
        generation = "" if is_another else known.generation
        epoch = self.place.begin(
            newest.number + 1,
            self._request.key,
            generation or secrets.token_hex(4),
            self._request.record,
        )
        if epoch is None:
            return False
        self._held.add(epoch.token)
        self.epoch = epoch
        try:
            self.place.beat(epoch.number, "0")
            late = None if is_another or not newest.number else self.place.value(newest.number)
            if late is not None and self._take(epoch, late):
                # stored between the look and the claim
                self.place.confirm(epoch.number, late)
                self._held.discard(epoch.token)
                return True
        except BaseException:
            self._held.discard(epoch.token)
            raise
        self._thread.start()
        return True

    def _is_over(self, epoch: Epoch, watch: _Watch) -> bool:
        """Whether an epoch has ended, or nothing is heard of its driver any more."""
        if self.place.has_ended(epoch.number):
            return True
        if epoch.process == this_process():
            return epoch.token not in self._held
        if has_ended(epoch):
            return True
        return watch.silent_seconds(epoch, self.place.last_beat(epoch.number)) >= SILENT_SECONDS

    def _note_wait(self, holder: Epoch, watch: _Watch) -> None:
        if watch.is_new(holder):
            self._note(
                f"{self._request.title} is held by {holder.describe()}, which has begun it "
                f"{_when(holder.began)}; waiting for its value, at most "
                f"{self._request.start_timeout:g} s"
            )

    def _note(self, text: str) -> None:
        self._console.note(text)
        self._console.show(0)

    def _beat(self) -> None:
        count = 0
        while not self._ending.wait(BEAT_SECONDS):
            count += 1
            # a place that cannot be reached now may be back the next time
            with contextlib.suppress(OSError):
                self.place.beat(self.epoch.number, str(count))
            try:
                self.check()
            except RunSupersededError:
                return
            except OSError:
                continue


class _Watch:
    """Watches the beat of whoever holds the key."""

    def __init__(self) -> None:
        self._token = self._beat = b""
        self._since = time.monotonic()
        self._noted = 0

    def silent_seconds(self, epoch: Epoch, beat: bytes) -> float:
        """Return since when the beat has not changed, as far as it was watched."""
        token = f"{epoch.number} {epoch.token}".encode()
        if (token, beat) != (self._token, self._beat):
            self._token, self._beat, self._since = token, beat, time.monotonic()
        return time.monotonic() - self._since

    def is_new(self, epoch: Epoch) -> bool:
        """Return whether this holder was not told of yet."""
        is_new, self._noted = epoch.number != self._noted, epoch.number
        return is_new


def _when(text: str) -> str:
    """Write a time for people.

    >>> _when("2026-11-27T02:15:00+00:00")
    'on 2026-11-27 at 02:15 UTC'
    """
    try:
        return f"on {datetime.fromisoformat(text):%Y-%m-%d at %H:%M} UTC"
    except ValueError:
        return "at an unknown time"
