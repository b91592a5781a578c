"""A timeline becomes valid JSON wherever its writer stopped."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from horovodrunner.flows.artifacts import timeline
from horovodrunner.flows.artifacts.timeline import TimelineRepair

# As Horovod 0.28.1 writes it: metadata on lines of their own, all events of a tensor on one line.
HEAD = (
    '[\n{"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_in_micros":7}'
    '},\n{"name": "process_sort_index", "ph": "M", "pid": 0, "args": {"sort_index": 0}},\n'
)
TENSOR = (
    '{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "allreduce.g},{0"}},\n'
    '{"name": "process_sort_index", "ph": "M", "pid": 1, "args": {"sort_index": 1}},\n'
)
BEGIN = '{"ph": "B", "name": "NEGOTIATE_ALLREDUCE", "ts": 3672, "pid": 1}'
READY = '{"ph": "X", "name": "0", "ts": 3672, "pid": 1, "dur": 0}'
END = '{"ph": "E", "ts": 9, "pid": 1, "args": {"dtype": "float32", "shape": "[1000]"}}'
CYCLE = '{"ph": "i", "name": "CYCLE_START", "ts": 651, "s": "g"}'
WHOLE = HEAD + CYCLE + "," + TENSOR + ",".join([BEGIN, READY, END]) + "]"
EVENTS = json.loads(WHOLE)


def repaired(content: bytes, piece: int = 1 << 20) -> tuple[list[Any], TimelineRepair]:
    repair = TimelineRepair()
    pieces = (content[start : start + piece] for start in range(0, len(content), piece))
    return json.loads(b"".join(repair.repair(pieces))), repair


@pytest.mark.parametrize(
    ("content", "events", "collectives"),
    [
        (WHOLE, EVENTS, 3),
        (WHOLE[:-1], EVENTS, 3),  # the next event was about to overwrite the bracket
        (WHOLE[:-1] + ",", EVENTS, 3),
        (WHOLE[:-2], EVENTS[:-1], 2),
        (WHOLE + "\n" * 5000, EVENTS, 3),
        (HEAD, EVENTS[:2], 0),
        (HEAD + CYCLE + "]", EVENTS[:3], 0),
        ("[", [], 0),
        ("[\n", [], 0),
        ("[]", [], 0),
        ("", [], 0),
        ("\0" * 100, [], 0),  # what some file systems leave after a crash
    ],
)
def test_what_is_whole_is_kept(content: str, events: list[Any], collectives: int) -> None:
    found, repair = repaired(content.encode())
    assert found == events
    assert (repair.collectives, repair.dropped) == (collectives, 0)


def test_it_may_be_torn_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_EVENT_CHARACTERS", 200)
    content = (WHOLE[:-1] + "," + WHOLE[2:]).encode()
    for end in range(len(content)):
        found, repair = repaired(content[:end], piece=7)
        assert found == (EVENTS * 2)[: len(found)]
        assert repair.dropped == 0
    assert len(found) >= 2 * len(EVENTS) - 1


def test_an_event_with_a_quotation_mark_in_its_name_is_left_out_and_counted() -> None:
    bad = '{"name": "process_name", "ph": "M", "pid": 2, "args": {"name": "a"b"}},\n'
    found, repair = repaired((WHOLE[:-1] + "," + bad + BEGIN + "]").encode())
    assert found == [*EVENTS, json.loads(BEGIN)]
    assert (repair.collectives, repair.dropped) == (4, 1)


@pytest.mark.parametrize("filling", ["x", '{"a": 1},', "["])
def test_an_endless_event_is_left_out(monkeypatch: pytest.MonkeyPatch, filling: str) -> None:
    monkeypatch.setattr(timeline, "MAX_EVENT_CHARACTERS", 200)
    bad = '{"ph": "B", "name": "' + filling * 1000
    found, repair = repaired((WHOLE[:-1] + "," + bad + '"x"},' + BEGIN + "]").encode(), piece=50)
    assert found == [*EVENTS, json.loads(BEGIN)]
    assert repair.dropped >= 1


def test_bytes_that_are_no_utf8_are_replaced_and_characters_may_be_cut_in_two() -> None:
    name = "gradé".encode()
    content = WHOLE.encode().replace(b"NEGOTIATE_ALLREDUCE", name + b"\xff")
    found, _ = repaired(content, piece=1)
    assert [event["name"] for event in found if event["ph"] == "B"] == ["gradé�"]


def test_memory_is_bounded_on_one_long_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_EVENT_CHARACTERS", 10_000)
    line = (",".join([BEGIN, READY, END]) + ",").encode()
    piece = line * 1000
    count = 30

    def pieces() -> Iterator[bytes]:
        yield HEAD.encode() + TENSOR.encode()
        for _ in range(count):
            yield piece

    repair = TimelineRepair()
    tracemalloc.start()
    try:
        written = sum(len(out) for out in repair.repair(pieces()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert written > count * len(piece)
    assert repair.collectives == 3000 * count
    assert peak < count * len(piece) / 2
