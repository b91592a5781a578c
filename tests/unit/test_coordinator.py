"""Which failure is the cause, and when the others are stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from horovodrunner.flows.telemetry.phases import Phase
from horovodrunner.placement.topology import Slot
from horovodrunner.processes.task.coordinator import Coordinator
from horovodrunner.wire.job import Failure, Outcome, Success


class Driver:
    """Remembers what the driver is told."""

    def __init__(self) -> None:
        self.shown: list[bytes] = []
        self.notes: list[str] = []

    def lines(self, lines: bytes) -> None:
        self.shown.append(lines)

    def message(self, rank: int, message: bytes) -> None:
        self.shown.append(f"message of {rank}: ".encode() + message)

    def note(self, text: str, *, routine: bool = False) -> None:
        self.notes.append(text)

    def placed(self, slots: Sequence[Slot]) -> None:
        pass

    def failed(self, outcome: Outcome) -> None:
        pass

    def phases(self, phases: Sequence[Phase]) -> None:
        pass

    def storing(self) -> None:
        pass

    async def close(self) -> None:
        pass


def slots(size: int) -> list[Slot]:
    same: dict[str, Any] = {"size": size, "local_size": size, "cross_rank": 0, "cross_size": 1}
    where: dict[str, Any] = {
        "host": "h",
        "host_id": "h-1",
        "address": "10.0.0.1",
        "interface": "eth0",
    }
    return [
        Slot(partition=r, rank=r, local_rank=r, host_index=0, **same, **where) for r in range(size)
    ]


def coordinator(size: int) -> tuple[Coordinator, Driver, list[bytes]]:
    driver = Driver()
    log: list[bytes] = []
    return Coordinator(slots(size), driver, log.append), driver, log


def failure(rank: int, summary: str, after_peer_loss: bool = False) -> Outcome:
    return Outcome(failure=Failure(rank, "h", summary, after_peer_loss=after_peer_loss))


def waited(collective: str, rank: int) -> Outcome:
    text = "Horovod has been shut down"
    return Outcome(failure=Failure(rank, "h", text, after_peer_loss=True, collective=collective))


def verdict(it: Coordinator) -> Outcome:
    outcome = it.verdict()
    assert outcome is not None
    return outcome


def test_without_failures_there_is_no_verdict() -> None:
    it, _, _ = coordinator(2)
    it.ended(1, Outcome(success=Success(1)))
    assert not it.all_ended.is_set()
    it.ended(0, Outcome(success=Success(0)))
    assert it.all_ended.is_set()
    assert not it.stopping.is_set()
    assert it.verdict() is None


def test_the_first_failure_stops_everybody_and_is_the_cause() -> None:
    it, _, _ = coordinator(3)
    stopped: list[str] = []
    it.on_stop(lambda: stopped.append("early"))
    it.ended(2, failure(2, "first"))
    it.on_stop(lambda: stopped.append("late"))
    assert stopped == ["early", "late"]
    it.ended(0, failure(0, "second"))
    it.ended(1, Outcome())
    outcome = verdict(it)
    assert outcome.failure is not None
    assert outcome.failure.summary == "first"
    assert [f.summary for f in outcome.consequences] == ["second"]


def test_a_broken_connection_is_a_consequence_even_when_it_is_heard_of_first() -> None:
    it, _, _ = coordinator(2)
    it.ended(0, failure(0, "Connection closed by peer", after_peer_loss=True))
    it.ended(1, failure(1, "SIGKILL"))
    outcome = verdict(it)
    assert outcome.failure is not None
    assert outcome.failure.rank == 1
    assert [f.rank for f in outcome.consequences] == [0]


def test_a_rank_that_had_left_is_named_when_nobody_else_failed() -> None:
    it, _, _ = coordinator(3)
    it.ended(1, Outcome(success=Success(1)))
    it.ended(2, waited("allreduce", rank=2))
    it.ended(0, waited("allreduce", rank=0))
    cause = verdict(it).failure
    assert cause is not None
    assert cause.summary.startswith(
        "rank 1 returned from main while ranks 0 and 2 waited in allreduce. All ranks"
    )


def test_lost_ranks_fail_unless_they_had_ended() -> None:
    it, _, _ = coordinator(3)
    it.ended(1, Outcome(success=Success(1)))
    it.lost([1, 2], "contact was lost")
    cause = verdict(it).failure
    assert cause is not None
    assert (cause.rank, cause.summary) == (2, "contact was lost")


def test_lines_are_prefixed_in_the_log_and_on_the_driver() -> None:
    it, driver, log = coordinator(2)
    it.lines(1, "stdout", b"a\nb\n")
    it.message(0, b"hello")
    assert log == [b"[1]<stdout>:a\n[1]<stdout>:b\n"]
    assert driver.shown == [b"[1]<stdout>:a\n[1]<stdout>:b\n", b"message of 0: hello"]


def test_one_note_says_when_main_runs_everywhere() -> None:
    it, driver, _ = coordinator(2)
    it.started(1)
    assert driver.notes == []
    it.started(0)
    assert driver.notes == ["ranks 0 and 1 are running main"]
