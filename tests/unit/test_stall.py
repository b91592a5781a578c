"""Who waits for whom, from what the ranks tell."""

from __future__ import annotations

from horovodrunner.flows.telemetry.task import Stall, StallWatch
from horovodrunner.wire.events import Beat

State = tuple[float, Beat]


def waits(collective: str, seconds: float, at: float = 100.0, surely: bool = True) -> State:
    return at, Beat(0, "train.py:7 in train", collective, surely, seconds)


def computes(at: float = 100.0) -> State:
    return at, Beat(0, "data.py:3 in load")


def watch(*states: State | None) -> StallWatch:
    it = StallWatch(len(states))
    for rank, state in enumerate(states):
        if state is not None:
            it.heard(state[1].replace(rank=rank), now=state[0])
    return it


def found(it: StallWatch, now: float = 101.0, threshold: float = 60.0) -> Stall:
    stall = it.find(now, threshold)
    assert stall is not None
    return stall


def test_ranks_that_compute_are_no_stall() -> None:
    assert watch(computes(), computes()).find(101.0, 5) is None


def test_a_short_wait_is_no_stall() -> None:
    assert watch(waits("allreduce", 58), computes()).find(101.0, 60) is None


def test_the_missing_rank_is_named_with_the_place_where_it_is() -> None:
    stall = found(watch(waits("allreduce", 59), computes(), waits("allreduce", 10)))
    assert stall.missing == (1,)
    assert stall.seconds == 60
    assert stall.text == (
        "ranks 0 and 2 wait in allreduce (train.py:7 in train); "
        "missing: rank 1 is at data.py:3 in load"
    )


def test_a_rank_that_returned_is_what_the_others_wait_for() -> None:
    it = watch(waits("broadcast", 70), computes())
    it.ended(1)
    assert "missing: rank 1 has returned from main" in found(it).text
    assert it.waiting_in() == {"broadcast": [0]}


def test_a_rank_that_has_not_called_main_is_what_the_others_wait_for() -> None:
    assert "rank 1 has not called main yet" in found(watch(waits("init", 70), None)).text


def test_a_rank_that_does_not_answer_is_a_stall_by_itself() -> None:
    stall = found(watch(computes(at=200), computes(at=130)), now=200)
    assert stall.missing == (1,)
    assert stall.text.startswith("missing: rank 1 has not answered for 70 s")


def test_ranks_in_different_collectives_wait_for_each_other() -> None:
    stall = found(watch(waits("allreduce", 70), waits("broadcast", 65)))
    assert stall.missing == ()
    assert "rank 0 waits in allreduce" in stall.text
    assert "rank 1 waits in broadcast" in stall.text
    assert "different collectives" in stall.text


def test_a_long_step_of_all_ranks_is_computing() -> None:
    step = waits("a TensorFlow step", 3600, surely=False)
    assert watch(step, step).find(101.0, 60) is None


def test_a_long_step_of_one_rank_is_waiting_when_the_other_is_elsewhere() -> None:
    step = waits("a TensorFlow step", 3600, surely=False)
    assert found(watch(step, computes())).missing == (1,)


def test_many_missing_ranks_are_counted() -> None:
    text = found(watch(waits("allreduce", 70), *[computes()] * 40)).text
    assert text.endswith(", and 32 more")
