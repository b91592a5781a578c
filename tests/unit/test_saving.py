"""How ranks agree upon the call at which they save; threads and asyncio, no processes."""

from __future__ import annotations

import asyncio
import functools
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from horovodrunner import checkpoint
from horovodrunner.flows.going import GoingRun
from horovodrunner.flows.outcome.outcome import Outcome
from horovodrunner.flows.saving import task
from horovodrunner.flows.saving.task import SaveAgreement
from horovodrunner.flows.saving.worker import SaveCalls
from horovodrunner.wire.events import (
    CallsCounted,
    CountCalls,
    Ended,
    Event,
    Job,
    SaveAt,
    SaveWanted,
    Sink,
    dispatcher,
    refuse,
)
from tests.waiting import wait_until

WISH = SaveWanted("somebody")


class Leader:
    """Partition 0, and what it tells the ranks and the user."""

    def __init__(self, ranks: int) -> None:
        self.wanted: asyncio.Queue[SaveWanted] = asyncio.Queue()
        self.stopping = asyncio.Event()
        self.notes: list[tuple[str, bool]] = []
        self.told: asyncio.Queue[Event] = asyncio.Queue()
        self.agreement = SaveAgreement(
            range(ranks),
            self.wanted,
            stopping=self.stopping,
            note=lambda text, routine=False: self.notes.append((text, routine)),
        )
        self.take: Sink = dispatcher([self.agreement.handlers], refuse)

    def end(self, rank: int) -> None:
        self.take(Ended(rank, Outcome().to_bytes()))

    async def question(self) -> int:
        event = await self.told.get()
        assert isinstance(event, CountCalls)
        return event.question


def with_leader(ranks: int, talk: Callable[[Leader], Awaitable[None]]) -> Leader:
    async def run() -> Leader:
        leader = Leader(ranks)
        running = asyncio.create_task(leader.agreement.run(leader.told.put_nowait))
        try:
            await asyncio.wait_for(talk(leader), 60)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        return leader

    return asyncio.run(run())


def test_the_call_after_the_last_that_any_rank_has_begun() -> None:
    async def talk(leader: Leader) -> None:
        leader.take(WISH)
        question = await leader.question()
        for rank, calls in enumerate([16, 0, 17]):
            leader.take(CallsCounted(rank, question, calls))
        assert await leader.told.get() == SaveAt(question, 18)

    leader = with_leader(3, talk)
    assert leader.notes == [
        ("somebody: all ranks are to save a checkpoint", True),
        ("all ranks save at their call 18 of checkpoint.should_save_now()", True),
    ]


def test_ranks_that_have_ended_are_not_waited_for() -> None:
    async def talk(leader: Leader) -> None:
        leader.end(1)
        leader.take(WISH)
        question = await leader.question()
        leader.take(CallsCounted(0, question, 3))
        leader.end(2)
        assert await leader.told.get() == SaveAt(question, 4)
        leader.end(0)
        leader.take(WISH)  # nobody is left to be asked
        await asyncio.sleep(0)
        assert leader.told.empty()

    with_leader(3, talk)


def test_the_same_call_comes_out_again_until_a_rank_has_reached_it() -> None:
    async def talk(leader: Leader) -> None:
        leader.take(WISH)
        first = await leader.question()
        leader.take(CallsCounted(0, first, 3))
        assert await leader.told.get() == SaveAt(first, 4)
        for calls in (3, 4):
            leader.take(WISH)
            again = await leader.question()
            leader.take(CallsCounted(0, first, 99))  # an answer to the question before
            leader.take(CallsCounted(0, again, calls))
            assert await leader.told.get() == SaveAt(again, calls + 1)

    with_leader(1, talk)


def test_urgent_wishes_that_come_together_are_told_in_one_line() -> None:
    async def talk(leader: Leader) -> None:
        for rank in (0, 1, 1, 2, 3, 4):
            leader.take(SaveWanted(f"rank {rank}", urgent=True))
        question = await leader.question()
        leader.take(CallsCounted(0, question, 0))
        await leader.told.get()

    leader = with_leader(1, talk)
    assert leader.notes == [
        ("rank 0; rank 1; rank 2; and 2 more: all ranks are to save a checkpoint", False),
        ("all ranks save at their first call of checkpoint.should_save_now()", True),
    ]


def test_nobody_is_held_up_for_long_by_a_rank_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(task, "HOLD_SECONDS", 0.01)

    async def talk(leader: Leader) -> None:
        leader.take(WISH)
        first = await leader.question()
        leader.take(CallsCounted(0, first, 3))
        assert await leader.told.get() == SaveAt(first)  # rank 0 goes on
        leader.take(CallsCounted(1, first, 5))
        second = await leader.question()  # as soon as the other answers, both are asked again
        for rank, calls in ((0, 7), (1, 5)):
            leader.take(CallsCounted(rank, second, calls))
        assert await leader.told.get() == SaveAt(second, 8)

    with_leader(2, talk)


def test_in_a_run_that_is_to_end_nothing_is_told() -> None:
    async def talk(leader: Leader) -> None:
        leader.stopping.set()
        leader.take(WISH)
        for _ in range(5):
            await asyncio.sleep(0)

    leader = with_leader(1, talk)
    assert (leader.told.empty(), leader.notes) == (True, [])


class Rank:
    """Calls of one rank, and what it reports."""

    def __init__(self, number: int, send: Callable[[Event], None] | None = None) -> None:
        self.sent: list[Event] = []
        self.calls = SaveCalls(send or self.sent.append)
        self.calls.begin(Job(number, "host", {}))
        self.take: Sink = dispatcher([self.calls.handlers], refuse)


def in_thread(function: Callable[[], object]) -> threading.Thread:
    """Run something as main's other threads do: a test's process keeps its SIGTERM."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_a_call_after_the_answer_waits_for_the_agreement() -> None:
    rank = Rank(1)
    answers: list[bool] = []

    def main() -> None:
        answers.extend(rank.calls.should_save_now() for _ in range(3))
        rank.take(CountCalls(1))
        answers.extend(rank.calls.should_save_now() for _ in range(4))

    thread = in_thread(main)
    wait_until(lambda: rank.sent)
    assert rank.sent == [CallsCounted(1, 1, 3)]
    assert answers == [False] * 3
    rank.take(SaveAt(1, 6))
    thread.join()
    assert answers[3:] == [False, False, True, False]


def test_an_agreement_that_comes_to_nothing_lets_main_go_on() -> None:
    rank = Rank(0)
    rank.take(CountCalls(1))
    rank.take(SaveAt(1))
    rank.take(SaveAt(2))
    rank.take(CountCalls(2))  # overtaken by its own answer
    answers: list[bool] = []
    in_thread(lambda: answers.append(rank.calls.should_save_now())).join()
    assert answers == [False]


@pytest.mark.parametrize("seed", range(5))
def test_threads_at_any_pace_save_at_the_same_calls(seed: int) -> None:
    """The ranks are threads; each has a pace of its own, and no other thread waits for it."""
    choose = random.Random(seed)
    size, wishes = 4, 20
    saved: list[list[int]] = [[] for _ in range(size)]
    last = [0]
    ended = threading.Event()

    def main(rank: Rank, saves: list[int], pause: float) -> None:
        calls = 0
        while not ended.is_set() or calls < last[0]:
            calls += 1
            if rank.calls.should_save_now():
                saves.append(calls)
            time.sleep(pause)

    async def talk(leader: Leader) -> None:
        loop = asyncio.get_running_loop()

        def send(event: Event) -> None:
            loop.call_soon_threadsafe(leader.take, event)

        ranks = [Rank(number, send) for number in range(size)]
        paces = [choose.choice([0.0001, 0.0003, 0.001]) for _ in ranks]
        threads = [
            in_thread(functools.partial(main, *each))
            for each in zip(ranks, saved, paces, strict=True)
        ]
        for _ in range(wishes):
            leader.take(WISH)
            for _ in ("the question", "the call"):
                event = await leader.told.get()
                for rank in ranks:
                    await asyncio.to_thread(rank.take, event)
            assert isinstance(event, SaveAt)
            last[0] = max(last[0], event.call)
        ended.set()
        for thread in threads:
            await asyncio.to_thread(thread.join)

    with_leader(size, talk)
    assert saved == [saved[0]] * size
    assert saved[0] == sorted({*saved[0]})
    assert saved[0][-1] == last[0]


def test_what_is_wanted_waits_until_there_is_somebody_to_send_it_to() -> None:
    run = GoingRun("r1")
    sent: list[Any] = []
    assert run.want_save(WISH)
    with run.wishes_go_to(sent.append):
        assert sent == [WISH]
        run.want_save(SaveWanted("at once"))
    run.want_save(SaveWanted("in the next attempt"))
    with run.wishes_go_to(sent.append):
        pass
    assert [each.why for each in sent] == ["somebody", "at once", "in the next attempt"]
    run.close()
    assert not run.want_save(WISH)


def test_outside_a_run_nothing_is_to_be_saved() -> None:
    assert checkpoint.should_save_now() is False
