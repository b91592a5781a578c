"""Which failure is the cause, and when the others are stopped."""

from __future__ import annotations

import asyncio
from typing import Any

from horovodrunner.flows.logs.task import MergedLog
from horovodrunner.flows.outcome.outcome import Failure, Outcome, Success
from horovodrunner.flows.outcome.task import RunOutcome
from horovodrunner.flows.telemetry.phases import Phase, Spans
from horovodrunner.flows.telemetry.task import Telemetry
from horovodrunner.placement.topology import Slot
from horovodrunner.wire.events import (
    Ended,
    Event,
    Lines,
    Message,
    Note,
    Notice,
    RankPhases,
    Started,
    dispatcher,
)


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


def failure(rank: int, summary: str, after_peer_loss: bool = False) -> Outcome:
    return Outcome(failure=Failure(rank, "h", summary, after_peer_loss=after_peer_loss))


def waited(collective: str, rank: int) -> Outcome:
    text = "Horovod has been shut down"
    return Outcome(failure=Failure(rank, "h", text, after_peer_loss=True, collective=collective))


def summary(it: RunOutcome, waiting_in: dict[str, list[int]] | None = None) -> Outcome:
    outcome = it.summary(waiting_in or {})
    assert outcome is not None
    return outcome


def test_without_failures_there_is_nothing_to_sum_up() -> None:
    it = RunOutcome(slots(2))
    it.ended(1, Outcome(success=Success(1)))
    assert not it.all_ended.is_set()
    it.ended(0, Outcome(success=Success(0)))
    assert it.all_ended.is_set()
    assert not it.stopping.is_set()
    assert it.summary({}) is None


def test_the_first_failure_stops_everybody_and_is_the_cause() -> None:
    it = RunOutcome(slots(3))
    it.ended(2, failure(2, "first"))
    assert it.stopping.is_set()
    it.ended(0, failure(0, "second"))
    it.ended(1, Outcome())
    outcome = summary(it)
    assert outcome.failure is not None
    assert outcome.failure.summary == "first"
    assert [f.summary for f in outcome.consequences] == ["second"]


def test_a_broken_connection_is_a_consequence_even_when_it_is_heard_of_first() -> None:
    it = RunOutcome(slots(2))
    it.ended(0, failure(0, "Connection closed by peer", after_peer_loss=True))
    it.ended(1, failure(1, "SIGKILL"))
    outcome = summary(it)
    assert outcome.failure is not None
    assert outcome.failure.rank == 1
    assert [f.rank for f in outcome.consequences] == [0]


def test_a_rank_that_had_left_is_named_when_nobody_else_failed() -> None:
    it = RunOutcome(slots(4))
    it.ended(1, Outcome(success=Success(1)))
    it.ended(2, waited("allreduce", rank=2))
    it.ended(0, waited("allreduce", rank=0))
    cause = summary(it, {"broadcast": [3]}).failure
    assert cause is not None
    assert cause.summary.startswith(
        "rank 1 returned from main while ranks 0 and 2 waited in allreduce, rank 3 waited in "
        "broadcast. All ranks"
    )


def test_lost_ranks_fail_unless_they_had_ended() -> None:
    it = RunOutcome(slots(3))
    it.ended(1, Outcome(success=Success(1)))
    it.lost([1, 2], "contact was lost")
    cause = summary(it).failure
    assert cause is not None
    assert (cause.rank, cause.summary) == (2, "contact was lost")


class Leader:
    """Partition 0's ends of what the ranks report."""

    def __init__(self, size: int) -> None:
        self.log: list[bytes] = []
        self.told: list[Event] = []
        self.spans = Spans()
        log = MergedLog(self.log.append, self.told.append)
        self.outcome = RunOutcome(slots(size))
        telemetry = Telemetry(slots(size), log, self.outcome, self.spans, self.told.append)
        flows = [log.handlers, self.outcome.handlers, telemetry.handlers]
        self.emit = dispatcher(flows, otherwise=self.told.append)


def test_lines_are_prefixed_in_the_log_and_all_goes_on_to_the_driver_as_it_is() -> None:
    leader = Leader(2)
    events = [Lines(1, "stdout", b"a\nb\n"), Message(0, "hello")]
    for event in events:
        leader.emit(event)
    assert leader.log == [b"[1]<stdout>:a\n[1]<stdout>:b\n"]
    assert leader.told == events


def test_a_notice_is_shown_once_whichever_ranks_send_it() -> None:
    leader = Leader(2)
    for rank in (0, 1):
        leader.emit(Notice(rank, "key", f"from {rank}"))
    assert leader.log == [b"HorovodRunner: from 0\n"]
    assert leader.told == [Note("from 0")]


def test_one_note_says_when_main_runs_everywhere() -> None:
    leader = Leader(2)
    leader.emit(Started(1))
    assert leader.told == []
    leader.emit(Started(0))
    assert leader.told == [Note("ranks 0 and 1 are running main", routine=True)]


def test_phases_of_a_rank_are_kept() -> None:
    leader = Leader(1)
    leader.emit(RankPhases(0, {"imports": (1.0, 2.0)}))
    assert leader.spans.phases() == (Phase("imports", 1.0, 2.0, 0),)


def test_how_a_rank_ended_is_read_where_it_ends() -> None:
    async def wait() -> None:
        leader = Leader(1)
        leader.emit(Ended(0, failure(0, "boom").to_bytes()))
        await asyncio.wait_for(leader.outcome.wait_for_end(grace=5), 5)
        assert summary(leader.outcome) == failure(0, "boom")

    asyncio.run(wait())
