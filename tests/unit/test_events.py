"""Every event survives its encoding, and no bytes are taken for one that they are not."""

from __future__ import annotations

import random
import types
import typing
from typing import Any

import pytest

from horovodrunner.wire.events import (
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    Beat,
    Event,
    FrameError,
    Job,
    Lines,
    Message,
    Started,
    Stop,
    decode,
    dispatcher,
    encode,
    parse_prefix,
)

TEXTS = ["", "x", "ä\n\0\x1b[31m", "\U0001f600" * 3, "\udcff", '"}{', "kind"]
NUMBERS = [0, 1, -1, 2**31, 2**63, -(2**70)]


def some(hint: Any, chance: random.Random) -> Any:
    """Make a value that a field of this type may have."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return chance.choice([None, some(arguments[0], chance)])
    if typing.get_origin(hint) is dict:
        return {chance.choice(TEXTS): some(arguments[1], chance) for _ in range(3)}
    if typing.get_origin(hint) is tuple:
        if arguments[-1] is ...:
            arguments = arguments[:1] * chance.randrange(4)
        return tuple(some(each, chance) for each in arguments)
    values: dict[Any, list[Any]] = {
        str: TEXTS,
        int: NUMBERS,
        float: [0.0, -1.5, 1e300, float("inf"), chance.random()],
        bool: [False, True],
        bytes: [b"", chance.randbytes(300)],
    }
    return chance.choice(values[hint])


def fields_of(kind: type[Event]) -> dict[str, Any]:
    return {n: hint for n, hint in typing.get_type_hints(kind).items() if n != "kinds"}


def parts(frame: bytes) -> tuple[bytes, bytes]:
    header_bytes, body_bytes = parse_prefix(frame[:PREFIX_BYTES])
    header, body = frame[PREFIX_BYTES:][:header_bytes], frame[PREFIX_BYTES + header_bytes :]
    assert len(body) == body_bytes
    return header, body


@pytest.mark.parametrize("kind", Event.kinds.values(), ids=lambda kind: kind.__name__)
def test_what_is_encoded_is_decoded_again(kind: type[Event]) -> None:
    chance = random.Random(kind.__name__)
    for _ in range(50):
        event = kind(**{name: some(hint, chance) for name, hint in fields_of(kind).items()})
        assert decode(*parts(b"".join(encode(event)))) == event


@pytest.mark.parametrize("kind", Event.kinds.values(), ids=lambda kind: kind.__name__)
def test_an_event_has_one_body_at_most_and_no_field_named_kind(kind: type[Event]) -> None:
    fields = fields_of(kind)
    assert list(fields.values()).count(bytes) <= 1
    assert "kind" not in fields


@pytest.mark.parametrize("kind", Event.kinds.values(), ids=lambda kind: kind.__name__)
def test_bytes_that_were_changed_are_decoded_or_refused(kind: type[Event]) -> None:
    chance = random.Random(kind.__name__)
    for _ in range(300):
        event = kind(**{name: some(hint, chance) for name, hint in fields_of(kind).items()})
        header, body = parts(b"".join(encode(event)))
        changed = bytearray(header)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(changed))
            changed[at : at + chance.randrange(3)] = chance.choice(
                [chance.randbytes(2), b"null", b"[]", b"{}", b"1e999", b"9" * 5000, b'"', b","]
            )
        try:
            found = decode(bytes(changed), body)
        except FrameError:
            continue
        assert decode(*parts(b"".join(encode(found)))) == found or "NaN" in changed.decode()


@pytest.mark.parametrize(
    ("header", "body", "why"),
    [
        (b"GET / HTTP/1.1", b"", "not JSON"),
        (b"\xff\xfe\x80", b"", "not JSON"),
        (b"[" * 1_000_000, b"", "nested too deeply"),
        (b"[1]", b"", "not a JSON object"),
        (b'{"rank": 1}', b"", "not a JSON object with"),
        (b'{"kind": ["Started"]}', b"", "not a JSON object with"),
        (b'{"kind": "Nothing"}', b"", "unknown kind, 'Nothing'"),
        (b'{"kind": "Event"}', b"", "unknown kind"),
        (b'{"kind": "Started"}', b"", "Started lacks the field 'rank'"),
        (b'{"kind": "Started", "rank": 1, "x": 2}', b"", "Started has no field 'x'"),
        (b'{"kind": "Started", "rank": "1"}', b"", "Started.rank is '1', not int"),
        (b'{"kind": "Started", "rank": true}', b"", "Started.rank is True, not int"),
        (b'{"kind": "MainEnded", "rank": 1}', b"x", "MainEnded has no body, and 1 bytes came"),
        (b'{"kind": "Stack", "rank": 1, "text": "x"}', b"", "no field 'text' in its header"),
        (b'{"kind": "Placed", "ranks": [[0, 0]]}', b"", "Placed.ranks is"),
        (b'{"kind": "Job", "rank": 0, "host": "h", "environment": {"A": 1}}', b"", "not str"),
    ],
)
def test_what_is_no_event_is_refused_and_it_says_why(header: bytes, body: bytes, why: str) -> None:
    with pytest.raises(FrameError, match=why):
        decode(header, body)


def test_lengths_are_limited() -> None:
    def prefix(header_bytes: int, body_bytes: int) -> bytes:
        return header_bytes.to_bytes(4, "big") + body_bytes.to_bytes(8, "big")

    assert parse_prefix(prefix(MAX_HEADER_BYTES, MAX_BODY_BYTES)) == (
        MAX_HEADER_BYTES,
        MAX_BODY_BYTES,
    )
    assert parse_prefix(prefix(1, 2**60), max_body_bytes=None) == (1, 2**60)
    with pytest.raises(FrameError, match="a header of"):
        parse_prefix(prefix(MAX_HEADER_BYTES + 1, 0))
    with pytest.raises(FrameError, match="a body of"):
        parse_prefix(prefix(1, MAX_BODY_BYTES + 1))


def test_an_event_goes_to_all_that_handle_it_or_on() -> None:
    seen: list[object] = []
    passed: list[Event] = []
    emit = dispatcher(
        [
            {Started: lambda event: seen.append(event.rank)},
            {Started: lambda event: seen.append("again"), Stop: seen.append},
        ],
        otherwise=passed.append,
    )
    for event in (Started(3), Stop(), Beat(1), Message(0, "x"), Lines(0, "stdout", b"x\n")):
        emit(event)
    assert seen == [3, "again", Stop()]
    assert passed == [Beat(1), Message(0, "x"), Lines(0, "stdout", b"x\n")]


def test_an_event_cannot_be_changed_and_is_equal_by_kind_and_fields() -> None:
    event = Lines(1, "stdout", b"x\n")
    with pytest.raises(AttributeError, match=r"Lines\.rank cannot be changed"):
        event.rank = 2  # type: ignore[misc]
    assert event.replace(rank=2) == Lines(rank=2, stream="stdout", lines=b"x\n")
    assert event != Message(1, "stdout")
    assert repr(event) == "Lines(rank=1, stream='stdout')"


def test_no_secret_and_no_call_shows_in_a_job() -> None:
    assert "x" not in repr(Job(0, "h", {"MLFLOW_TOKEN": "x"}, call=b"x"))


@pytest.mark.parametrize("wrong", [{}, {"rank": 1, "why": ""}])
def test_an_event_has_its_own_fields_and_no_others(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="Started"):
        Started(**wrong)
    with pytest.raises(TypeError, match="Started"):
        Started(1, b"", 2)  # type: ignore[call-arg]
