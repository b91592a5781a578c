"""Samples of stacks, summed up by a worker and written for speedscope."""

from __future__ import annotations

import json
import sys
from types import FrameType

import pytest

from horovodrunner.flows.profile import worker
from horovodrunner.flows.profile.driver import Stacks, speedscope
from horovodrunner.flows.profile.worker import StackProfile
from horovodrunner.wire.events import Profile


def frames() -> list[FrameType]:
    found: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def load_batch() -> list[FrameType]:
    return frames()


def step(depth: int = 0) -> list[FrameType]:
    return step(depth - 1) if depth else load_batch()


def stacks_of(profile: StackProfile) -> Stacks:
    found = Stacks.of(profile.event(1.0))
    assert found is not None
    return found


def test_equal_stacks_are_one() -> None:
    profile = StackProfile(2)
    for _ in range(3):
        profile.add(step(), 0.5, "", surely=True)
    stacks = stacks_of(profile)
    assert list(stacks.seconds.values()) == [1.5]
    (stack,) = stacks.seconds
    assert [stacks.frames[each][0] for each in stack[-2:]] == ["step", "load_batch"]
    assert profile.event(7.0).seconds == 7.0


def test_time_in_collectives_is_summed_up() -> None:
    profile = StackProfile(2)
    profile.add(step(), 1.0, "allreduce", surely=True)
    profile.add(step(), 2.0, "allreduce", surely=True)
    profile.add(step(), 4.0, "loss.backward()", surely=False)
    event = profile.event(9.0)
    assert (event.waited, event.may_have_waited) == ({"allreduce": 3.0}, {"loss.backward()": 4.0})


def test_many_stacks_and_deep_ones_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MAX_STACKS", 10)
    profile = StackProfile(0)
    for depth in [*range(40), 3]:
        profile.add(step(depth), 1.0, "", surely=True)
    stacks = stacks_of(profile)
    assert sum(stacks.seconds.values()) == 41.0
    assert len(stacks.seconds) == 11
    names = {stacks.frames[stack[-1]][0]: each for stack, each in stacks.seconds.items()}
    assert names["(other stacks)"] == 30.0
    monkeypatch.setattr(worker, "MAX_DEPTH", 4)
    profile = StackProfile(0)
    profile.add(step(40), 1.0, "", surely=True)
    (stack,) = stacks_of(profile).seconds
    assert len(stack) == 5


def test_speedscope_reads_all_attempts_of_a_rank() -> None:
    first = Stacks((("main", "train.py", 3), ("step", "train.py", 9)), {(0, 1): 2.0, (0,): 1.0})
    second = Stacks((("step", "train.py", 9),), {(0,): 4.0})
    file = json.loads(json.dumps(speedscope({"attempt 1": first, "attempt 2": second}, "rank 0")))
    assert file["shared"]["frames"] == [
        {"name": "main", "file": "train.py", "line": 3},
        {"name": "step", "file": "train.py", "line": 9},
    ]
    one, two = file["profiles"]
    assert (one["samples"], one["weights"], one["endValue"]) == ([[0, 1], [0]], [2.0, 1.0], 3.0)
    assert two["samples"] == [[1]]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"frames": [["f", "f.py", 1]], "stacks": [[[1], 1.0]]}',
        b'{"frames": [["f", "f.py", 1]], "stacks": [[[-1], 1.0]]}',
        b'{"frames": [["f"]], "stacks": []}',
        b'{"frames": [], "stacks": [[[], "x"]]}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_profile_is_none(body: bytes) -> None:
    assert Stacks.of(Profile(0, 1.0, {}, {}, body)) is None
